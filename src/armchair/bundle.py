"""Bundles: trained models on disk, a directory or a `.zip` of one. Every byte read is checked; no pickle."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch

from armchair.config import nearest
from armchair.errors import BundleError, RequestError, WorkError

FORMAT_VERSION = 1
PARTS = ("image_tokenizer", "prior", "ranker")
DEFAULT = "emoji"

_INDEX = "bundle.json"
_CARD = "card.md"
_TEXT_TOKENIZER = "text_tokenizer.json"
_WEIGHTS = {part: f"{part}.safetensors" for part in PARTS}
_NAMES = (_INDEX, _CARD, _TEXT_TOKENIZER, *_WEIGHTS.values())
_OWN_FIELDS = ("format_version", "files", "digest")
_MAX_TEXT = 64 << 20  # bytes of bundle.json, card.md or text_tokenizer.json
_MAX_RATIO = 100  # unpacked to packed, of a zip member over _MAX_TEXT; weights hardly shrink

_BUNDLED = Path(__file__).parent / "bundles"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What zipfile raises on damaged, encrypted or oddly packed archives.
_ZIP_DEFECTS = (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, struct.error, zlib.error)


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle as `read_bundle` found it.

    `info` is what bundle.json holds beside its bookkeeping: recipe, metrics, data, licences, versions.
    `fingerprint` (sha256, hex) covers all of the bundle and is the same for a directory and its zip.
    """

    name: str
    path: Path
    info: dict[str, Any]
    card: str
    fingerprint: str
    text_tokenizer: str | None
    parts: tuple[str, ...]
    _files: "_Files" = dataclasses.field(repr=False)

    def weight_bytes(self) -> int:
        """The size of all weights as they lie in the bundle."""
        return sum(self._files.size(_WEIGHTS[part]) for part in self.parts)

    def weights(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of `image_tokenizer`, `prior` or `ranker`, on the CPU, read and verified now.

        Raises BundleError where the bundle has no such part, or the file is not the one that was written.
        """
        if part not in self.parts:
            raise BundleError(
                f"{self.path}: no {part!r} in this bundle; it has {', '.join(self.parts) or 'none'}"
            )
        name = _WEIGHTS[part]
        try:
            if self.path.is_file():
                return safetensors.torch.load(self._files.read(name))
            self._files.verify(name)
            return safetensors.torch.load_file(self.path / name)  # mapped: no second copy in memory
        except (safetensors.SafetensorError, KeyError, OSError) as error:
            raise BundleError(f"{self.path}: {name} is not a safetensors file: {error}") from None


def write_bundle(
    out: Path,
    *,
    info: Mapping[str, Any],
    card: str,
    text_tokenizer: str | None,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Write a bundle to the directory `out`, or to the file `out` if it ends in `.zip`.

    `info` is JSON data; `weights` maps `image_tokenizer`, `prior` and `ranker` to tensors. A bundle that is
    there is replaced, and stays readable whenever the machine stops. Raises RequestError where `out` holds
    anything else or cannot be written, and WorkError on a full disk.
    """
    out = Path(os.path.realpath(out))  # behind a link, the directory is replaced and not the link
    zipped = out.suffix.lower() == ".zip"
    _check_replaceable(out, zipped)
    if clash := set(info) & set(_OWN_FIELDS):
        raise RequestError(f"bundle info: the fields {sorted(clash)} are set by write_bundle")
    if unknown := set(weights) - set(PARTS):
        raise RequestError(f"bundle weights: unknown part {min(unknown)!r}: {nearest(min(unknown), PARTS)}")
    new = out.parent / f".{out.name}.{uuid.uuid4().hex}.new"
    try:
        new.mkdir(parents=True)
        _write_files(new, info, card, text_tokenizer, weights)
        if zipped:
            packed = new / "packed"
            _pack(new, packed)
            os.replace(packed, out)
        else:
            _swap_in(new, out)
        _sync(out.parent)
    except OSError as error:
        kind = WorkError if error.errno in (errno.ENOSPC, errno.EDQUOT) else RequestError
        raise kind(f"cannot write bundle {out}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise WorkError(f"cannot write bundle {out}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_bundle(path: str | Path) -> Bundle:
    """Open a bundle (a directory or a zip) and verify all of it but the weights, which `weights` verifies.

    Raises BundleError, naming the file, for one that is missing, cut short, altered, or of another version.
    """
    path = Path(path)
    place = _place(path.absolute())  # weights are read later, perhaps from another working directory
    if place is None:
        raise BundleError(f"no bundle at {path}: no such file or directory")
    files = _Files(place)
    names = files.names()
    if _INDEX not in names:
        raise BundleError(f"{path}: not a bundle: it has no {_INDEX}")
    index = _parse_index(files.read(_INDEX), f"{path}: {_INDEX}")
    files.expected = index["files"]
    for name in sorted(names ^ {_INDEX, *index["files"]}):
        state = "missing" if name in index["files"] else f"not listed in {_INDEX}"
        raise BundleError(f"{path}: {name} is {state}")
    for name in index["files"]:
        files.check_size(name)
    info = {k: v for k, v in index.items() if k not in _OWN_FIELDS}
    own_name = info.get("name")
    return Bundle(
        name=own_name if isinstance(own_name, str) else path.stem if place.is_file() else path.resolve().name,
        path=place,
        info=info,
        card=files.text(_CARD),
        fingerprint=index["digest"],
        text_tokenizer=files.text(_TEXT_TOKENIZER) if _TEXT_TOKENIZER in names else None,
        parts=tuple(part for part in PARTS if _WEIGHTS[part] in names),
        _files=files,
    )


def find_bundle(model: str | None) -> Path:
    """The place of a bundle: the bundled default for None, a path, a bundled name or a hub id `org/name`.

    A hub bundle is downloaded unless it is in the local cache. Raises BundleError where there is none.
    """
    bundled = bundled_names()
    if model is None:
        if DEFAULT not in bundled:
            raise BundleError("no bundled model in this installation: name a bundle directory, zip or hub id")
        return _BUNDLED / DEFAULT
    path = Path(os.path.expanduser(model))
    # A folder of pictures called `emoji` must not hide the bundled model of that name.
    if model in bundled and not os.path.exists(path / _INDEX):
        return _BUNDLED / model
    if model and _place(path) is not None:
        return path
    if _HUB_ID.fullmatch(model):
        return _download(model)
    names = nearest(model, bundled) if bundled else "this installation has no bundled model"
    raise BundleError(f"no model {model!r}: not a path, a bundled name or a hub id; {names}")


def bundled_names() -> list[str]:
    """The models that come with this installation."""
    return sorted(index.parent.name for index in _BUNDLED.glob(f"*/{_INDEX}"))


class _Files:
    """The files of a bundle in a directory or a zip, each read against the size and sha256 in `expected`."""

    def __init__(self, place: Path):
        self.place = place
        self.expected: dict[str, dict[str, Any]] = {}

    def names(self) -> set[str]:
        if self.place.is_dir():
            return {name for name in _NAMES if os.path.isfile(self.place / name)}
        with self._zip() as archive:
            members = archive.infolist()
            names = [m.filename for m in members]
            for m in members:
                if m.filename not in _NAMES or names.count(m.filename) > 1:
                    raise BundleError(f"{self.place}: unexpected {m.filename!r} in the zip of a bundle")
                if m.file_size > _MAX_TEXT and m.file_size > _MAX_RATIO * m.compress_size:
                    raise BundleError(
                        f"{self.place}: {m.filename} would unpack to {m.file_size} bytes, refused"
                    )
            return set(names)

    def size(self, name: str) -> int:
        if self.place.is_dir():
            return (self.place / name).stat().st_size
        with self._zip() as archive:
            return archive.getinfo(name).file_size

    def check_size(self, name: str) -> None:
        size, expected = self.size(name), self.expected[name]["bytes"]
        if size != expected:
            state = "cut short" if size < expected else "altered"
            raise BundleError(f"{self.place}: {name} is {state}: {size} bytes, expected {expected}")
        if name not in _WEIGHTS.values() and size > _MAX_TEXT:
            raise BundleError(f"{self.place}: {name} has {size} bytes, expected at most {_MAX_TEXT}")

    def read(self, name: str) -> bytes:
        limit = self.expected[name]["bytes"] if name in self.expected else _MAX_TEXT
        with self._open(name) as file:
            data = file.read(limit + 1)  # a zip can unpack to more than it says
        if len(data) > limit:
            raise BundleError(f"{self.place}: {name} has more than {limit} bytes")
        if name in self.expected:
            self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError:
            raise BundleError(f"{self.place}: {name} is not UTF-8 text") from None

    def verify(self, name: str) -> None:
        with self._open(name) as file:
            self._compare(name, hashlib.file_digest(file, "sha256").hexdigest())  # type: ignore[arg-type]

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.expected[name]["sha256"]:
            raise BundleError(f"{self.place}: {name} is altered: its sha256 is not the one in {_INDEX}")

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            if self.place.is_dir():
                with open(self.place / name, "rb") as file:
                    yield file
            else:
                with self._zip() as archive, archive.open(name) as member:
                    yield member
        except OSError as error:
            raise BundleError(f"{self.place}: cannot read {name}: {error.strerror or error}") from None

    @contextlib.contextmanager
    def _zip(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.place) as archive:
                yield archive
        except BundleError:
            raise
        except OSError as error:
            raise BundleError(f"cannot read bundle {self.place}: {error.strerror or error}") from None
        except _ZIP_DEFECTS as error:
            raise BundleError(
                f"{self.place}: not a bundle directory, nor a whole zip of one: {error}"
            ) from None


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _render(index: Mapping[str, Any]) -> bytes:
    return (json.dumps(index, indent=2, allow_nan=False) + "\n").encode()


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in index.items() if k != "digest"})).hexdigest()


