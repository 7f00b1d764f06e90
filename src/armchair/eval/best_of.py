"""What drawing many and keeping the best is worth (paper, figure 9, right), and how different the many are."""

import numpy as np
import torch

from armchair.eval.distances import FID_RESAMPLES, IS_RESAMPLES, fid_figure, inception_figure
from armchair.eval.features import named
from armchair.eval.fidelity import of_shapes, share
from armchair.eval.figures import Cell, Section, Table, line_plot, mean_figure
from armchair.eval.pairs import SHEET_COLUMNS, Context
from armchair.sample.pipeline import Drawing
from armchair.shapes.accuracy import judge
from armchair.shapes.captions import Prompt, prompts

SHOWN = 8


def best_of(context: Context) -> Section:
    most, ranker = context.options["most"], context.artist.ranker
    section = Section(
        key="best-of",
        title="Best of N",
        protocol=(
            f"{context.options['best_of_prompts']} prompts, {most} candidates each; of the first N the one with the "
            "best score: the ranker's cosine, and what its captioner, where it has one, and the bundle's `naturalness` "
            "add. FID and IS: of the kept pictures, one a prompt, against as many held-out pictures, over the first "
            "feature network; with so few pictures only their course along N means something. Intervals are 1.96 "
            f"standard deviations of bootstrap resamples, {FID_RESAMPLES} for FID, {IS_RESAMPLES} for IS. On the "
            "shapes world, whether the kept picture is right as a whole, and `any`: whether one of the N is, which no "
            "ranker can exceed."
        ),
    )
    if ranker is None:
        section.skipped = "The bundle has no ranker: name one with --ranker."
        return section
    wanted = _prompts(context)
    sizes = [2**k for k in range(most.bit_length()) if 2**k <= most]
    scores = np.zeros((len(wanted), len(sizes)))
    kept: list[list[np.ndarray]] = [[] for _ in sizes]
    right: list[list[bool]] = [[] for _ in sizes]
    possible: list[list[bool]] = [[] for _ in sizes]
    for i, (text, prompt) in enumerate(wanted):
        drawing = context.artist.draw(text, candidates=most, seed=context.seed + i)  # best first
        firsts = [next(j for j, c in enumerate(drawing.candidates) if c < size) for size in sizes]
        whole = {} if prompt is None else _whole(prompt, drawing)
        for k, (size, first) in enumerate(zip(sizes, firsts, strict=True)):
            scores[i, k] = drawing.scores[first]
            kept[k].append(np.asarray(drawing.images[first]))
            if whole:
                right[k].append(whole[drawing.candidates[first]])
                possible[k].append(any(whole[c] for c in range(size)))
        context.say(f"best of {most}: {i + 1} of {len(wanted)} prompts")
    network = context.networks[0]
    real = context.extracted(network, "held-out pictures", context.held_out.images).features[: len(wanted)]
    rows: list[tuple[Cell, ...]] = []
    curves: dict[str, list[tuple[float, float]]] = {"right": [], "any of N": []}
    bands: dict[str, list[tuple[float, float]]] = {"right": [], "any of N": []}
    score_line, score_band = [], []
    for k, size in enumerate(sizes):
        score = mean_figure(scores[:, k])
        found = network.extract(kept[k])
        row: tuple[Cell, ...] = (str(size), score, fid_figure(real, found.features))
        row += ("-" if found.logits is None else inception_figure(found.logits),)
        if right[k]:
            accuracy, bound = share(sum(right[k]), len(wanted)), share(sum(possible[k]), len(wanted))
            row += (accuracy, bound)
            for name, figure in (("right", accuracy), ("any of N", bound)):
                curves[name].append((size, figure.value))
                bands[name].append(figure.interval or (figure.value, figure.value))
        rows.append(row)
        score_line.append((float(size), score.value))
        score_band.append(score.interval or (score.value, score.value))
    columns: tuple[str, ...] = ("N", "score", "FID", "IS")
    if curves["right"]:
        columns += ("right as a whole", "any of the N")
        section.pictures.append(
            line_plot(
                "best-of-accuracy",
                curves,
                title="Exact accuracy of the best of N",
                x="N",
                y="share",
                log_x=True,
                bands=bands,
            )
        )
    section.tables.append(
        Table(title="Best of N", columns=columns, rows=rows, features=named(network))
    )
    section.pictures.append(
        line_plot(
            "best-of-score",
            {"best of N": score_line},
            title="Score of the best of N",
            x="N",
            y="score",
            log_x=True,
            bands={"best of N": score_band},
        )
    )
    shown = [image for i in range(min(SHOWN, len(wanted))) for image in (kept[0][i], kept[-1][i])]
    labels = [text for p, _ in wanted[:SHOWN] for text in (p, f"best of {most}")]
    alt = f"The first candidate and the best of {most}, side by side"
    section.pictures.append(context.sheet("best-of", shown, labels, alt))
    return section


