"""Whether an emoji model's drawings look like what was asked for, by the pictures that they are nearest to.

    python benchmarks/emoji_labels.py emoji --cache gallery.npz --json labels.json --sheet labels.png

FOLDER is what `armchair data build emoji` writes. Each of the 200 training captions in emoji_prompts.txt is drawn with
its candidates, and the best by the ranker is looked up in a gallery of all training pictures: nearest is the picture
with the largest cosine of the features of an ImageNet network (eval/features.py). A drawing is right in its label if
the nearest picture bears the label that was asked for, in its style if it bears that style. Some icons are the same
picture under several names; they are one picture of the gallery, which bears all of them. The 54 held-out pairs are
measured in the same way, with the 54 held-out pictures added to the gallery, levels L and P apart
(data/emoji_heldout.py).

A gallery's picture is first brought to the bundle's resolution, as a drawing has no more than that. Beside the best
candidate stand the first one; `any candidate`, whether one of them is right, the most that a better choice could
reach; `round trip`, the true picture through the image tokenizer and back, which is what the
codes allow (the true picture is in the gallery); `round trip, true picture left out`, how often another picture that
bears the label, of another style mostly, is the nearest; and `chance`, the share of the gallery that bears it.
Intervals are 95 % (Wilson). Features of the gallery take minutes, and are kept in the file that --cache names.
"""

import argparse
import json
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from armchair.data.emoji_heldout import HELDOUT
from armchair.data.sources import DataConfig, Source, data_home, digest, open_source
from armchair.eval.features import EfficientNetLite0, FeatureNetwork, named
from armchair.image.pixels import square
from armchair.image.sheet import contact_sheet
from armchair.sample.pipeline import Artist, load_artist
from armchair.shapes.accuracy import wilson

sys.path.insert(0, str(Path(__file__).parent))
from emoji_lists import PROMPTS, Line, read_list  # noqa: E402

HELD = "held-out pairs, level "
CHUNK = 128  # pictures read at once
FRAME = 3  # pixels around a pair of the sheet
RIGHT, WRONG = (0, 150, 60), (215, 0, 30)
ROUND_TRIP, LEFT_OUT = "round trip", "round trip, true picture left out"
KINDS = ("best", "first", ROUND_TRIP, LEFT_OUT)  # of pictures that are looked up
ANY = "any candidate"
ASKED = ("label", "style", "both")


class Pictures(NamedTuple):
    """The N pictures of a source, at the bundle's resolution."""

    source: Source
    pairs: list[tuple[str, str]]  # label, in lower case as captions are read, and style
    features: np.ndarray  # float32 (N, F) of length one
    digests: list[str]  # of the pixels


class Gallery:
    """Pictures by their features; those of the same pixels are one, which bears the names of all."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        self.pairs: list[set[tuple[str, str]]] = []
        self.shown: list[tuple[Source, int]] = []  # one of each picture's places
        self.row: dict[str, int] = {}  # by digest
        features = []
        for part in parts:
            for i, (pair, of_pixels) in enumerate(zip(part.pairs, part.digests, strict=True)):
                if of_pixels not in self.row:
                    self.row[of_pixels] = len(self.row)
                    self.pairs.append(set())
                    self.shown.append((part.source, i))
                    features.append(part.features[i])
                self.pairs[self.row[of_pixels]].add(pair)
        self.features = np.stack(features)
        self.bear: Counter[object] = Counter()  # how many pictures bear a label, a style, a pair
        for borne in self.pairs:
            self.bear.update({("label", label) for label, _ in borne} | {("style", style) for _, style in borne})
            self.bear.update(borne)

    def nearest(self, features: np.ndarray, without: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Row and cosine of the nearest picture for each of (M, F); `without` has a row to leave out for each."""
        cosines = features @ self.features.T
        if without is not None:
            cosines[np.arange(len(features)), without] = -np.inf
        rows = cosines.argmax(1)
        return rows, cosines[np.arange(len(rows)), rows]

    def right(self, row: int, pair: tuple[str, str]) -> dict[str, bool]:
        """What of a pair the picture of a row bears."""
        borne = self.pairs[row]
        return {
            "label": any(label == pair[0] for label, _ in borne),
            "style": any(style == pair[1] for _, style in borne),
            "both": pair in borne,
        }

    def chance(self, pair: tuple[str, str]) -> dict[str, float]:
        """The same of a picture taken blindly."""
        borne = {"label": ("label", pair[0]), "style": ("style", pair[1]), "both": pair}
        return {asked: self.bear[name] / len(self.pairs) for asked, name in borne.items()}


def lowered(pair: tuple[str, str]) -> tuple[str, str]:
    return pair[0].lower(), pair[1]


def unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features, dim=1).numpy()


