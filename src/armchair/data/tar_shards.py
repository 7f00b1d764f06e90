"""WebDataset tar shards as img2dataset writes them: KEY.jpg|png|webp, KEY.txt, KEY.json. Never unpacked."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armchair.data.sources import IMAGE_SUFFIXES, Sample, caption_lines, decode_text, digest
from armchair.errors import DataError
from armchair.image.pixels import BrokenSample, read_image

IMAGE, TEXT, JSON = 0, 2, 4  # columns of a sample's (offset, size) pairs
ABSENT = -1
BLOCK = 512


class _Index(NamedTuple):
    keys: list[str]
    spans: np.ndarray  # int64 (N, 6): offset and size of image, text and JSON; an offset of ABSENT for none
    cut: bool  # the last sample is the one at which the file was cut short


class TarSource:
    """One shard as a `Source`, in the order of its members.

    One pass over the headers finds every member; samples are then read at their offsets, from any thread.
    A shard that was cut short gives its whole samples, then one broken sample with the cause "cut tar".
    Raises DataError for a file that is no tar or holds no samples.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._index = _read_index(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not self._index.keys:
            raise DataError(f"{path}: no images here, expected KEY.jpg|png|webp with KEY.txt or KEY.json")

    def __len__(self) -> int:
        return len(self._index.keys)

    def __getitem__(self, i: int) -> Sample:
        captions = self.fields(i)["caption"]
        image = self._read(i, IMAGE)
        if image is None:
            raise BrokenSample("no image")
        return Sample(read_image(image), tuple(captions))

    def key(self, i: int) -> str:
        return f"{self.path.name}/{self._index.keys[i]}"

    def fields(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self._index.cut and i == len(self) - 1:
            raise BrokenSample("cut tar")
        text, data = self._read(i, TEXT), self._read(i, JSON)
        fields: Any = {}
        if data is not None:
            try:
                fields = json.loads(data)
            except (ValueError, RecursionError):
                fields = None
            if not isinstance(fields, dict):
                raise BrokenSample("damaged JSON")
        caption = decode_text(text) if text is not None else fields.get("caption")
        return {**fields, "caption": caption_lines(caption)}

    def fingerprint(self) -> str:
        parts: list[str | bytes] = []
        for i, key in enumerate(self._index.keys):
            parts += [key, str(self._index.spans[i, IMAGE + 1])]
            parts += [self._read(i, TEXT) or b"", self._read(i, JSON) or b""]
        return digest(parts)

    def _read(self, i: int, part: int) -> bytes | None:
        offset, size = self._index.spans[i, part : part + 2].tolist()
        if offset == ABSENT:
            return None
        # Opened for each read: thousands of shards would run out of descriptors.
        fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            data = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        if len(data) != size:
            raise BrokenSample("cut tar")
        return data


def _read_index(path: Path) -> _Index:
    samples: dict[str, list[int]] = {}
    file_size = path.stat().st_size
    end = 0  # of the last whole member
    cut_key = None
    if file_size >= BLOCK:
        try:
            with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as tar:
                while (member := tar.next()) is not None:
                    if member.offset_data + member.size > file_size:
                        cut_key = _split_name(member.name)[0]
                        break
                    end = tar.offset
                    _add(samples, member)
        except (tarfile.TarError, ValueError, IndexError, OverflowError):
            pass  # a damaged header: whatever comes after it is lost, as after a cut

    with path.open("rb") as file:
        if end == 0 and file_size >= BLOCK and file.read(BLOCK)[257:262] not in (b"ustar", bytes(5)):
            raise DataError(f"{path}: not a tar file")
        file.seek(end)
        cut = file.read(BLOCK) != bytes(BLOCK)  # a whole tar ends in blocks of zeros
    if cut:
        key = cut_key if cut_key is not None else _unfinished(samples)
        samples[key] = samples.pop(key, [ABSENT, 0] * 3)
    return _Index(list(samples), np.array(list(samples.values()), dtype=np.int64).reshape(-1, 6), cut)


def _add(samples: dict[str, list[int]], member: tarfile.TarInfo) -> None:
    key, suffix = _split_name(member.name)
    part = IMAGE if suffix in IMAGE_SUFFIXES else {".txt": TEXT, ".json": JSON}.get(suffix)
    if part is None or not member.isreg() or member.issparse() or os.path.basename(key) == "":
        return
    spans = samples.setdefault(key, [ABSENT, 0] * 3)
    if spans[part] == ABSENT:
        spans[part : part + 2] = member.offset_data, member.size


def _split_name(name: str) -> tuple[str, str]:
    """The key and the suffix: WebDataset parts them at the first dot of the file's own name."""
    folder, file = os.path.split(name.removeprefix("./"))
    stem, dot, suffix = file.partition(".")
    return os.path.join(folder, stem), (dot + suffix).lower()


def _unfinished(samples: dict[str, list[int]]) -> str:
    """The key of the sample at which a shard was cut between two members: the last, if it lacks a part."""
    if samples:
        first, (key, last) = next(iter(samples.values())), next(reversed(samples.items()))
        whole = last[IMAGE] != ABSENT and (last[TEXT] != ABSENT or last[JSON] != ABSENT)
        if not whole or any(last[p] == ABSENT != first[p] for p in (IMAGE, TEXT, JSON)):
            return key
    return "(cut)"
