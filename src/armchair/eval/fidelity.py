"""Whether a drawing shows what its prompt says: by the ranker, and exactly where the world is the shapes."""

import torch

from armchair.clip.contrast import retrieval_ranks, same_captions
from armchair.data.sources import built_in
from armchair.eval.figures import Cell, Figure, Picture, Section, Table, mean_figure
from armchair.eval.pairs import Context
from armchair.shapes.accuracy import ATTRIBUTES, Verdict, judge, wilson
from armchair.shapes.captions import prompts
from armchair.shapes.world import COUNTS, RELATIONS

DISTRACTORS = 100
SHOWN = 8
# Splits with the numbers of objects they have, harder ones last.
SUITES = tuple((split, objects) for split, counts in COUNTS.items() if split != "train" for objects in counts)


def fidelity(context: Context) -> Section:
    tables: list[Table] = []
    pictures: list[Picture] = []
    protocol = []
    ranker = context.artist.ranker
    if ranker is not None:
        tables += _by_ranker(context)
        protocol.append(
            "CLIP score: cosine of picture and caption in the ranker's space, a mean over pairs; `mismatched` pairs "
            "each picture with the next caption that says something else. Retrieval: the share of pictures whose own "
            f"caption scores best, or is among the best 5 or 10, of itself and {DISTRACTORS} others (captions that say "
            "the same are left out; ties count as misses)."
        )
    if of_shapes(context):
        table, relations, sheet = _exact(context)
        tables += [table, relations]
        pictures.append(sheet)
        protocol.append(
            f"Exact accuracy: {context.options['prompts']} prompts a row, one drawing each, none chosen; a reader "
            "turns the drawing into a scene, and it is right as a whole where number, form, colour, size, fill, "
            "relation and ground are all as far as the prompt speaks of them. Intervals are Wilson's; those of an "
            "attribute are over the prompts of the row that speak of it."
        )
    section = Section(
        key="fidelity", title="Prompt fidelity", protocol=" ".join(protocol), tables=tables, pictures=pictures
    )
    if not tables:
        section.skipped = (
            "The bundle has no ranker (name one with --ranker), and these are no pictures of the shapes world."
        )
    return section


def _by_ranker(context: Context) -> list[Table]:
    ranker, captions = context.artist.ranker, context.held_out.captions
    assert ranker is not None
    texts = ranker.embed_texts(captions)
    same = same_captions(captions)
    scores: list[tuple[Cell, ...]] = []
    found: list[tuple[Cell, ...]] = []
    for name, images in (("drawings", context.drawings()), ("held-out pictures", context.held_out.images)):
        shown = ranker.embed_images(context.pil(images))
        own = (shown * texts).sum(1)
        others = [next((j for j in _ring(i, len(texts)) if not same[i, j]), i) for i in range(len(texts))]
        scores.append((name, mean_figure(own.numpy()), mean_figure((shown * texts[others]).sum(1).numpy())))
        ranks = retrieval_ranks(shown, texts, same, DISTRACTORS)
        found.append((name, *(share(int((ranks < k).sum()), len(ranks)) for k in (1, 5, 10))))
    by = f"{ranker.id.name} ({ranker.id.fingerprint[:16]})"
    return [
        Table(title="CLIP score", columns=("", "own caption", "mismatched"), rows=scores, features=by),
        Table(
            title=f"Caption retrieval among {min(DISTRACTORS, len(texts) - 1)} others",
            columns=("", "R@1", "R@5", "R@10"),
            rows=found,
            features=by,
        ),
    ]


def _exact(context: Context) -> tuple[Table, Table, Picture]:
    count = context.options["prompts"]
    rows: list[tuple[Cell, ...]] = []
    images, labels = [], []
    related: dict[str, list[bool]] = {relation: [] for relation in RELATIONS}
    for split, objects in SUITES:
        wanted = prompts(count, split=split, objects=objects)
        context.say(f"exact accuracy: {split}, {objects}")
        drawn = context.draw_each([p.text for p in wanted])
        verdicts = [judge(p, image) for p, image in zip(wanted, drawn, strict=True)]
        rows.append((split, objects, share(sum(v.whole for v in verdicts), count), *_shares(verdicts)))
        for p, v in zip(wanted, verdicts, strict=True):
            if len(p.relations) == 1 and v.relations is not None:
                related[p.relations[0]].append(v.relations)
        images += drawn[:SHOWN]
        labels += [("" if v.whole else "WRONG ") + p.text for p, v in zip(wanted[:SHOWN], verdicts, strict=False)]
    sheet = context.sheet("exact", images, labels, "Prompts of each row; those that came out wrong say so")
    table = Table(title="Exact accuracy", columns=("split", "objects", "whole", *ATTRIBUTES), rows=rows)
    by_relation: list[tuple[Cell, ...]] = [(name, share(sum(v), len(v))) for name, v in related.items() if v]
    relations = Table(title="Relations, over all splits", columns=("relation", "right"), rows=by_relation)
    return table, relations, sheet


def _shares(verdicts: list[Verdict]) -> list[Cell]:
    """Of the prompts that speak of an attribute, how many came out right; `-` where none does."""
    said = [[v for verdict in verdicts if (v := getattr(verdict, name)) is not None] for name in ATTRIBUTES]
    return [share(sum(values), len(values)) if values else "-" for values in said]


def of_shapes(context: Context) -> bool:
    """Whether these are pictures that the reader of the shapes world can read."""
    return "shapes" in map(built_in, context.data) and context.artist.resolution % 64 == 0


def share(right: int, count: int) -> Figure:
    """A share with its Wilson interval."""
    return Figure(value=right / count, interval=wilson(right, count), count=count)


def _ring(i: int, count: int) -> list[int]:
    return torch.arange(1, count).add(i).remainder(count).tolist()