def unit_features(network: FeatureNetwork, images: Sequence[np.ndarray | Image.Image]) -> np.ndarray:
    """(M, F) of length one."""
    return unit(network.extract([np.asarray(image) for image in images]).features)


def telling(began: float) -> Callable[[str], None]:
    """What says how far it is, on a line that is written over."""

    def say(text: str) -> None:
        print(f"\r{time.perf_counter() - began:5.0f} s  {text:60}", end="", file=sys.stderr, flush=True)

    return say


def ranking_artist(parser: argparse.ArgumentParser, model: str) -> Artist:
    """Ends the program for a model without a ranker."""
    artist = load_artist(model, "cpu")
    if artist.ranker is None:
        parser.error(f"{model} has no ranker")
    return artist


def read_pictures(
    source: Source,
    network: FeatureNetwork,
    resolution: int,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Pictures:
    """What is known of each picture of a source, its features from `cache` where they are of the same pictures."""
    fields = [source.fields(i) for i in range(len(source))]
    pairs = [lowered((f["label"], f["style"])) for f in fields]
    fingerprint = digest([source.fingerprint(), named(network), str(resolution)])
    if cache is not None and cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as kept:
                if str(kept["fingerprint"]) == fingerprint:
                    return Pictures(source, pairs, kept["features"], kept["digests"].tolist())
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            raise SystemExit(f"{cache} is no cache of features: remove it, or name another file") from None
    features, digests = [], []
    for start in range(0, len(source), CHUNK):
        images = [square(source[i].image, resolution) for i in range(start, min(start + CHUNK, len(source)))]
        features.append(unit_features(network, images))
        digests += [digest([image.tobytes()]) for image in images]
        say(f"features of {len(digests)} of {len(source)} pictures")
    whole = np.concatenate(features)
    if cache is not None:
        partial = cache.with_name(f".{cache.name}.partial")
        with open(partial, "wb") as file:
            np.savez(file, fingerprint=np.array(fingerprint), features=whole, digests=np.array(digests))
        os.replace(partial, cache)
    return Pictures(source, pairs, whole, digests)


def true_picture(line: Line, part: Pictures) -> int:
    """The first picture that a prompt is the caption of."""
    try:
        return part.pairs.index(lowered(line.pair))
    except ValueError:
        raise SystemExit(f"no picture of {line.prompt!r} in the data: the list is of another set") from None


def measure(
    artist: Artist,
    network: FeatureNetwork,
    groups: Sequence[tuple[Sequence[Line], Pictures, Gallery]],
    candidates: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """What was found for each prompt, and a framed pair of each: the best drawing, and the picture nearest to it.

    groups: prompts, the pictures that their true ones are among, and the gallery that they are looked up in.
    """
    found: list[dict[str, Any]] = []
    framed = []
    count = sum(len(lines) for lines, _, _ in groups)
    for lines, part, gallery in groups:
        best: list[np.ndarray] = []
        returned: list[np.ndarray] = []
        features: dict[str, list[np.ndarray]] = {"best": [], "first": []}
        borne_by_any: list[dict[str, bool]] = []
        kept: list[int] = []
        own: list[int] = []
        for line in lines:
            drawing = artist.draw(line.prompt, candidates=candidates, seed=seed + len(found) + len(kept))
            kept.append(drawing.candidates[0])
            best.append(np.asarray(drawing.images[0]))
            of_each = unit_features(network, drawing.images)
            features["best"].append(of_each[0])
            features["first"].append(of_each[drawing.candidates.index(0)])
            each = [gallery.right(row, lowered(line.pair)) for row in gallery.nearest(of_each)[0]]
            borne_by_any.append({asked: any(right[asked] for right in each) for asked in ASKED})
            true = true_picture(line, part)
            own.append(gallery.row[part.digests[true]])
            picture = Image.fromarray(square(part.source[true].image, artist.resolution))
            returned.append(np.asarray(artist.decode(artist.encode([picture]))[0]))
            say(f"drawn {len(found) + len(kept)} of {count}")
        looked_up = {kind: gallery.nearest(np.stack(rows)) for kind, rows in features.items()}
        round_trip = unit_features(network, returned)
        looked_up |= {ROUND_TRIP: gallery.nearest(round_trip), LEFT_OUT: gallery.nearest(round_trip, own)}
        for i, line in enumerate(lines):
            pair = lowered(line.pair)
            row: dict[str, Any] = {"prompt": line.prompt, "group": line.heading, "candidate": kept[i]}
            row[ANY] = borne_by_any[i]
            for kind, (rows, cosines) in looked_up.items():
                borne = sorted(gallery.pairs[rows[i]], key=lambda p: (p[0] != pair[0], p[1] != pair[1], p))
                right = gallery.right(rows[i], pair)
                row[kind] = {"nearest": [", ".join(p) for p in borne], "cosine": float(cosines[i]), **right}
            found.append({**row, "chance": gallery.chance(pair)})
            source, place = gallery.shown[looked_up["best"][0][i]]
            nearest = square(source[place].image, artist.resolution)
            framed.append(framed_pair(best[i], nearest, row["best"]["label"]))
    return found, framed


def framed_pair(drawn: np.ndarray, nearest: np.ndarray, right: bool) -> Image.Image:
    side = len(drawn)
    cell = Image.new("RGB", (2 * side + 3 * FRAME, side + 2 * FRAME), RIGHT if right else WRONG)
    for i, image in enumerate((drawn, nearest)):
        cell.paste(Image.fromarray(image), (FRAME + i * (side + FRAME), FRAME))
    return cell


def shares(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of prompts that are right, by kind of picture and by what was asked."""
    table: dict[str, Any] = {}
    for kind in (*KINDS, ANY):
        table[kind] = {}
        for asked in ASKED:
            right = sum(row[kind][asked] for row in found)
            share = {"share": right / len(found), "interval": wilson(right, len(found))}
            table[kind][asked] = {**share, "right": right, "prompts": len(found)}
    table["chance"] = {asked: {"share": float(np.mean([row["chance"][asked] for row in found]))} for asked in ASKED}
    return table


def by_group(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of all training captions, of the list's headings, and of each level of held-out pairs."""
    of_training = [row for row in found if not row["group"].startswith(HELD)]
    groups = {"training captions": of_training}
    for row in found:
        name = row["group"] if row["group"].startswith(HELD) else f"training captions, {row['group']}"
        groups.setdefault(name, []).append(row)
    return {name: shares(rows) for name, rows in groups.items() if rows}


def held_out_lines() -> list[Line]:
    return [Line(f"{HELD}{held.level}", f"{held.label}, {held.style}") for held in HELDOUT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=data_home() / "emoji", help="where the set is")
    parser.add_argument("--list", type=Path, metavar="FILE", default=PROMPTS, help="the training captions")
    parser.add_argument("--candidates", type=int, default=16, metavar="N", help="of which the ranker keeps the best")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep features of the training pictures there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="each drawing beside the picture nearest to it")
    args = parser.parse_args()
    began = time.perf_counter()
    say = telling(began)
    artist, network = ranking_artist(parser, args.model), EfficientNetLite0()
    lines = read_list(args.list)
    train_source, held_source = (
        open_source([str(args.data / shards)], DataConfig()) for shards in ("train-*.tar", "heldout-*.tar")
    )
    train = read_pictures(train_source, network, artist.resolution, args.cache, say)
    held = read_pictures(held_source, network, artist.resolution, say=say)
    read = time.perf_counter() - began
    groups = [(lines, train, Gallery([train])), (held_out_lines(), held, Gallery([train, held]))]
    found, framed = measure(artist, network, groups, args.candidates, args.seed, say)
    print(file=sys.stderr)
    flags = "" if args.list == PROMPTS else f" --list {args.list.name}"
    for name in ("candidates", "seed"):
        if getattr(args, name) != parser.get_default(name):
            flags += f" --{name} {getattr(args, name)}"
    results: dict[str, Any] = {
        "command": f"python benchmarks/emoji_labels.py {artist.bundle.name}{flags}",
        "bundle": {"name": artist.bundle.name, "fingerprint": artist.bundle.fingerprint},
        "settings": {**vars(artist.settings), "weights": artist.weights, "candidates": args.candidates},
        "features": named(network),
        "gallery": {"pictures": len(train.pairs), "data": train.source.fingerprint()},
        "seconds": {"features": read, "all": time.perf_counter() - began},
        "groups": by_group(found),
        "prompts": found,
    }
    for name, table in results["groups"].items():
        print(f"{name}, {table['best']['label']['prompts']} prompts")
        for kind in (*KINDS, ANY, "chance"):
            cells = []
            for asked in ASKED:
                cell = table[kind][asked]
                interval = "" if kind == "chance" else " [{:.3f}, {:.3f}]".format(*cell["interval"])
                cells.append(f"{asked} {cell['share']:.3f}{interval}")
            label = f"best of {args.candidates}" if kind == "best" else kind
            print(f"  {label:34}", "  ".join(cells))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        words = {True: "right", False: "wrong"}
        captions = [f"{words[r['best']['label']]}: {r['prompt']}; nearest: {r['best']['nearest'][0]}" for r in found]
        contact_sheet(framed, captions, columns=8, scale=max(1, 128 // artist.resolution)).save(args.sheet)


if __name__ == "__main__":
    sys.exit(main())