def _parse_index(data: bytes, where: str) -> dict[str, Any]:
    try:
        index = json.loads(data)
        if not isinstance(index, dict):
            raise ValueError("expected an object")
        version = index.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(f"{where}: format version {version!r}, this armchair reads {FORMAT_VERSION}")
        # Comparing the bytes too finds changes that JSON does not see, such as a space that became a tab.
        whole = index.get("digest") == _digest(index) and data == _render(index)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{where} is cut short or altered: not JSON: {error}") from None
    if not whole:
        raise BundleError(f"{where} is altered: its contents do not match its digest")
    files = index.get("files")
    if not isinstance(files, dict) or _CARD not in files or not all(map(_is_entry, files.items())):
        raise BundleError(
            f"{where}: expected 'files' to give sha256 and bytes of {_CARD} and other known files"
        )
    return index


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    return (
        name in _NAMES
        and name != _INDEX
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        and entry["bytes"] >= 0
    )


def _check_replaceable(out: Path, zipped: bool) -> None:
    if zipped:
        if out.exists() and not out.is_file():
            raise RequestError(f"cannot write bundle {out}: it is a directory")
    elif out.is_dir():
        others = sorted({child.name for child in out.iterdir()} - set(_NAMES))
        if others:
            raise RequestError(f"cannot write bundle {out}: it holds {others[0]!r}, which would be lost")
    elif out.exists():
        raise RequestError(f"cannot write bundle {out}: it is a file; use a directory or a name in .zip")