def diversity(context: Context) -> Section:
    count, each = context.options["diversity_prompts"], SHEET_COLUMNS
    network = context.networks[0]
    captions = list(dict.fromkeys(context.held_out.captions))[:count]
    groups, images = [], []
    for i, text in enumerate(captions):
        drawn = [np.asarray(image) for image in context.artist.draw_each([text] * each, seed=context.seed + i)]
        images.append(drawn)
        groups.append(torch.nn.functional.normalize(network.extract(drawn).features, dim=1))
        context.say(f"diversity: {i + 1} of {len(captions)} prompts")
    pairs = torch.triu_indices(each, each, 1)
    within = [float((1 - (g @ g.T)[pairs[0], pairs[1]]).mean()) for g in groups]
    pixels = [np.stack(g).astype(np.float64) / 255 for g in images]
    rmse = [float(np.mean([np.sqrt(((p[i] - p[j]) ** 2).mean()) for i, j in pairs.T.tolist()])) for p in pixels]
    same = [float(np.mean([(p[i] == p[j]).all() for i, j in pairs.T.tolist()])) for p in pixels]
    firsts = torch.stack([g[0] for g in groups])
    apart = [float(1 - firsts[i] @ firsts[(i + 1) % len(firsts)]) for i in range(len(firsts))]
    real = torch.nn.functional.normalize(
        context.extracted(network, "held-out pictures", context.held_out.images).features, dim=1
    )
    real_apart = [float(1 - real[i] @ real[(i + 1) % len(real)]) for i in range(len(real))]
    rows: list[tuple[Cell, ...]] = [
        ("drawings of one prompt, cosine distance", mean_figure(within)),
        ("drawings of different prompts, cosine distance", mean_figure(apart)),
        ("different held-out pictures, cosine distance", mean_figure(real_apart)),
        ("drawings of one prompt, RMSE of pixels in [0, 1]", mean_figure(rmse)),
        ("drawings of one prompt that are the same, share of pairs", mean_figure(same)),
    ]
    shown = [image for group in images[:SHOWN] for image in group]
    labels = [text if i == 0 else "" for text in captions[:SHOWN] for i in range(each)]
    return Section(
        key="diversity",
        title="Diversity",
        protocol=(
            f"{len(captions)} held-out captions, {each} drawings each; means over prompts of "
            "the mean over pairs. Cosine distances between features, 0 the same and 1 unrelated."
        ),
        tables=[
            Table(
                title="Distances", columns=("", "mean"), rows=rows, features=named(network)
            )
        ],
        pictures=[context.sheet("diversity", shown, labels, "Eight drawings of each prompt in a row")],
    )


def _whole(prompt: Prompt, drawing: Drawing) -> dict[int, bool]:
    """Which candidates show all of a prompt."""
    return {c: judge(prompt, image).whole for c, image in zip(drawing.candidates, drawing.images, strict=True)}


def _prompts(context: Context) -> list[tuple[str, Prompt | None]]:
    count = context.options["best_of_prompts"]
    if of_shapes(context):
        # Pairs that training never showed: where there are errors to remove.
        return [(p.text, p) for p in prompts(count, split="held-form-colour")]
    return [(caption, None) for caption in list(dict.fromkeys(context.held_out.captions))[:count]]
