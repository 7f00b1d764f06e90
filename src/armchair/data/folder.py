"""Captioned images in a folder: NAME.txt beside each image, or a metadata table (as imagefolder has it)."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from armchair.data.sources import IMAGE_SUFFIXES, Sample, caption_lines, decode_text, digest
from armchair.errors import DataError
from armchair.image.pixels import BrokenSample, read_image


class FolderSource:
    """A folder and its subfolders as a `Source`, in the order of the relative paths.

    A folder may hold `metadata.jsonl` or `metadata.csv` with `file_name` (relative to it), `text` and any
    other fields; an image that no row names has its captions in NAME.txt, one a line. Files and folders whose
    names begin with a dot are passed over. Raises DataError where there are no images or the table cannot be
    read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        names: set[str] = set()
        self._rows: dict[str, dict[str, Any]] = {}
        shards = False
        for folder, subfolders, files in os.walk(root, onerror=_refuse):
            subfolders[:] = [s for s in subfolders if not s.startswith(".")]
            files = [f for f in files if not f.startswith(".")]
            shards |= any(f.endswith(".tar") for f in files)
            here = Path(folder).relative_to(root)
            names.update(str(here / f) for f in files if f.lower().endswith(IMAGE_SUFFIXES))
            for table in sorted({"metadata.jsonl", "metadata.csv"} & set(files)):
                for row in _read_table(Path(folder) / table):
                    name = os.path.normpath(here / row["file_name"])
                    text = row.get("text")
                    texts = text if isinstance(text, list) else [] if text is None else [text]
                    # an image named in several rows has the captions of all of them
                    self._rows[name] = {**row, "text": [*self._rows.get(name, {}).get("text", []), *texts]}
        self._names = sorted(names | self._rows.keys())
        if not self._names:
            hint = f"; for its shards give {root}/*.tar" if shards else ""
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{root}: no images here, expected {suffixes} files with captions{hint}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Sample:
        captions = self.fields(i)["caption"]
        return Sample(read_image(self.root / self._names[i]), tuple(captions))

    def key(self, i: int) -> str:
        return self._names[i]

    def fields(self, i: int) -> dict[str, Any]:
        if i < 0:
            raise IndexError(i)
        name = self._names[i]
        row = self._rows.get(name)
        if row is not None:
            return {**row, "caption": caption_lines(row["text"] or None)}
        try:
            text = decode_text((self.root / name).with_suffix(".txt").read_bytes())
        except FileNotFoundError:
            raise BrokenSample("no caption") from None
        except OSError:
            raise BrokenSample("unreadable file") from None
        return {"caption": caption_lines(text)}

    def fingerprint(self) -> str:
        return digest(part for i in range(len(self)) for part in self._identity(i))

    def _identity(self, i: int) -> Iterator[str]:
        yield self._names[i]
        try:
            yield str((self.root / self._names[i]).stat().st_size)
            yield json.dumps(self.fields(i), sort_keys=True, default=str)
        except (OSError, ValueError):
            yield "missing"
        except BrokenSample as broken:
            yield broken.cause


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot read this folder: {error.strerror}") from None


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows: list[Any] = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{path}: row {number} has no file_name; expected the fields file_name and text")
        row.pop(None, None)  # cells beyond the header of a CSV
    if rows and not any("text" in row for row in rows):
        raise DataError(f"{path}: no row has a text; expected the fields file_name and text")
    return rows
