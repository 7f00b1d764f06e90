r"""A sheet of what an emoji model draws of a list of prompts, each the best of its candidates by the ranker.

    python benchmarks/emoji_sheet.py docs/images/emoji-sheet.png
    python benchmarks/emoji_sheet.py docs/images/emoji.png --list benchmarks/emoji_readme_prompts.txt \
        --candidates 4 --columns 8

The first draws the 36 prompts that emoji_lists.py chose before any was drawn, in rows of six; the last two rows are of
pairs that were kept from training. The second draws the picture at the top of the README, of sixteen prompts chosen by
hand. Every prompt is drawn once, with the same seed, and nothing is drawn again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from armchair.image.sheet import contact_sheet
from armchair.sample.pipeline import Artist, load_artist

sys.path.insert(0, str(Path(__file__).parent))
from emoji_lists import SHEET, Line, read_list  # noqa: E402

CELL = 128  # pixels, about, of a picture


def captions(lines: Sequence[Line]) -> list[str]:
    """Prompts, with the heading of those that the model never saw a picture of."""
    held = {line: line.heading.replace("level ", "") for line in lines if line.heading.startswith("held")}
    return [f"{line.prompt} ({held[line]})" if line in held else line.prompt for line in lines]


def draw_sheet(artist: Artist, lines: Sequence[Line], candidates: int, seed: int, columns: int) -> Image.Image:
    began = time.perf_counter()
    images = []
    for line in lines:
        images.append(artist.draw(line.prompt, candidates=candidates, keep=1, seed=seed).images[0])
        said = f"{time.perf_counter() - began:5.0f} s  drawn {len(images)} of {len(lines)}"
        print(f"\r{said}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return contact_sheet(images, captions(lines), columns, max(1, CELL // artist.resolution))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="FILE")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--list", type=Path, metavar="FILE", default=SHEET)
    parser.add_argument("--candidates", type=int, default=16, metavar="N")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    artist = load_artist(args.model, "cpu")
    if artist.ranker is None:
        parser.error(f"{args.model} has no ranker")
    draw_sheet(artist, read_list(args.list), args.candidates, args.seed, args.columns).save(args.out)


if __name__ == "__main__":
    sys.exit(main())
