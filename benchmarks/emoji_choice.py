"""Whether anything that is known of a candidate tells which of them is right: what a better choice could rest on.

    python benchmarks/emoji_choice.py emoji --cache gallery.npz --json choice.json

FOLDER is what `armchair data build emoji` writes. Captions of training pictures, none of a label that is in
emoji_prompts.txt, a third of them with a skin tone, are drawn with their candidates, and each candidate is right or
wrong in its label as in emoji_labels.py. For each signal: the share of prompts that are right where it chooses, beside
the mean candidate (a blind choice) and `any candidate` (a perfect one); and how it goes with being right among the
candidates of a prompt, as a correlation, each less its prompt's mean.

- `cosine`, `captioner`: of the ranker, and the bits a token that its captioner gives the caption.
- `naturalness`, `likelihood`: log2 p of the codes without and with the caption, by the prior; `information` is the
  latter less the former.
- `score`: what the bundle ranks by.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armchair.data.sources import DataConfig, data_home, open_source
from armchair.eval.features import EfficientNetLite0, FeatureNetwork
from armchair.eval.likelihood import token_nats
from armchair.sample.pipeline import Artist

sys.path.insert(0, str(Path(__file__).parent))
from emoji_labels import Gallery, lowered, ranking_artist, read_pictures, telling, unit_features  # noqa: E402
from emoji_lists import PROMPTS, TONE, Icon, icons_of, in_hash_order, read_list  # noqa: E402
from shapes_ranker import parts, share  # noqa: E402

SIGNALS = ("cosine", "captioner", "naturalness", "likelihood", "information", "score")


def choose(icons: Sequence[Icon], without: set[str], count: int) -> list[Icon]:
    """So many training captions, each label once and none of `without`, at most a third with a skin tone."""
    chosen: dict[str, Icon] = {}
    toned = 0
    for icon in in_hash_order(icons, "emoji choice"):
        if len(chosen) == count:
            break
        if icon.label in without or icon.label in chosen or (TONE in icon.label and toned == count // 3):
            continue
        toned += TONE in icon.label
        chosen[icon.label] = icon
    return list(chosen.values())


def measure(
    artist: Artist,
    network: FeatureNetwork,
    gallery: Gallery,
    icons: Sequence[Icon],
    candidates: int,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Signals of each candidate, (prompts, candidates, SIGNALS), and whether it is right in its label."""
    signals, right = [], []
    for i, icon in enumerate(icons):
        drawing = artist.draw(icon.prompt, candidates=candidates, seed=1000 + i)
        cosine, captioner, naturalness = parts(artist, drawing).T
        nats = token_nats(artist, [icon.prompt] * candidates, drawing.codes)[1].cpu()
        likelihood = -nats.mean(1) / math.log(2)
        told = [cosine, captioner, naturalness, likelihood, likelihood - naturalness, torch.tensor(drawing.scores)]
        rows, _ = gallery.nearest(unit_features(network, drawing.images))
        order = np.argsort(drawing.candidates)  # not best first, as ties would go to the score
        signals.append(torch.stack(told, 1).numpy()[order])
        right.append(np.array([gallery.right(row, lowered((icon.label, icon.style)))["label"] for row in rows])[order])
        say(f"drawn {i + 1} of {len(icons)}")
    return np.stack(signals), np.stack(right)


def told(signals: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Shares and correlations, as above."""
    count = len(right)
    found: dict[str, Any] = {"prompts": count, "mean candidate": {"share": float(right.mean())}}
    found["any candidate"] = share(int(right.any(1).sum()), count)
    of_right = right - right.mean(1, keepdims=True)
    for i, name in enumerate(SIGNALS):
        x = signals[..., i] - signals[..., i].mean(1, keepdims=True)
        scale = math.sqrt(float((x**2).sum() * (of_right**2).sum()))
        chosen = share(int(right[np.arange(count), signals[..., i].argmax(1)].sum()), count)
        found[name] = {**chosen, "correlation": float((x * of_right).sum()) / scale if scale else 0.0}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=data_home() / "emoji", help="where the set is")
    parser.add_argument("--prompts", type=int, default=140)
    parser.add_argument("--candidates", type=int, default=16, metavar="N")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="as of emoji_labels.py")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    say = telling(time.perf_counter())
    artist, network = ranking_artist(parser, args.model), EfficientNetLite0()
    source = open_source([str(args.data / "train-*.tar")], DataConfig())
    gallery = Gallery([read_pictures(source, network, artist.resolution, args.cache, say)])
    icons = choose(icons_of(source), {line.pair[0] for line in read_list(PROMPTS)}, args.prompts)
    found = told(*measure(artist, network, gallery, icons, args.candidates, say))
    print(file=sys.stderr)
    for name, row in found.items():
        if isinstance(row, dict):
            interval = " [{:.3f}, {:.3f}]".format(*row["interval"]) if "interval" in row else ""
            goes_with = f"  correlation {row['correlation']:+.3f}" if "correlation" in row else ""
            print(f"{name:16} right {row['share']:.3f}{interval}{goes_with}")
    if args.json:
        about = {"bundle": artist.bundle.fingerprint, "candidates": args.candidates}
        args.json.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