def _write_files(
    folder: Path,
    info: Mapping[str, Any],
    card: str,
    text_tokenizer: str | None,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    (folder / _CARD).write_bytes(card.encode("utf-8", "replace"))
    if text_tokenizer is not None:
        (folder / _TEXT_TOKENIZER).write_bytes(text_tokenizer.encode())
    for part, tensors in weights.items():
        # Copies, because safetensors refuses tensors that share memory, such as tied weights.
        whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        safetensors.torch.save_file(whole, folder / _WEIGHTS[part])
    files = {}
    for name in _NAMES:
        if (folder / name).exists():
            with open(folder / name, "r+b") as file:  # writable, as fsync on Windows asks
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
                files[name] = {"sha256": digest, "bytes": file.tell()}
    try:
        index = json.loads(_canonical({"format_version": FORMAT_VERSION, **info, "files": files}))
    except (TypeError, ValueError) as error:
        raise RequestError(f"bundle info is not JSON data: {error}") from None
    index["digest"] = _digest(index)
    with open(folder / _INDEX, "wb") as file:
        file.write(_render(index))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _pack(folder: Path, packed: Path) -> None:
    """A zip with the same bytes for the same files: stored, in a fixed order, without times or owners."""
    with open(packed, "xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in _NAMES:
                if (folder / name).exists():
                    member = zipfile.ZipInfo(name)
                    member.create_system, member.external_attr = 3, 0o100644 << 16
                    member.file_size = (folder / name).stat().st_size
                    with open(folder / name, "rb") as source, archive.open(member, "w") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _swap_in(new: Path, out: Path) -> None:
    """Put `new` in the place of `out`. Wherever this stops, `out` or else `_aside(out)` is whole."""
    aside = _aside(out)
    if out.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(out, aside)
    os.rename(new, out)
    _sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _place(path: Path) -> Path | None:
    """Where to read the bundle of `path`: there, or the copy that an interrupted `_swap_in` left aside."""
    try:
        places = path, _aside(Path(os.path.realpath(path)))
    except ValueError:  # a null byte
        return None
    return next((p for p in places if os.path.exists(p)), None)  # Path.exists can raise, on a long name say


def _sync(folder: Path) -> None:
    """Make renames and new names in `folder` last, where the system can (Windows opens no directories)."""
    if os.name != "nt":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BundleError(f"no path {hub_id!r}; for the hub, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_NAMES)))
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"no path {hub_id!r}, and not to be had from the Hugging Face hub: {reason}"
        ) from None
