"""How well a shapes bundle's ranker tells captions apart, and what picking the best of N is worth.

    python benchmarks/shapes_ranker.py runs/shapes/bundle --json ranker.json
    python benchmarks/shapes_ranker.py runs/shapes/bundle --best-of-only --splits held-form-colour --temperature 1

- retrieval: a rendered scene's own prompt among 100 prompts of other scenes that are false of it (those that happen to
  be true of it too are passed over): share that comes first, among the first 5, among the first 10.
- swapped: a scene with two objects against its prompt with two words of a kind swapped (colours, forms, sizes or
  fills): share of pairs in which the true one has the higher cosine; `turned`: the relation made its opposite.
- mirrored: a prompt with a relation against two pictures, its scene and the same with objects where their mirror images
  are, so that the relation is its opposite: share of pairs in which the true one has the higher cosine.
- where the ranker has a captioner, `told_by_captioner` and `told_by_score` are the shares by what the captioner says of
  how likely the prompt is, and by the score, which counts both. Retrieval is by the cosine alone.
- best of N: share of prompts whose picture is right as a whole, where it is the ranker's first of N candidates; `any`
  is the share of prompts for which at least one of the N is right, which no ranker can exceed. `--weights`: also where
  the parts of a score weigh otherwise, from the same pictures.

Intervals are 95 % (Wilson).
"""

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from armchair.clip.contrast import retrieval_ranks
from armchair.clip.negatives import NearMisses
from armchair.sample.pipeline import Artist, Drawing, load_artist
from armchair.sample.ranker import Ranker
from armchair.shapes.accuracy import judge, judge_scene, wilson
from armchair.shapes.captions import prompts
from armchair.shapes.world import CANVAS, COLOURS, CONVERSE, COUNTS, FILLS, FORMS, SIZES, Scene, render, scene

SPLITS = ("val", "held-form-colour", "held-relation-form", "held-count")
ATTRIBUTES = NearMisses([FORMS, tuple(COLOURS), SIZES, FILLS])
SIDES = NearMisses([("left of", "right of"), ("above", "below")])
DISTRACTORS = 100
PARTS = ("cosine", "caption_weight", "naturalness")
CAPTION_WEIGHTS, NATURALNESS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0), (0.0, 0.3, 1.0, 3.0)  # of `--weights`
DRAWING = ("temperature", "min_p", "guidance", "naturalness")


def retrieval(ranker: Ranker, split: str, count: int) -> dict:
    scenes = [scene(i, split=split) for i in range(count)]
    wanted = prompts(count, split=split)
    texts = ranker.embed_texts([p.text for p in wanted])
    pictures = ranker.embed_images([Image.fromarray(render(s)) for s in scenes])
    true = torch.tensor([[judge_scene(p, s).whole for p in wanted] for s in scenes])
    ranks = retrieval_ranks(pictures, texts, true, DISTRACTORS)
    found = {f"recall_{k}": share(int((ranks < k).sum()), count) for k in (1, 5, 10)}
    return {"pictures": count, **found}


def swapped(ranker: Ranker, split: str, count: int, misses: NearMisses, every: bool) -> dict:
    """Of scenes with two objects; `every`: all swaps of a prompt, else the exchanges."""
    true, false = [], []
    for i, prompt in enumerate(prompts(count, split=split, objects=2)):
        for text in misses.swaps(prompt.text) if every else misses.exchanges(prompt.text):
            true.append((i, prompt.text))
            false.append((i, text))
    return preferred(ranker, [render(scene(i, split=split, objects=2)) for i in range(count)], true, false)


def mirrored(ranker: Ranker, split: str, count: int) -> dict:
    """Of scenes with two objects side by side or one above the other."""
    images, true, false = [], [], []
    for i, prompt in enumerate(prompts(count, split=split, objects=2)):
        shown = scene(i, split=split, objects=2)
        if shown.relations[0] in CONVERSE:
            true.append((len(images), prompt.text))
            false.append((len(images) + 1, prompt.text))
            images += [render(shown), render(mirror(shown))]
    return preferred(ranker, images, true, false)


def mirror(shown: Scene) -> Scene:
    """Two objects where their mirror images are, along the line of their relation."""
    (relation,) = shown.relations
    axis = "x" if relation in ("left of", "right of") else "y"
    objects = tuple(replace(o, **{axis: CANVAS - getattr(o, axis)}) for o in shown.objects)
    return replace(shown, objects=objects, relations=(CONVERSE[relation],))


def preferred(
    ranker: Ranker, images: list[np.ndarray], true: list[tuple[int, str]], false: list[tuple[int, str]]
) -> dict:
    """How often each of `true`, a picture's number and a text, is preferred to the one of `false` that stands there."""
    pictures = [Image.fromarray(image) for image in images]
    shown = ranker.embed_images(pictures)

    def split(pairs: list[tuple[int, str]]) -> tuple[list[int], list[str]]:
        return [i for i, _ in pairs], [text for _, text in pairs]

    def cosines(pairs: list[tuple[int, str]]) -> torch.Tensor:
        of, texts = split(pairs)
        return (shown[of] * ranker.embed_texts(texts)).sum(1)

    def said(pairs: list[tuple[int, str]]) -> torch.Tensor:
        of, texts = split(pairs)
        return torch.tensor(ranker.caption_log_probs(states[of], texts))

    gains = {"told": cosines(true) - cosines(false)}
    if ranker.model.captioner is not None:
        states = ranker.image_states(pictures)
        gains["told_by_captioner"] = said(true) - said(false)
        gains["told_by_score"] = gains["told"] + ranker.caption_weight * gains["told_by_captioner"]
    return {"pairs": len(true), **{name: share(int((gain > 0).sum()), len(true)) for name, gain in gains.items()}}


