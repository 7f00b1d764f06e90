"""Packages of a few icons, and an npm that hands them out: what the emoji set is built from in the tests.

As a program, `python tiny_icons.py FOLDER OUT`: build the set of the packages in FOLDER.
"""

import base64
import dataclasses
import gzip
import hashlib
import io
import json
import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

from armchair import cli
from armchair.data import emoji
from armchair.data.emoji import IconPackage, Package

# What emojibase-data knows: label, code points, keywords; of hands and mages the skin tones too.
EMOJI = (
    ("red apple", "1F34E", ["apple", "fruit", "red", "ripe"]),
    ("blue heart", "1F499", ["blue", "heart", "love"]),
    ("brown heart", "1F90E", ["brown", "heart"]),
    ("woman mechanic", "1F469-200D-1F527", ["mechanic", "tool"]),
    ("clapping hands", "1F44F", ["clap", "hand"]),
    ("flag: France", "1F1EB-1F1F7", []),
)
TONED = {"woman mechanic": ("dark", "1F469-1F3FF-200D-1F527"), "clapping hands": ("medium-light", "1F44F-1F3FC")}
FILL = 140  # further icons, so that one in 40 is some
APPLE = '<path fill="red" d="M0 0h16v32H0z"/>'
SLOW = '<filter id="b"><feGaussianBlur stdDeviation="9"/></filter><g filter="url(#b)">' * 6 + APPLE + "</g>" * 6


def icon_sets() -> dict[str, dict[str, Any]]:
    """Folder of files of each package."""
    toned = {
        label: {"label": f"{label}: {tone} skin tone", "hexcode": hexcode, "group": 1, "subgroup": 0}
        for label, (tone, hexcode) in TONED.items()
    }
    data = [
        {"label": label, "hexcode": hexcode, "tags": tags, "group": 0, "subgroup": 0}
        | ({"skins": [toned[label]]} if label in toned else {})
        for label, hexcode, tags in EMOJI
    ]
    names = [*[(e["label"], e["hexcode"]) for e in data], *[(e["label"], e["hexcode"]) for e in toned.values()]]
    chars = {
        hexcode.lower(): label.replace(": ", "-").replace(" ", "-").lower().removesuffix("-skin-tone")
        for label, hexcode in names
    }
    bodies = {name: APPLE for name in chars.values()}
    noto = {
        "icons.json": {
            "width": 32,
            "height": 32,
            "icons": {
                **{name: {"body": body} for name, body in bodies.items()},
                **{f"thing-{i}": {"body": APPLE + f'<circle cx="24" cy="{i % 32}" r="4"/>'} for i in range(FILL)},
                "left": {"body": APPLE},
                "gone": {"body": APPLE, "hidden": True},
                "white": {"body": '<path fill="#fff" d="M0 0h9v9z"/>'},
                "wide": {"body": APPLE, "height": 16, "width": 64},
            },
            "aliases": {
                "right": {"parent": "left", "hFlip": True},
                "clap": {"parent": "clapping-hands"},
                "spare": {"parent": "left"},
            },
        },
        "chars.json": chars,
        "metadata.json": {"categories": {"Objects": ["thing-0"]}},
    }
    squeezed = ["redapple", "heartblue", "womanmechanic", "brownheart", "bigapple", "xyzzy", "clap", "franceflag"]
    fxemoji = {"icons.json": {"width": 32, "height": 32, "icons": {name: {"body": APPLE} for name in squeezed}}}
    flat = {"icons.json": {"icons": {"red-apple": {"body": APPLE, "width": 32, "height": 32}}}}
    emojibase = {
        "en/data.json": data,
        "en/messages.json": {"groups": [{"key": "things", "message": "all things"}], "subgroups": []},
        "meta/groups.json": {"groups": {"0": "things", "1": "tones"}, "subgroups": {"0": "kinds"}},
        "meta/unicode-names.json": {"1F34E": "RED APPLE OF A BIG TREE"},
        **{f"en/shortcodes/{source}.json": {} for source in ("github", "iamcal", "joypixels")},
        "en/shortcodes/emojibase.json": {"1F44F": ["clap"]},
    }
    return {"noto": noto, "fxemoji": fxemoji, "flat-color-icons": flat, "emojibase-data": emojibase}


def write_packages(folder: Path, sets: dict[str, dict[str, Any]]) -> None:
    """The archives in FOLDER/registry, the table of packages in FOLDER/packages.json, and npm in FOLDER/bin."""
    (folder / "registry").mkdir(parents=True)
    table = []
    for package in (*emoji.PACKAGES, emoji.CAPTIONS):
        name = package.name.rpartition("/")[2]
        if name in sets:
            data = _archive(sets[name])
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
            (folder / "registry" / package.archive).write_bytes(data)
            table.append(dataclasses.asdict(dataclasses.replace(package, integrity=integrity)))
    (folder / "packages.json").write_text(json.dumps(table))
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"here = pathlib.Path({str(folder)!r})\n"
        "assert sys.argv[1] == 'pack'\n"
        "name, _, version = sys.argv[2].rpartition('@')\n"
        "archive = f\"{name.removeprefix('@').replace('/', '-')}-{version}.tgz\"\n"
        "with (here / 'fetched').open('a') as log: print(archive, file=log)\n"
        "if not (here / 'registry' / archive).exists():\n"
        "    sys.exit(f'npm error code E404\\nnpm error 404 Not Found - {name}\\nnpm error 404\\nnpm error A log')\n"
        "shutil.copy(here / 'registry' / archive, archive)\n"
    )
    npm.chmod(0o755)


def _archive(files: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(out.getvalue(), mtime=0)  # the same bytes whenever


def read_packages(folder: Path) -> tuple[tuple[IconPackage, ...], Package]:
    *icons, captions = json.loads((folder / "packages.json").read_text())
    return tuple(IconPackage(**fields) for fields in icons), Package(**captions)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as in a shell's background
    packages, out = map(Path, sys.argv[1:])
    emoji.PACKAGES, emoji.CAPTIONS = read_packages(packages)
    emoji.LISTING, emoji.CHUNK = ("noto",), 8
    os.environ["PATH"] = str(packages / "bin")
    sys.exit(cli.main(["data", "build", "emoji", "--out", str(out), "--size", "32", "--workers", "1"]))
