"""The set `emoji`: about 20,000 captioned icons in nine styles, built from published, openly licensed packages.

    build_emoji(OUT)    OUT/train-0000.tar …, val-0000.tar, heldout-0000.tar    WebDataset shards: KEY.webp, .txt, .json
                        OUT/heldout.json     the pairs of label and style that are kept from training
                        OUT/LICENCES.md      whose pictures they are, and on what terms
                        OUT/index.json       what it was built from, counts, and the digest of each shard

Packages come through `npm pack`, in the versions and with the digests of the table below; each icon is drawn by resvg
at twice the size and averaged down. The same packages give the same bytes. What is done stays done: packages in
OUT/.packages, drawn icons in OUT/.work until all of them are.
"""

import base64
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from armchair.data.emoji_heldout import HELDOUT, split_of
from armchair.data.emoji_names import Meaning, Names, caption_lines, own_name, read_names
from armchair.errors import RequestError, WorkError

logger = logging.getLogger(__name__)

SIZE = 128  # pixels on a side
QUALITY = 90  # of WebP
SHARD = 4000  # pictures
CHUNK = 64  # icons that are drawn in one go, and kept together
MAX_BROKEN = 0.01
SPLITS = ("train", "val", "heldout")
RENDERER = "resvg_py"
INDEX, SETTINGS, NOTICES, PAIRS = "index.json", "settings.json", "LICENCES.md", "heldout.json"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A published package. integrity: of its archive, as npm writes it."""

    name: str
    version: str
    integrity: str
    licence: str
    credit: str

    @property
    def archive(self) -> str:
        """What `npm pack` calls the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True, kw_only=True)
class IconPackage(Package):
    """A package of icons in Iconify's JSON.

    style: what captions call it; manner: how it looks, as anybody would say it; cldr: its icons are emoji, with
    the names of such; squeezed: it writes names without hyphens.
    """

    style: str
    manner: str
    cldr: bool = True
    squeezed: bool = False

    @property
    def prefix(self) -> str:
        return self.name.rpartition("/")[2]


CAPTIONS = Package(
    name="emojibase-data",
    version="17.0.0",
    integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    licence="MIT",
    credit="emojibase-data (CLDR names and keywords), Miles Johnson",
)
PACKAGES = (
    IconPackage(
        style="noto emoji",
        manner="shaded style",
        name="@iconify-json/noto",
        version="1.2.9",
        integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        licence="Apache-2.0",
        credit="Noto Emoji, Google Inc.",
    ),
    IconPackage(
        style="noto v1 emoji",
        manner="flat style",
        name="@iconify-json/noto-v1",
        version="1.2.5",
        integrity="sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        licence="Apache-2.0",
        credit="Noto Emoji (v1), Google Inc.",
    ),
    IconPackage(
        style="twemoji",
        manner="flat style",
        name="@iconify-json/twemoji",
        version="1.2.5",
        integrity="sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        licence="CC-BY-4.0",
        credit="Twemoji, Twitter, Inc and other contributors",
    ),
    IconPackage(
        style="fluent color emoji",
        manner="shaded style",
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        integrity="sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        licence="MIT",
        credit="Fluent Emoji, Microsoft Corporation",
    ),
    IconPackage(
        style="fluent flat emoji",
        manner="flat style",
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        licence="MIT",
        credit="Fluent Emoji, Microsoft Corporation",
    ),
    IconPackage(
        style="emojione v2 emoji",
        manner="flat style",
        name="@iconify-json/emojione",
        version="1.2.3",
        integrity="sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        licence="CC-BY-4.0",
        credit="Emoji One (EmojiTwo), the Emoji One and EmojiTwo authors",
    ),
    IconPackage(
        style="firefox os emoji",
        manner="flat style",
        squeezed=True,
        name="@iconify-json/fxemoji",
        version="1.2.2",
        integrity="sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        licence="Apache-2.0",
        credit="Firefox OS Emoji, Mozilla",
    ),
    IconPackage(
        style="streamline emoji",
        manner="outlined style",
        name="@iconify-json/streamline-emojis",
        version="1.2.4",
        integrity="sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        licence="CC-BY-4.0",
        credit="Streamline Emojis, Streamline",
    ),
    IconPackage(
        style="flat color icon",
        manner="flat style",
        cldr=False,
        name="@iconify-json/flat-color-icons",
        version="1.2.3",
        integrity="sha512-KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
        licence="MIT",
        credit="Flat Color Icons, Icons8",
    ),
)
# Whose lists of names are asked for the icons of the others, the most trusted first.
LISTING = ("fluent-emoji-flat", "noto", "twemoji")
# The tricolour once more, which is there as France, Clipperton Island, and Wallis and Futuna.
LEFT_OUT = {("emojione", "flag-for-st-martin")}


