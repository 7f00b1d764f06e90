"""What a ballot is of: two systems, the captions that both draw, and all that decides about their pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from armchair.config import to_dict
from armchair.data.sources import digest
from armchair.eval.pairs import read_pairs
from armchair.sample.pipeline import Artist


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two systems and the captions that they are judged by."""

    systems: tuple[Artist, Artist]
    captions: list[str]
    seed: int

    @property
    def names(self) -> tuple[str, str]:
        first, second = (f"{a.bundle.name} {a.bundle.fingerprint[:8]}" for a in self.systems)
        return first, second

    def made_of(self) -> dict[str, str]:
        """What decides about the pictures, by name, for people to read and for a ballot to compare."""
        found = {"captions": f"{len(self.captions)} of {digest(self.captions)[:8]}", "seed": str(self.seed)}
        for which, artist in zip(("first", "second"), self.systems, strict=True):
            found[which] = f"{artist.bundle.name} {artist.bundle.fingerprint[:16]}"
            drawn_with = {**to_dict(artist.settings), "weights": artist.weights}
            del drawn_with["naturalness"]  # of several it says which is best: here one is drawn
            found |= {f"{which}'s {name}": str(value) for name, value in drawn_with.items()}
        return found

    def pictures(self, say: Callable[[str], None]) -> tuple[list[Image.Image], list[Image.Image]]:
        """Those of either system, one a caption."""
        drawn = []
        for artist, name in zip(self.systems, self.names, strict=True):
            say(f"{len(self.captions)} drawings of {name}")
            drawn.append(artist.draw_each(self.captions, seed=self.seed))
        return drawn[0], drawn[1]


def make_contest(first: Artist, second: Artist, data: Sequence[str], count: int, seed: int) -> Contest:
    """Of the captions of up to `count` pictures of the data, each once. Raises DataError as `read_pairs`."""
    captions = list(dict.fromkeys(read_pairs(data, first, count).captions))
    return Contest(systems=(first, second), captions=captions, seed=seed)
