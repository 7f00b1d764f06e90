"""The prompts that an emoji model is measured with and shown by, chosen by hashes before any of them was drawn.

    python benchmarks/emoji_lists.py

writes two lists beside this file, the same for the same training pictures; FOLDER is what `armchair data build emoji`
writes. `emoji_prompts.txt`: 200 captions of training pictures, each thing once, 67 of them with a skin tone.
`emoji_sheet_prompts.txt`: 36 prompts for a sheet of six by six, 24 captions of training pictures, none of a style or of
a kind of thing more than three times, and of the held-out pairs six of each level. The order is that of the sha256 of
the list's name and the caption: no caption can be preferred. Lines that start with `# ` are headings.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from armchair.data.emoji_heldout import HELDOUT
from armchair.data.sources import DataConfig, Source, data_home, open_source

HERE = Path(__file__).parent
PROMPTS, SHEET = HERE / "emoji_prompts.txt", HERE / "emoji_sheet_prompts.txt"
TONE = "skin tone"
COUNT, TONED = 200, 67
SHOWN, SHOWN_LEVEL = 24, 6  # of the sheet: training captions, and held-out pairs of each level
MOST_ALIKE = 3  # of the sheet's training captions, of one style or of one kind of thing
RARE = 200  # kinds of thing that fewer pictures than one in so many are of are other spellings of the large ones


class Icon(NamedTuple):
    """What is said of a picture."""

    label: str
    style: str
    group: str  # the kind of thing

    @property
    def prompt(self) -> str:
        return f"{self.label}, {self.style}"


class Line(NamedTuple):
    """A prompt of a list, and the heading that it stands under."""

    heading: str
    prompt: str

    @property
    def pair(self) -> tuple[str, str]:
        """Label and style, which has no comma."""
        label, _, style = self.prompt.rpartition(", ")
        return label, style


def read_icons(folder: Path) -> list[Icon]:
    """What is said of each training picture of the set in FOLDER."""
    return icons_of(open_source([str(folder / "train-*.tar")], DataConfig()))


def icons_of(source: Source) -> list[Icon]:
    fields = [source.fields(i) for i in range(len(source))]
    return [Icon(f["label"], f["style"], f["group"].lower()) for f in fields]


def in_hash_order(icons: Iterable[Icon], name: str) -> list[Icon]:
    """Each pair of label and style once."""
    once = {icon.prompt: icon for icon in icons}
    return sorted(once.values(), key=lambda icon: hashlib.sha256(f"{name}\n{icon.prompt}".encode()).digest())


def choose_prompts(icons: Sequence[Icon], count: int = COUNT, toned: int = TONED) -> dict[str, list[str]]:
    """Heading -> prompts: `count` training captions, each label once, `toned` of them with a skin tone."""
    wanted = {"no skin tone": count - toned, TONE: toned}
    chosen: dict[str, list[str]] = {heading: [] for heading in wanted}
    labels: set[str] = set()
    for icon in in_hash_order(icons, "emoji prompts"):
        heading = TONE if TONE in icon.label else "no skin tone"
        if icon.label not in labels and len(chosen[heading]) < wanted[heading]:
            labels.add(icon.label)
            chosen[heading].append(icon.prompt)
    return chosen


def choose_sheet(icons: Sequence[Icon]) -> dict[str, list[str]]:
    """Heading -> prompts: training captions, then held-out pairs by level."""
    of_group = Counter(icon.group for icon in icons)
    alike: Counter[tuple[str, str]] = Counter()
    labels: set[str] = set()
    shown: list[str] = []
    for icon in in_hash_order(icons, "emoji sheet"):
        kinds = ("style", icon.style), ("group", icon.group)
        full = any(alike[kind] == MOST_ALIKE for kind in kinds)
        if len(shown) < SHOWN and not full and icon.label not in labels and of_group[icon.group] * RARE >= len(icons):
            labels.add(icon.label)
            alike.update(kinds)
            shown.append(icon.prompt)
    chosen = {"training": shown}
    for level in ("L", "P"):
        pairs = in_hash_order((Icon(h.label, h.style, "") for h in HELDOUT if h.level == level), "emoji sheet")
        chosen[f"held out, level {level}"] = [pair.prompt for pair in pairs[:SHOWN_LEVEL]]
    return chosen


def written(chosen: dict[str, list[str]]) -> str:
    return "".join(f"# {heading}\n" + "".join(f"{p}\n" for p in prompts) for heading, prompts in chosen.items())


def read_list(path: Path) -> list[Line]:
    heading, lines = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            heading = line[2:]
        elif line:
            lines.append(Line(heading, line))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=data_home() / "emoji", help="where the set is")
    args = parser.parse_args()
    icons = read_icons(args.data)
    PROMPTS.write_text(written(choose_prompts(icons)), encoding="utf-8")
    SHEET.write_text(written(choose_sheet(icons)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
