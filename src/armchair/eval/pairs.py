"""Captioned pictures to measure on, and the drawings of their captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from armchair.config import from_dict
from armchair.data.loader import caption_choices
from armchair.data.sources import DataConfig, open_source
from armchair.errors import DataError, RequestError
from armchair.eval.features import Extracted, FeatureNetwork
from armchair.eval.figures import Picture
from armchair.image.pixels import BrokenSample, square
from armchair.image.sheet import contact_sheet
from armchair.sample.pipeline import Artist

SHEET_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pictures, uint8 (R, R, 3), with a caption each."""

    images: list[np.ndarray] = field(repr=False)
    captions: list[str]
    fingerprint: str
    places: list[str]  # of each picture, the name of the path that it came by

    def __len__(self) -> int:
        return len(self.images)


def read_pairs(paths: Sequence[str], artist: Artist, count: int, without: frozenset[str] = frozenset()) -> Pairs:
    """Up to `count` readable pictures of the sources, spread over them, as the bundle's recipe captions them.

    Pictures whose key is in `without` are left out. Raises DataError where fewer than two can be used.
    """
    recipe = artist.bundle.info["recipe"]
    resolution = 64 * -(-artist.resolution // 64)  # a world that is drawn comes in multiples of 64
    try:
        captions_of = {"captions": recipe["data"]["captions"]}
        config = from_dict(DataConfig, {"resolution": resolution, **captions_of}, "data")
    except (RequestError, KeyError):
        config = DataConfig(resolution=resolution)
    source = open_source(paths, config)
    names = [Path(path).name for path in paths]
    ends = np.cumsum([len(open_source([path], config)) for path in paths]) if len(paths) > 1 else [len(source)]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(source))
    images: list[np.ndarray] = []
    captions: list[str] = []
    places: list[str] = []
    for i in map(int, order):
        if len(images) == count:
            break
        if source.key(i) in without:
            continue
        try:
            sample = source[i]
            captions.append(caption_choices(source, i, sample, config)[0][0])
        except BrokenSample:
            continue
        images.append(square(sample.image, artist.resolution))
        places.append(names[int(np.searchsorted(ends, i, side="right"))])
    if len(images) < 2:
        raise DataError(f"{', '.join(paths)}: evaluation needs two readable captioned images or more")
    return Pairs(images=images, captions=captions, fingerprint=source.fingerprint(), places=places)


@dataclass(kw_only=True)
class Context:
    """What the tests of one evaluation share; what several of them need is made once."""

    artist: Artist
    held_out: Pairs
    train: Pairs | None
    networks: list[FeatureNetwork]
    data: tuple[str, ...]
    seed: int
    options: dict[str, int]
    say: Callable[[str], None]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def drawings(self) -> list[np.ndarray]:
        """One picture for each held-out caption, that of caption i its candidate i: none is chosen among several."""
        return self.once("drawings", lambda: self.draw_each(self.held_out.captions))

    def draw_each(self, captions: Sequence[str]) -> list[np.ndarray]:
        images: list[Image.Image] = []
        for start in range(0, len(captions), 64):
            images += self.artist.draw_each(captions[start : start + 64], seed=self.seed, first=start)
            self.say(f"drawn {min(start + 64, len(captions))} of {len(captions)}")
        return [np.asarray(image) for image in images]

    def extracted(self, network: FeatureNetwork, name: str, images: Sequence[np.ndarray]) -> Extracted:
        """Features of the images called `name`, made once a network."""

        def make() -> Extracted:
            parts = []
            for start in range(0, len(images), 128):
                parts.append(network.extract(images[start : start + 128]))
                if len(images) > 256:
                    self.say(f"{network.name}: {name}, {min(start + 128, len(images))} of {len(images)}")
            features = torch.cat([p.features for p in parts])
            logits = [p.logits for p in parts if p.logits is not None]
            return Extracted(features, torch.cat(logits) if logits else None)

        return self.once((network.name, name), make)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def sheet(
        self, name: str, images: Sequence[np.ndarray | Image.Image], labels: list[str] | None, alt: str
    ) -> Picture:
        """Pictures in rows of SHEET_COLUMNS, about 128 pixels each."""
        shown = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
        scale = max(1, 128 // self.artist.resolution)
        return Picture.of(name, contact_sheet(shown, labels, columns=SHEET_COLUMNS, scale=scale), alt)

    def pil(self, images: Sequence[np.ndarray]) -> list[Image.Image]:
        return [Image.fromarray(image) for image in images]
