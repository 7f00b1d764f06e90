"""Bundles by name and alias, opened when they are first asked for, within a bound on memory."""

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armchair.bundle import Bundle, bundled_names, find_bundle, read_bundle
from armchair.config import nearest
from armchair.errors import ArmchairError, RequestError
from armchair.runtime import pick_device
from armchair.sample.pipeline import Artist
from armchair.serve.scheduler import Busy, Drawer

GIB = 2**30
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
# Bytes in memory for a byte of weights in 16 bits: twice as much in 32 bits, and what is packed from them beside it.
SPREAD = 4


class UnknownModel(ArmchairError):
    """A model was asked for by a name that is none of the served ones."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A bundle that is served."""

    name: str
    bundle: Bundle
    size: int  # bytes in memory, about, once it is open


class Models:
    """What is served. A bundle is opened when it is first asked for; the least lately used ones are closed for it.

    `models` are bundles as `find_bundle` has them, or NAME=BUNDLE; the first is the default, no model the bundled one.
    `aliases` are further names. `memory` bounds the bytes of all that are open, where they can be closed: one bundle is
    served whatever its size. Raises RequestError for names that are taken twice or are none, BundleError for a bundle
    that is missing or not whole.
    """

    def __init__(
        self,
        models: Sequence[str] = (),
        *,
        aliases: Mapping[str, str] | None = None,
        memory: int = 4 * GIB,
        device: str = "auto",
        weights: str | None = None,
        queue: int = 64,
        pictures: int = 4096,
    ):
        self.memory, self.device, self.weights = memory, pick_device(device), weights
        self.queue, self.pictures = queue, pictures
        self.sources: dict[str, Source] = {}
        for model in models or [""]:
            source = _source(model)
            if source.name in self.sources:
                raise RequestError(f"two models are called {source.name!r}; give one another name: NAME=BUNDLE")
            self.sources[source.name] = source
        self.default = next(iter(self.sources))
        self.aliases: dict[str, str] = {}
        for alias, name in (aliases or {}).items():
            if not NAME.fullmatch(alias):
                raise RequestError(f"alias {alias!r}: expected letters, digits, and . _ : / - between them")
            if alias in self.sources:
                raise RequestError(f"alias {alias!r}: a model is called so")
            if name not in self.sources:
                raise RequestError(f"alias {alias!r}: unknown model {name!r}: {nearest(name, self.sources)}")
            self.aliases[alias] = name
        self.created = int(time.time())
        self._opening, self._guard = threading.Lock(), threading.Lock()  # the first is taken before the second
        self._drawers: dict[str, Drawer] = {}  # the least lately used first

    def names(self) -> list[str]:
        """Models by their own names, the default first."""
        return list(self.sources)

    def resolve(self, name: str | None) -> str:
        """The model's own name for a name or an alias, or for None. Raises UnknownModel."""
        if name is None:
            return self.default
        known = self.aliases.get(name, name)
        if known not in self.sources:
            said = f"{name[:100]!r}" if isinstance(name, str) else "that"
            raise UnknownModel(f"there is no model {said} here; GET /v1/models lists those that are served")
        return known

    def resolution(self, name: str | None) -> int:
        """The side of a picture in pixels, of a bundle that need not be open. Raises UnknownModel."""
        return int(self.sources[self.resolve(name)].bundle.info["recipe"]["image_tokenizer"]["resolution"])

    def artist(self, name: str | None = None) -> Artist:
        """The model's artist, opened where it is not yet, which takes a while. Raises as `drawer`."""
        return self.drawer(name).artist

    def drawer(self, name: str | None = None) -> Drawer:
        """The model's drawing thread, with its bundle opened where it is not yet.

        Raises UnknownModel, and Busy where others would have to be closed for it and are drawing.
        """
        known = self.resolve(name)
        if (drawer := self.open_drawer(known)) is not None:
            return drawer
        with self._opening:
            if (drawer := self.open_drawer(known)) is None:
                drawer = self._open(self.sources[known])
                with self._guard:
                    self._drawers[known] = drawer
            return drawer

    def open_drawer(self, known: str) -> Drawer | None:
        """The drawing thread of a model, by its own name, where it is open; it is then the last that was used."""
        with self._guard:
            drawer = self._drawers.pop(known, None)
            if drawer is not None:
                self._drawers[known] = drawer
            return drawer

    def opened(self) -> dict[str, Drawer]:
        """The drawing threads of bundles that are open."""
        with self._guard:
            return dict(self._drawers)

    def describe(self) -> list[dict[str, Any]]:
        """What is served, a line a model, the default first."""
        lines = []
        for name, source in self.sources.items():
            info = source.bundle.info
            image, text = info["recipe"]["image_tokenizer"], info["recipe"]["text_tokenizer"]
            lines.append(
                {
                    "name": name,
                    "aliases": [alias for alias, of in self.aliases.items() if of == name],
                    "default": name == self.default,
                    "open": name in self._drawers,
                    "fingerprint": source.bundle.fingerprint,
                    "description": info["recipe"].get("description", ""),
                    "licence": info["recipe"].get("licence", ""),
                    "resolution": image["resolution"],
                    "text_length": text["length"],
                    "ranker": "ranker" in source.bundle.parts,
                    "prompts": list(info["recipe"].get("drawing", {}).get("prompts", ())),
                    "settings": {
                        key: value for key, value in info["recipe"].get("drawing", {}).items() if key != "prompts"
                    },
                }
            )
        return lines

    def close(self, seconds: float = 0.0) -> None:
        """Stop all drawing threads, each after what it has been asked for or after so many seconds."""
        ends = time.monotonic() + seconds
        with self._opening:
            drawers = self.opened().values()
            for drawer in drawers:
                drawer.stop_taking()
            for drawer in drawers:
                drawer.close(max(0.0, ends - time.monotonic()))

    def _open(self, source: Source) -> Drawer:
        while opened := self.opened():
            if sum(self.sources[name].size for name in opened) + source.size <= self.memory:
                break
            idle = next((name for name, drawer in opened.items() if drawer.idle), None)
            if idle is None:
                raise Busy(f"model {source.name!r} has to wait until another one can be closed for it", 5.0)
            with self._guard:
                del self._drawers[idle]
            opened[idle].close(0.0)
        artist = Artist(source.bundle, device=self.device, model=source.name, weights=self.weights)
        return Drawer(artist, queue=self.queue, pictures=self.pictures)


def _source(model: str) -> Source:
    given, equals, where = model.partition("=")
    if not equals or Path(model).exists():
        given, where = "", model
    bundle = read_bundle(find_bundle(where or None))
    name = given or (where if where in bundled_names() else str(bundle.name))
    if not NAME.fullmatch(name):
        raise RequestError(f"model {name!r}: expected letters, digits, and . _ : / - between them; give NAME=BUNDLE")
    if bundle.parts == ("ranker",):
        raise RequestError(f"{bundle.path}: this bundle only ranks, it cannot be served")
    return Source(name=name, bundle=bundle, size=SPREAD * bundle.weight_bytes())
