"""Where captioned images come from: folders, tar shards and built-in worlds behind one indexed view."""

import functools
import glob
import hashlib
import itertools
import logging
import math
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from armchair.config import nearest
from armchair.errors import DataError, RequestError
from armchair.image.pixels import BrokenSample

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CROPS = ("random", "square")
EXPECTED = "expected a folder of captioned images, .tar shards (globs, {0000..0004} ranges) or 'shapes'"


class Sample(NamedTuple):
    """A captioned image: uint8 (H, W, 3) RGB and its captions, at least one, none of them empty."""

    image: np.ndarray
    captions: tuple[str, ...]


class Source(Protocol):
    """Captioned images by index; every method may be called from several threads at once."""

    def __len__(self) -> int:
        """How many samples there are, the broken ones included."""

    def __getitem__(self, i: int) -> Sample:
        """Sample i. Raises BrokenSample where it cannot be used, IndexError out of range."""

    def key(self, i: int) -> str:
        """A name of sample i for messages and for splits; it does not depend on the machine."""

    def fields(self, i: int) -> dict[str, Any]:
        """What is known of sample i without decoding its image: `caption` (a list) and its metadata.

        Raises BrokenSample where there is no usable caption.
        """

    def fingerprint(self) -> str:
        """A hash of names, sizes and captions, the same wherever and whenever the files were written."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and validate on, and how a sample becomes one square image with one caption.

    train, val: paths as `open_source` takes them. Without `val`, `val_fraction` of train is kept aside.
    crop: `random`, the training crop of the dVAE, or `square`, the centre. flip: mirror half of the random
        crops; not for captions that say left or right.
    captions: templates over a sample's fields; one without its field is left out. One is drawn, each as
        likely as the other (repeat one to give it weight), then one of the captions that it gives: one for
        each entry of a list. `{caption}` is every line of the caption file, `""` an empty caption.
    weights: regular expressions searched in the captions -> a factor on how often such a sample is visited.
    balance: a field whose groups are visited by the square root of their size.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    val_fraction: float = 0.02
    resolution: int = 64
    crop: str = "random"
    flip: bool = False
    captions: tuple[str, ...] = ("{caption}",)
    weights: dict[str, float] = field(default_factory=dict)
    balance: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise RequestError(f"val_fraction: expected 0 or more and less than 1, got {self.val_fraction}")
        if self.resolution < 1:
            raise RequestError(f"resolution: expected 1 or more pixels, got {self.resolution}")
        if self.crop not in CROPS:
            raise RequestError(f"crop: unknown crop {self.crop!r}: {nearest(self.crop, CROPS)}")
        if not self.captions:
            raise RequestError("captions: expected at least one template, such as '{caption}'")
        for template in self.captions:
            template_fields(template)
        for pattern, factor in self.weights.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise RequestError(f"weights: {pattern!r} is not a regular expression: {error}") from None
            if not (math.isfinite(factor) and factor >= 0):
                raise RequestError(f"weights: expected a factor of 0 or more for {pattern!r}, got {factor}")


class Concat:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.ends = np.cumsum([len(s) for s in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Sample:
        source, i = self._find(i)
        return source[i]

    def key(self, i: int) -> str:
        source, i = self._find(i)
        return source.key(i)

    def fields(self, i: int) -> dict[str, Any]:
        source, i = self._find(i)
        return source.fields(i)

    def fingerprint(self) -> str:
        return digest(source.fingerprint() for source in self.sources)

    def _find(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        n = int(np.searchsorted(self.ends, i, side="right"))
        return self.sources[n], int(i - (self.ends[n - 1] if n else 0))


class BuiltIn:
    """A drawn world, such as the shapes, as a source."""

    def __init__(self, world: Any, name: str) -> None:
        self.world = world
        self.name = name

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        image, captions = self.world[i]
        return Sample(image, tuple(captions))

    def key(self, i: int) -> str:
        return f"{self.name}/{i}"

    def fields(self, i: int) -> dict[str, Any]:
        return {"caption": list(self[i].captions)}

    def fingerprint(self) -> str:
        return self.world.fingerprint()


def open_source(paths: Sequence[str], config: DataConfig) -> Source:
    """One source of everything in `paths`, in that order.

    A path is a folder (images with NAME.txt beside them, or metadata.jsonl / metadata.csv with file_name and
    text; subfolders too), a .tar shard, a glob or a `{0000..0004}` range of those, or a built-in world:
    `shapes`, `shapes:val,length=1000,seed=3`. Raises DataError for a path that is missing, empty or
    unreadable, RequestError for a wrong specification.
    """
    sources = [_open(place, config) for path in paths for place in _expand(path)]
    if not sources:
        raise RequestError(f"no data was given: {EXPECTED}")
    source: Source = sources[0] if len(sources) == 1 else Concat(sources)
    _warn_unknown_fields(source, config.captions)
    return source


def is_shapes(path: str) -> bool:
    """Whether a path asks for the built-in shapes world, not for a file or folder whose name begins like it."""
    return re.match(r"shapes(?![^:,])", path) is not None


def expand_template(template: str, fields: Mapping[str, Any]) -> list[str]:
    """Every caption that a template gives over one sample's fields; none where a field is missing or empty.

    A field that is a list gives one caption for each entry.
    """
    names = template_fields(template)
    choices = []
    for name in names:
        value = fields.get(name)
        entries = value if isinstance(value, (list, tuple)) else [value]
        texts = [str(entry) for entry in entries if entry is not None]
        # JSON can spell half a surrogate pair, which no tokenizer takes
        choices.append([text.encode(errors="replace").decode() for text in texts if text.strip()])
    captions = []
    for chosen in itertools.product(*choices):
        values = dict(zip(names, chosen, strict=True))
        captions.append("".join(text + values.get(name or "", "") for text, name in _parse(template)))
    return captions


def template_fields(template: str) -> list[str]:
    """The names of the fields in a caption template, each once. Raises RequestError for a malformed one."""
    return list(dict.fromkeys(name for _, name in _parse(template) if name is not None))


@functools.lru_cache(maxsize=256)
def _parse(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of a literal text and the name of the field after it, None at the end."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise RequestError(f"captions: template {template!r}: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or "{" in name):
            raise RequestError(f"captions: template {template!r}: expected plain fields like '{{caption}}'")
    return tuple((text, name) for text, name, _, _ in parts)


def caption_lines(text: Any) -> list[str]:
    """The captions in a text, one a line, or in a list of texts. Raises BrokenSample where there are none."""
    if text is None:
        raise BrokenSample("no caption")
    if isinstance(text, (list, tuple)):
        lines = [re.sub(r"[\r\n]+", " ", t) for t in text if isinstance(t, str)]
    else:
        lines = re.split(r"[\r\n]+", str(text))
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise BrokenSample("empty caption")
    try:
        "".join(lines).encode()
    except UnicodeEncodeError:
        raise BrokenSample("caption is not Unicode") from None
    return lines


def decode_text(data: bytes) -> str:
    """UTF-8 text with or without a byte order mark. Raises BrokenSample for anything else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BrokenSample("caption is not Unicode") from None