def best_of(
    artist: Artist,
    split: str,
    objects: int,
    count: int,
    most: int,
    settings: dict,
    weights: bool = False,
    skip: int = 0,
) -> dict:
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= most]
    right, possible = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    of_each: list[tuple[torch.Tensor, torch.Tensor]] = []
    wanted = enumerate(prompts(skip + count, split=split, objects=objects))
    for i, prompt in itertools.islice(wanted, skip, None):
        drawing = artist.draw(prompt.text, candidates=most, seed=i, **settings)
        whole = {c: judge(prompt, image).whole for c, image in zip(drawing.candidates, drawing.images, strict=True)}
        for n in sizes:
            among = [c for c in drawing.candidates if c < n]  # best first
            right[n] += whole[among[0]]
            possible[n] += any(whole[c] for c in among)
        if weights:
            of_each.append((parts(artist, drawing), torch.tensor([whole[c] for c in drawing.candidates])))
    found: dict = {
        "prompts": count,
        **{f"best_of_{n}": share(right[n], count) for n in sizes},
        **{f"any_of_{n}": share(possible[n], count) for n in sizes},
    }
    if weights:
        grid = itertools.product((1.0, 0.0), CAPTION_WEIGHTS, NATURALNESS)
        found["weights"] = [
            {**dict(zip(PARTS, row, strict=True)), f"best_of_{most}": chosen(of_each, row)} for row in grid if any(row)
        ]
    return found


def parts(artist: Artist, drawing: Drawing) -> torch.Tensor:
    """What a score is made of, for each picture (n, 3): cosine, log2 p of caption a token, and of picture a code."""
    ranker = artist.ranker
    assert ranker is not None
    cosines = ranker.embed_images(drawing.images) @ ranker.embed_texts([drawing.prompt])[0]
    said = [0.0] * len(cosines)
    if ranker.model.captioner is not None:
        said = ranker.caption_log_probs(ranker.image_states(drawing.images), [drawing.prompt] * len(cosines))
    return torch.stack([cosines, torch.tensor(said), torch.tensor(artist.likelihoods(drawing.codes))], 1)


def chosen(of_each: list[tuple[torch.Tensor, torch.Tensor]], weights: tuple[float, ...]) -> float:
    """The share of prompts whose picture is right, where it is the first by the parts of its score so weighted."""
    return sum(bool(whole[(parts @ torch.tensor(weights)).argmax()]) for parts, whole in of_each) / len(of_each)


def share(right: int, number: int) -> dict:
    return {"share": right / number, "interval": wilson(right, number)}


def told(name: str, result: dict, seconds: float) -> None:
    said = [f"{k} {v}" for k, v in result.items() if not isinstance(v, (dict, list))]
    said += [
        "{} {:.3f} [{:.3f}, {:.3f}]".format(k, v["share"], *v["interval"])
        for k, v in result.items()
        if isinstance(v, dict)
    ]
    print(f"{name:<34} {'  '.join(said)}  {seconds:.0f} s", flush=True)
    for row in result.get("weights", ()):
        print(" " * 34, "  ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pictures", type=int, default=500, help="of each split, for retrieval and swaps")
    parser.add_argument("--prompts", type=int, default=100, help="for best of N; 0: leave it out")
    parser.add_argument("--skip", type=int, default=0, help="leave so many out before: for choosing weights on")
    parser.add_argument("--most", type=int, default=32, help="candidates a prompt")
    for name in DRAWING:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="for best of N; else the bundle's own")
    parser.add_argument("--caption-weight", type=float, help="beside the cosine; else the bundle's own")
    parser.add_argument("--weights", action="store_true", help="best of N for other weights of a score's parts, too")
    parser.add_argument("--best-of-only", action="store_true", help="leave retrieval and swaps out")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, metavar="SPLIT", help="these alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artist = load_artist(args.model)
    if (ranker := artist.ranker) is None:
        parser.error(f"{args.model} has no ranker")
    if args.caption_weight is not None:
        if ranker.model.captioner is None:
            parser.error(f"--caption-weight: the ranker of {args.model} has no captioner")
        ranker.caption_weight = args.caption_weight
    settings = {name: getattr(args, name) for name in DRAWING if getattr(args, name) is not None}
    jobs: dict = {f"retrieval {s}": lambda s=s: retrieval(ranker, s, args.pictures) for s in args.splits}
    for split in args.splits:
        if 2 in COUNTS[split]:
            jobs[f"swapped {split}"] = lambda s=split: swapped(ranker, s, args.pictures, ATTRIBUTES, True)
            jobs[f"turned {split}"] = lambda s=split: swapped(ranker, s, args.pictures, SIDES, False)
            jobs[f"mirrored {split}"] = lambda s=split: mirrored(ranker, s, args.pictures)
    if args.best_of_only:
        jobs.clear()
    if args.prompts:
        for split, objects in (("val", 2), ("held-form-colour", 1), ("held-form-colour", 2), ("held-relation-form", 2)):
            if split not in args.splits:
                continue
            jobs[f"best of N {split} {objects}"] = lambda s=split, o=objects: best_of(
                artist, s, o, args.prompts, args.most, settings, args.weights, args.skip
            )
    results: dict = {"bundle": artist.bundle.fingerprint, "settings": settings, "caption_weight": ranker.caption_weight}
    for name, job in jobs.items():
        began = time.time()
        results[name] = job()
        told(name, results[name], time.time() - began)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