@dataclass(frozen=True)
class Picture:
    """A picture of the set, before it is in a shard."""

    key: str
    split: str
    package: IconPackage
    icon: str
    meaning: Meaning
    pixels: str  # sha256 of the RGB bytes
    chunk: Path


def build_emoji(
    out: Path,
    *,
    size: int = SIZE,
    cache: Path | None = None,
    workers: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Build the set in the folder `out`, or go on with what is there; the contents of `index.json`.

    size: pixels on a side; cache: where packages are kept (default: `out`/.packages); workers: processes that
    draw (default: one a core); say: takes a line of progress. Raises RequestError where npm or the renderer is not
    installed, or where `out` holds a set that was built otherwise, unless `force`; WorkError where a package cannot be
    fetched or is not what was published, and for too many broken icons.
    """
    settings = _settings(size)
    work = out / ".work"
    _check_target(out, settings, force)
    if (done := _finished(out, settings)) is not None:
        say(f"{out} is built already, and every shard is whole")
        return done
    work.mkdir(parents=True, exist_ok=True)
    _write(work / SETTINGS, json.dumps(settings, indent=1) + "\n")
    archives = _fetch(cache or out / ".packages", say)
    names = _names(archives)
    chunks = _draw(archives, work, settings, workers, say)
    pictures, left_out = _choose(archives, names, chunks)
    if not pictures:
        raise WorkError("none of the packages has an icon that can be drawn and named")
    shards = {split: _write_shards(out, split, [p for p in pictures if p.split == split]) for split in SPLITS}
    wanted = [held._asdict() for held in HELDOUT]
    _write(out / PAIRS, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
    counts = {split: Counter(p.package.style for p in pictures if p.split == split) for split in SPLITS}
    _write(out / NOTICES, _notices(counts, size))
    index = {
        "settings": settings,
        "images": {split: sum(counts[split].values()) for split in SPLITS},
        "styles": {p.style: {split: counts[split][p.style] for split in SPLITS} for p in PACKAGES},
        "left_out": left_out,
        "shards": {name: digest for split in SPLITS for name, digest in shards[split].items()},
    }
    _write(out / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
    for old in out.glob("*.tar"):
        if _is_shard(old.name) and old.name not in index["shards"]:
            old.unlink()
    shutil.rmtree(work)
    return index


def _settings(size: int) -> dict[str, Any]:
    """All that the bytes of the set depend on."""
    try:
        renderer = metadata.version(RENDERER)
    except metadata.PackageNotFoundError:
        raise RequestError("the icons are drawn by resvg-py: pip install 'armchair[data]'") from None
    return {
        "size": size,
        "quality": QUALITY,
        "renderer": f"{RENDERER} {renderer}",
        "encoder": f"pillow {metadata.version('pillow')}",
        "packages": [f"{p.name} {p.version} {p.integrity}" for p in (*PACKAGES, CAPTIONS)],
    }


def _check_target(out: Path, settings: dict[str, Any], force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; --out names a folder")
    if force or not out.is_dir():
        return
    found = _read_json(out / ".work" / SETTINGS) or (_read_json(out / INDEX) or {}).get("settings")
    if found is not None and found != settings:
        other = [name for name, value in settings.items() if found.get(name) != value]
        raise RequestError(
            f"{out} holds a set with another {' and '.join(other)}: choose another folder, or --force to build it anew"
        )
    if found is None and (foreign := sorted(n for n in os.listdir(out) if _is_shard(n) or n in (INDEX, PAIRS))):
        raise RequestError(f"{out} holds another {foreign[0]}: choose another folder, or --force to replace it")


def _is_shard(name: str) -> bool:
    return re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{4,}}\.tar", name) is not None


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    index = _read_json(out / INDEX)
    if index is None or index.get("settings") != settings:
        return None
    if not all((out / name).is_file() for name in (PAIRS, NOTICES)):
        return None
    for name, digest in index["shards"].items():
        if not (out / name).is_file() or _sha256(out / name) != digest:
            return None
    return index


# Packages.


def _fetch(cache: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Name of each package -> its archive, fetched if it is not in `cache`, and checked."""
    packages = (*PACKAGES, CAPTIONS)
    archives = {package.name: cache / package.archive for package in packages}
    missing = [p for p in packages if not archives[p.name].exists() or _integrity(archives[p.name]) != p.integrity]
    if not missing:
        return archives
    npm = shutil.which("npm")
    if npm is None:
        raise RequestError("the icons are fetched by npm, which is not installed here (it comes with Node.js)")
    cache.mkdir(parents=True, exist_ok=True)
    for i, package in enumerate(missing, start=1):
        say(f"fetching {package.name} {package.version}, {i} of {len(missing)}")
        # In a folder of its own: npm looks around for a package where it runs.
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as folder:
            done = subprocess.run(
                [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel=error"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
            )
            fetched = Path(folder) / package.archive
            if done.returncode != 0 or not fetched.exists():
                raise WorkError(f"npm could not fetch {package.name} {package.version}: {_npm_reason(done.stderr)}")
            if (found := _integrity(fetched)) != package.integrity:
                raise WorkError(
                    f"{package.name} {package.version} is not the package that was published: "
                    f"its digest is {found}, not {package.integrity}"
                )
            os.replace(fetched, archives[package.name])
    return archives


def _npm_reason(stderr: str) -> str:
    """The line in which npm says what was wrong, of the many that it writes."""
    lines = re.findall(r"^npm (?:error|ERR!) +(.+)$", stderr, re.MULTILINE)
    told = [line for line in lines if not re.match(r"(code|syscall|errno|path|dest)\b", line)]
    return (told or lines or stderr.strip().splitlines() or ["it does not say why"])[0]


def _integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def _package_json(archive: Path) -> Callable[[str], Any]:
    """A reader of the JSON files of a package, by their paths in it; None for one that it does not have."""

    def read(name: str) -> Any:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isfile() and member.name.partition("/")[2] == name:
                    file = tar.extractfile(member)
                    return None if file is None else json.load(file)
        return None

    return read


@dataclass(frozen=True)
class Icons:
    """The visible icons of a package: SVG texts in the order of their names, and what the package knows of them."""

    svg: dict[str, str]
    hexcodes: dict[str, str]
    groups: dict[str, str]


def _read_icons(package: IconPackage, archive: Path) -> Icons:
    read = _package_json(archive)
    data = read("icons.json")
    bodies = {name: icon for name, icon in data["icons"].items() if not icon.get("hidden")}
    for name, alias in data.get("aliases", {}).items():
        # Other aliases are only names; a mirrored icon is a picture of its own.
        if set(alias) == {"parent", "hFlip"} and alias["hFlip"] and alias["parent"] in bodies:
            bodies[name] = {**bodies[alias["parent"]], "hFlip": True}
    kinds = (read("metadata.json") or {}).get("categories", {})
    return Icons(
        {name: _svg(bodies[name], data) for name in sorted(bodies) if (package.prefix, name) not in LEFT_OUT},
        _listed(read),
        {name: kind.lower() for kind, names in kinds.items() for name in names},
    )


def _listed(read: Callable[[str], Any]) -> dict[str, str]:
    return {name: hexcode for hexcode, name in (read("chars.json") or {}).items()}


def _svg(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A whole document of an icon; `{SIZE}` in it stands for pixels, and a picture that is not square is centred."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, defaults.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if icon.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{{SIZE}}" height="{{SIZE}}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def _names(archives: Mapping[str, Path]) -> Names:
    readers = [_package_json(archives[p.name]) for prefix in LISTING for p in PACKAGES if p.prefix == prefix]
    listed = [_listed(read) for read in readers]
    aliases = [
        {
            name: hexcodes[alias["parent"]]
            for name, alias in read("icons.json").get("aliases", {}).items()
            if set(alias) == {"parent"} and alias["parent"] in hexcodes
        }
        for read, hexcodes in zip(readers, listed, strict=True)
    ]
    return read_names(_package_json(archives[CAPTIONS.name]), [*listed, *aliases])


# Drawing.


def render(svg: str, size: int) -> np.ndarray:
    """Draw an icon on white: uint8 (size, size, 3). Raises ValueError for one that is damaged."""
    import resvg_py

    side = 2 * size
    png = resvg_py.svg_to_bytes(
        svg_string=svg.replace("{SIZE}", str(side), 2),
        width=side,
        height=side,
        dpi=96,
        background="#ffffff",
        skip_system_fonts=True,  # no picture may depend on the machine
    )
    with Image.open(io.BytesIO(bytes(png))) as drawn:
        return np.asarray(drawn.convert("RGB").reduce(2))


def render_chunk(path: Path, icons: Sequence[tuple[str, str]], size: int) -> None:
    """Draw (name, SVG) pairs into a zip: NAME.webp each, and `icons.json` with digests of pixels, or with faults."""
    found: dict[str, dict[str, str]] = {}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with zipfile.ZipFile(partial, "w") as file:
        for name, svg in icons:
            try:
                pixels = render(svg, size)
            except ValueError as error:
                found[name] = {"broken": " ".join(str(error).split())}
                continue
            if pixels.min() == pixels.max():
                found[name] = {"blank": "of one colour"}  # white on white: digits that stand on a key elsewhere
                continue
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "WEBP", quality=QUALITY)
            file.writestr(f"{name}.webp", encoded.getvalue())
            found[name] = {"pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}
        file.writestr("icons.json", json.dumps(found))
    os.replace(partial, path)


def read_chunk(path: Path) -> dict[str, dict[str, str]] | None:
    """What is in a chunk, or None for one that is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return json.loads(file.read("icons.json")) if file.testzip() is None else None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError):
        return None


def _draw(
    archives: Mapping[str, Path],
    work: Path,
    settings: Mapping[str, Any],
    workers: int | None,
    say: Callable[[str], None],
) -> dict[str, list[Path]]:
    """Draw what is not drawn yet, in `workers` processes; prefix of each package -> its chunks, in order."""
    drawing = {name: settings[name] for name in ("size", "quality", "renderer", "encoder")}
    chunks: dict[str, list[Path]] = {}
    workers = workers or _cores()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker)
    pending: set[Future] = set()
    try:
        for package in PACKAGES:
            icons = list(_read_icons(package, archives[package.name]).svg.items())
            mark = hashlib.sha256(json.dumps([drawing, package.integrity, CHUNK]).encode()).hexdigest()[:12]
            parts = [icons[i : i + CHUNK] for i in range(0, len(icons), CHUNK)]
            paths = [work / f"{package.prefix}-{mark}-{i:04d}.zip" for i in range(len(parts))]
            chunks[package.prefix] = paths
            todo = [(p, part) for p, part in zip(paths, parts, strict=True) if read_chunk(p) is None]
            kept = sum(map(len, parts)) - sum(len(part) for _, part in todo)
            progress = _Progress(package.style, len(icons), kept, say)
            sizes: dict[Future, int] = {}
            for path, part in todo:
                while len(pending) >= 2 * workers:
                    pending = _collect(pending, sizes, progress)
                future = pool.submit(render_chunk, path, part, settings["size"])
                sizes[future] = len(part)
                pending.add(future)
            while pending:
                pending = _collect(pending, sizes, progress)
            progress.end()
    except BrokenProcessPool:
        raise WorkError("a process that draws has ended; what is drawn is kept, the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return chunks


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_worker() -> None:
    """Ctrl-C is the parent's: a worker ends after the chunk that it is at. One whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _collect(pending: set[Future], sizes: Mapping[Future, int], progress: "_Progress") -> set[Future]:
    done, rest = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        progress.add(sizes[future])
    return rest


class _Progress:
    """A line when a style begins or ends, and every few seconds between."""

    every = 5.0  # seconds

    def __init__(self, style: str, total: int, kept: int, say: Callable[[str], None]):
        self.style, self.total, self.kept, self.say = style, total, kept, say
        self.done = 0
        self.began = self.said = time.perf_counter()

    def add(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if now - self.said >= self.every and self.done + self.kept < self.total:
            left = (now - self.began) / self.done * (self.total - self.kept - self.done)
            self.say(f"{self.style}: {self.kept + self.done} of {self.total} drawn, {left:.0f} s left")
            self.said = now

    def end(self) -> None:
        kept = f", {self.kept} of them before" if self.kept else ""
        self.say(f"{self.style}: {self.total} drawn{kept}")


# Choosing and writing.


def _choose(
    archives: Mapping[str, Path], names: Names, chunks: Mapping[str, Sequence[Path]]
) -> tuple[list[Picture], dict[str, Any]]:
    """The pictures in the order of the hashes of their keys, and how many were left out, for what."""
    pictures: list[Picture] = []
    left_out: Counter[str] = Counter()
    broken: dict[str, str] = {}
    total = 0
    for package in PACKAGES:
        icons = _read_icons(package, archives[package.name])
        drawn = {name: (path, fault) for path in chunks[package.prefix] for name, fault in _chunk(path).items()}
        number = 0
        for icon in icons.svg:
            total += 1
            path, about = drawn[icon]
            if "broken" in about:
                broken[f"{package.prefix}:{icon}"] = about["broken"]
                continue
            if "blank" in about:
                left_out["of one colour"] += 1
                continue
            group = icons.groups.get(icon, "")
            if package.cldr:
                meaning = names.find(icon, icons.hexcodes.get(icon), group, package.prefix, package.squeezed)
            else:
                meaning = Meaning(own_name(icon), group=group)
            if meaning is None:
                left_out["without a name"] += 1
                continue
            key = f"{package.prefix}-{number:05d}"
            number += 1
            split = split_of(key, meaning.label, package.style)
            if split is None:
                left_out["near a held-out pair"] += 1
                continue
            pictures.append(Picture(key, split, package, icon, meaning, about["pixels"], path))
    for name, fault in broken.items():
        logger.warning("left out %s, which cannot be drawn: %s", name, fault)
    if len(broken) > MAX_BROKEN * total:
        raise WorkError(
            f"{len(broken)} of {total} icons cannot be drawn, more than {MAX_BROKEN:.0%}; the log names each"
        )
    pictures.sort(key=lambda picture: hashlib.sha256(picture.key.encode()).digest())
    return pictures, {**left_out, "broken": broken}


def _chunk(path: Path) -> dict[str, dict[str, str]]:
    found = read_chunk(path)
    if found is None:
        raise WorkError(f"{path} was damaged after it was drawn; the same command draws it again")
    return found


def _write_shards(out: Path, split: str, pictures: Sequence[Picture]) -> dict[str, str]:
    """Write shards aside and rename them; their names -> sha256."""
    digests = {}
    for number, first in enumerate(range(0, len(pictures), SHARD)):
        path = out / f"{split}-{number:04d}.tar"
        partial = path.with_name(f".{path.name}.partial")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in _members(pictures[first : first + SHARD]):
                member = tarfile.TarInfo(name)  # of no owner and no time
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        digests[path.name] = _sha256(partial)
        os.replace(partial, path)
    return digests


def _members(pictures: Sequence[Picture]) -> Iterator[tuple[str, bytes]]:
    chunks: dict[Path, zipfile.ZipFile] = {}
    try:
        for picture in pictures:
            if picture.chunk not in chunks:
                chunks[picture.chunk] = zipfile.ZipFile(picture.chunk)
            lines = caption_lines(picture.meaning, picture.package.style, picture.package.manner, picture.key)
            about = json.dumps(_about(picture, lines[0]), ensure_ascii=False, sort_keys=True)
            yield f"{picture.key}.json", about.encode()
            yield f"{picture.key}.txt", "\n".join(lines).encode()
            yield f"{picture.key}.webp", chunks[picture.chunk].read(f"{picture.icon}.webp")
    finally:
        for chunk in chunks.values():
            chunk.close()


def _about(picture: Picture, caption: str) -> dict[str, Any]:
    package = picture.package
    return {
        "caption": caption,
        **asdict(picture.meaning),
        "style": package.style,
        "manner": package.manner,
        "icon": picture.icon,
        "source": f"npm:{package.name}",
        "source_version": package.version,
        "licence": package.licence,
        "credit": package.credit,
        "pixel_sha256": picture.pixels,
    }


def _notices(counts: Mapping[str, Counter[str]], size: int) -> str:
    rows = [
        f"| {p.style} | {sum(counts[split][p.style] for split in SPLITS)} | `{p.name}` {p.version} | {p.licence} "
        f"| {p.credit} |"
        for p in PACKAGES
    ]
    return "\n".join(
        [
            "# Whose pictures these are",
            "",
            f"Icons from the packages below, drawn as {size} × {size} pixels on white and encoded as lossy WebP; "
            "nothing else was changed. `KEY.json` in the shards names package, version, licence and credit of each.",
            "",
            "| style | pictures | npm package | licence | credit |",
            "|---|---|---|---|---|",
            *rows,
            f"| names and keywords | | `{CAPTIONS.name}` {CAPTIONS.version} | {CAPTIONS.licence} | {CAPTIONS.credit} |",
            "",
            "Terms: [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0), "
            "[MIT](https://opensource.org/license/mit), "
            "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/).",
            "",
        ]
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