def digest(parts: Iterable[str | bytes]) -> str:
    """A hash of a sequence of texts and bytes, each told from its neighbours."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def _open(path: str, config: DataConfig) -> Source:
    # Imported here: the readers build on this module.
    from armchair.data.folder import FolderSource
    from armchair.data.tar_shards import TarSource

    if is_shapes(path):
        return _open_shapes(path, config)
    if os.path.isdir(path):
        return FolderSource(Path(path))
    if path.endswith(".tar") and os.path.exists(path):
        return TarSource(Path(path))
    problem = "unknown kind of file" if os.path.exists(path) else "no such file or folder"
    raise DataError(f"{path}: {problem}; {EXPECTED}")


def _open_shapes(spec: str, config: DataConfig) -> Source:
    head, *settings = spec.split(",")
    _, _, split = head.partition(":")
    values = {"length": 20_000, "seed": 0}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in values:
            raise RequestError(f"{spec}: unknown setting {name!r}: {nearest(name, values)}")
        if not value.isdecimal():
            raise RequestError(f"{spec}: expected a whole number for {name}, got {value!r}")
        values[name] = int(value)
    split = split or "train"
    from armchair.shapes.world import ShapesSource

    world = ShapesSource(values["length"], seed=values["seed"], split=split, resolution=config.resolution)
    if len(world) == 0:
        raise DataError(f"{spec}: expected a length of 1 or more")
    return BuiltIn(world, f"shapes:{split},seed={values['seed']}")


def _expand(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.exists(path):
        return [path]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = braces.groups()
        if int(last) < int(first):
            raise DataError(f"{path}: expected a range from low to high, such as {{0000..0004}}")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        head, tail = path[: braces.start()], path[braces.end() :]
        return [found for number in numbers for found in _expand(head + number + tail)]
    if glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise DataError(f"{path}: nothing matches; {EXPECTED}")
        return found
    return [path]


def _warn_unknown_fields(source: Source, templates: Sequence[str]) -> None:
    """A misspelt field would leave its template out without a word: look for it in the first samples."""
    names = {name for template in templates for name in template_fields(template)} - {"caption"}
    seen = {"caption"}
    for i in range(min(len(source), 100) if names else 0):
        try:
            seen.update(source.fields(i))
        except BrokenSample:
            continue
    for name in sorted(names - seen):
        logger.warning("caption field %r is in none of the first samples: %s", name, nearest(name, seen))
