"""Captions that are nearly right: with two attributes swapped, or one exchanged for another of its kind.

A contrastive model that only ever has to tell a caption from those of other pictures gets by on which words occur, and
not on which belongs to which (Yuksekgonul et al., 2023); a caption that differs in nothing else cannot be told so.

Where no picture shows a blue star, "a blue star" would only ever be met as a caption that is false, and a model soon
knows by the words alone that it is, whatever the picture. So false captions put no words together that the captions of
the pictures never do.
"""

import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from armchair.errors import RequestError


class NearMisses:
    """Makes false captions from `kinds`, lists of words or phrases that could each stand where another does.

    captions: those of the pictures; `of` then keeps to the words and pairs of words (`links`) that occur in them.
    """

    def __init__(self, kinds: Sequence[Sequence[str]], captions: Iterable[str] | None = None):
        self.kind_of: dict[str, int] = {}
        for i, kind in enumerate(kinds):
            if len(set(kind)) < 2:
                raise RequestError(f"near_misses: expected two or more different words of a kind, got {list(kind)}")
            for word in kind:
                if not word.strip() or word.lower() in self.kind_of:
                    raise RequestError(f"near_misses: {word!r} is empty, or there twice")
                self.kind_of[word.lower()] = i
        self.kinds = [tuple(word.lower() for word in kind) for kind in kinds]
        words = sorted(self.kind_of, key=len, reverse=True)  # the longest first: "light blue" before "blue"
        self.pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b") if words else None
        self.heard = None if captions is None else {link for caption in captions for link in self.links(caption)}

    def of(self, caption: str, rng: np.random.Generator) -> str | None:
        """A caption that is false where `caption` is true; None where there is nothing to swap or exchange.

        The kind is drawn first, or a relation would be asked for as seldom as it has few words. Where two different
        words of it occur, half of the time they are swapped; else one is exchanged for another that is not there.
        """
        kinds = sorted({self.kind_of[m[0]] for m in self._words(caption)})
        for kind in rng.permutation(kinds).tolist():
            ways = [self.swaps, self.exchanges]
            for way in ways if rng.random() < 0.5 else reversed(ways):
                choices = way(caption, kind)
                for i in rng.permutation(len(choices)):
                    if self.heard is None or self.links(choices[i]) <= self.heard:
                        return choices[i]
        return None

    def links(self, caption: str) -> set[tuple[str, ...]]:
        """The words, and the pairs of different kinds, in their order, with no word of either kind between them.

        Of "a large red star left of a blue circle" the pairs have (red, star) and (star, blue), not (red, circle).
        """
        words = [m[0] for m in self._words(caption)]
        found: set[tuple[str, ...]] = {(word,) for word in words}
        for i, word in enumerate(words):
            passed: set[int] = set()
            for other in words[i + 1 :]:
                kind = self.kind_of[other]
                if kind == self.kind_of[word]:
                    break
                if kind not in passed:
                    found.add((word, other))
                passed.add(kind)
        return found

    def swaps(self, caption: str, kind: int | None = None) -> list[str]:
        """Every caption in which two different words of a kind (of kind number `kind`) have changed places."""
        found = self._words(caption, kind)
        pairs = itertools.combinations(found, 2)
        alike = [(a, b) for a, b in pairs if a[0] != b[0] and self.kind_of[a[0]] == self.kind_of[b[0]]]
        return [_with(caption.lower(), {a: b[0], b: a[0]}) for a, b in alike]

    def exchanges(self, caption: str, kind: int | None = None) -> list[str]:
        """Every caption in which one word has become another of its kind that the caption does not have."""
        found = self._words(caption, kind)
        present = {m[0] for m in found}
        choices = [(m, word) for m in found for word in self.kinds[self.kind_of[m[0]]] if word not in present]
        return [_with(caption.lower(), {m: word}) for m, word in choices]

    def _words(self, caption: str, kind: int | None = None) -> list[re.Match[str]]:
        found = self.pattern.finditer(caption.lower()) if self.pattern else []
        return [m for m in found if kind in (None, self.kind_of[m[0]])]


def _with(caption: str, words: dict[re.Match[str], str]) -> str:
    """The caption with other words at some places; an article before one is made to fit, or it would give it away."""
    for m in sorted(words, key=lambda m: -m.start()):  # from behind, so that places stay where they are
        before = caption[: m.start()]
        if article := re.search(r"\ban? $", before):
            before = before[: article.start()] + ("an " if words[m][0] in "aeiou" else "a ")
        caption = before + words[m] + caption[m.end() :]
    return caption
