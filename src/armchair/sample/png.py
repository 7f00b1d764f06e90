"""Pictures on disk: PNG files that carry the record they can be drawn again from."""

import errno
import io
import json
import os
import unicodedata
import uuid
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from armchair.errors import RequestError, WorkError

KEYWORD = "armchair"  # of the iTXt chunk
MAX_RECORD = 4 << 20  # bytes of JSON; 64 x 64 codes take some 25 kB

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
# Names that Windows keeps for devices.
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}


def save_png(image: Image.Image, path: Path, record: dict[str, Any], *, force: bool = False) -> None:
    """Write `image` with `record` (JSON data) in an iTXt chunk, in one step; folders are made as needed.

    Raises RequestError where the file is there already (without `force`) or cannot be written, and WorkError
    on a full disk.
    """
    try:
        png = png_bytes(image, record)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    temporary = path.parent / f".armchair-{uuid.uuid4().hex}.tmp"
    reserved = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(png)
            file.flush()
            os.fsync(file.fileno())
        if not force:
            # Take the name first: unlike a hard link, this works on every file system.
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                raise RequestError(f"{path} is there already: choose another name, or --force") from None
            reserved = True
        os.replace(temporary, path)
    except OSError as error:
        kind = WorkError if error.errno in (errno.ENOSPC, errno.EDQUOT) else RequestError
        raise kind(f"cannot write {path}: {error.strerror}") from None
    finally:
        if os.path.exists(temporary):
            temporary.unlink()
            if reserved:
                path.unlink()


def png_bytes(image: Image.Image, record: dict[str, Any] | None) -> bytes:
    """A PNG file with `record` in it, or without one. Raises RequestError for a record that is too large."""
    info = PngInfo()
    if record is not None:
        text = json.dumps(record, separators=(",", ":"))  # ASCII, so that any prompt fits, lone surrogates too
        if len(text) > MAX_RECORD:
            raise RequestError(f"the record has {len(text)} bytes, at most {MAX_RECORD} fit in a picture")
        info.add_itxt(KEYWORD, text)
    png = io.BytesIO()
    image.save(png, "PNG", pnginfo=info)
    return png.getvalue()


def read_record(path: Path) -> dict[str, Any]:
    """The record inside a PNG that `save_png` wrote; the picture itself is not decoded.

    Raises RequestError where the file cannot be read, is no PNG, or has no record or a damaged one.
    """
    try:
        with open(path, "rb") as file:
            return record_in(file, path)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None


def record_in(file: BinaryIO, path: str | Path) -> dict[str, Any]:
    """The same of an open file, which errors call `path`."""
    text = _find_record(file, path)
    if text is None:
        raise RequestError(f"{path}: no armchair metadata; only an unedited PNG that armchair wrote has it")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise RequestError(f"{path}: its armchair metadata is damaged (not a JSON object)")
    return record


def output_paths(out: Path, name: str, count: int) -> list[Path]:
    """Where `count` pictures go: `out` if it ends in .png, else `name` (as a slug) in the folder `out`.

    One picture is NAME.png, more are NAME-01.png, NAME-02.png, …. Raises RequestError for another format.
    """
    if count < 1:
        raise RequestError(f"expected at least one picture to write, got {count}")
    if out.is_dir() or out.suffix.lower() != ".png":
        if not out.is_dir() and out.suffix.lower() in _OTHER_FORMATS:
            raise RequestError(f"{out}: pictures are written as PNG; use {out.with_suffix('.png')}")
        out = out / f"{slug(name)}.png"
    if count == 1:
        return [out]
    digits = max(2, len(str(count)))
    return [out.with_name(f"{out.stem}-{i:0{digits}}{out.suffix}") for i in range(1, count + 1)]


def slug(prompt: str) -> str:
    """A file name (no suffix) of at most 60 letters, marks, digits and hyphens, from any prompt."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    text = unicodedata.normalize("NFC", text)
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    name = "-".join(words)[:60].rstrip("-")
    if not name:
        return "image"
    return f"{name}-image" if name in _DEVICE_NAMES else name


def _find_record(file: BinaryIO, path: str | Path) -> bytes | None:
    if file.read(8) != _SIGNATURE:
        raise RequestError(f"{path}: not a PNG")
    while header := file.read(8):
        size, kind = int.from_bytes(header[:4]), header[4:]
        if kind == b"IEND":
            return None
        body = file.read(min(size, len(KEYWORD) + 1)) if kind == b"iTXt" else b""
        if body != KEYWORD.encode() + b"\0":
            file.seek(size - len(body) + 4, os.SEEK_CUR)
            continue
        if size > 2 * MAX_RECORD:
            raise RequestError(f"{path}: its armchair metadata is too large ({size} bytes)")
        body += file.read(size - len(body))
        if len(body) != size or file.read(4) != zlib.crc32(kind + body).to_bytes(4):
            raise RequestError(f"{path}: its armchair metadata is damaged (wrong checksum)")
        return _text_of(body[len(KEYWORD) + 1 :], path)
    raise RequestError(f"{path}: the PNG is cut short")


def _text_of(body: bytes, path: str | Path) -> bytes:
    """The text of an iTXt body whose keyword is cut off: flag, method, language, 0, translation, 0, text."""
    compressed, _, text = body[:1], body[1:2], body[2:].split(b"\0", 2)[-1]
    if compressed == b"\1":  # other programs may compress the chunk when they save the file again
        try:
            text = zlib.decompressobj().decompress(text, MAX_RECORD + 1)
        except zlib.error:
            raise RequestError(f"{path}: its armchair metadata is damaged (broken compression)") from None
    if len(text) > MAX_RECORD:
        raise RequestError(f"{path}: its armchair metadata has more than {MAX_RECORD} bytes")
    return text
