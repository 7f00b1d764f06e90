import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armchair.errors import RequestError
from armchair.shapes.captions import Prompt, Wanted, captions, prompts, wordings
from armchair.shapes.world import (
    COLOURS,
    COUNTS,
    FILLS,
    FORMS,
    GAP,
    GROUNDS,
    HELD_FORM_COLOUR,
    HELD_RELATION_FORM,
    RADII,
    RELATIONS,
    SIZES,
    SPLITS,
    Object,
    Scene,
    ShapesSource,
    holds,
    relation_of,
    render,
    scene,
)

CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

indices = st.integers(0, 10**9)
splits = st.sampled_from(SPLITS)
drawn = st.builds(
    lambda i, split, seed: scene(i, split=split, seed=seed), indices, splits, st.integers(0, 99)
)


def said_pairs(s: Scene) -> set[tuple[str, str]]:
    """(relation, subject form) in either wording."""
    pairs = set()
    for relation, a, b in zip(s.relations, s.objects, s.objects[1:], strict=False):
        pairs.add((relation, a.form))
        if relation in CONVERSE:
            pairs.add((CONVERSE[relation], b.form))
    return pairs


@given(indices, splits)
def test_a_scene_is_the_same_every_time(index, split):
    assert scene(index, split=split) == scene(index, split=split)
    assert scene(index, split=split) in [scene(index, split=split, objects=n) for n in COUNTS[split]]


def test_scenes_do_not_drift_between_versions():
    diamond = Object("diamond", "green", "medium", "striped", 12, 12)
    crescent = Object("crescent", "brown", "small", "dotted", 24, 32)
    assert scene(0) == Scene("grey", (diamond, crescent), ("above",))


@given(drawn)
def test_objects_are_apart_or_nested_and_related_as_said(s):
    assert s.ground in GROUNDS and len(s.relations) == len(s.objects) - 1
    for o in s.objects:
        assert o.form in FORMS and o.colour in COLOURS and o.fill in FILLS
        assert {o.x % 8, o.y % 8} == {4 if o.size == "medium" else 0}
        assert RADII[o.size] <= min(o.x, o.y) and max(o.x, o.y) <= 64 - RADII[o.size]
    assert len({(o.form, o.colour) for o in s.objects}) == len(s.objects)
    for relation, a, b in zip(s.relations, s.objects, s.objects[1:], strict=False):
        assert holds(relation, a, b)
        assert [r for r in RELATIONS if holds(r, a, b)] == [relation]
        assert relation == "inside" or holds(CONVERSE[relation], b, a)
    for i, a in enumerate(s.objects):
        for b in s.objects[i + 1 :]:
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) >= RADII[a.size] + RADII[b.size] + GAP
            assert apart or (relation_of(a, b) == "inside" and b.fill == "outlined")


@given(indices, st.sampled_from(["train", "val"]))
def test_train_and_val_keep_clear_of_what_is_held_out(index, split):
    s = scene(index, split=split)
    assert len(s.objects) <= 2
    assert not {(o.form, o.colour) for o in s.objects} & HELD_FORM_COLOUR
    assert not said_pairs(s) & HELD_RELATION_FORM


@given(indices)
def test_held_out_splits_hold_what_they_say(index):
    s = scene(index, split="held-form-colour")
    assert {(o.form, o.colour) for o in s.objects} & HELD_FORM_COLOUR and not said_pairs(
        s
    ) & HELD_RELATION_FORM
    s = scene(index, split="held-relation-form")
    assert (
        said_pairs(s) & HELD_RELATION_FORM and not {(o.form, o.colour) for o in s.objects} & HELD_FORM_COLOUR
    )
    s = scene(index, split="held-count")
    assert len(s.objects) == 3
    assert (
        not said_pairs(s) & HELD_RELATION_FORM
        and not {(o.form, o.colour) for o in s.objects} & HELD_FORM_COLOUR
    )


def test_held_pairs_name_each_form_and_colour_once():
    assert sorted(form for form, _ in HELD_FORM_COLOUR) == sorted(FORMS)
    assert sorted(colour for _, colour in HELD_FORM_COLOUR) == sorted(COLOURS)


def test_train_shows_every_name_often_and_val_is_not_train():
    scenes = [scene(i) for i in range(2000)]
    assert 0.35 < np.mean([len(s.objects) == 1 for s in scenes]) < 0.45
    for names, seen in (
        (FORMS, [o.form for s in scenes for o in s.objects]),
        (COLOURS, [o.colour for s in scenes for o in s.objects]),
        (SIZES, [o.size for s in scenes for o in s.objects]),
        (FILLS, [o.fill for s in scenes for o in s.objects]),
        (GROUNDS, [s.ground for s in scenes]),
        (RELATIONS, [r for s in scenes for r in s.relations]),
    ):
        assert min(seen.count(name) for name in names) > 0.5 * len(seen) / len(names)
    two = {s for s in scenes if len(s.objects) == 2 and s.relations != ("inside",)}  # few enough to meet by chance
    assert not two & {scene(i, split="val", objects=2) for i in range(2000)}


@given(drawn, st.integers(1, 3))
@settings(max_examples=30)
def test_pictures_hold_the_ground_around_the_objects_and_the_colour_within(s, scale):
    picture = render(s, 64 * scale)
    assert picture.shape == (64 * scale, 64 * scale, 3) and picture.dtype == np.uint8
    assert (picture[[0, -1]] == GROUNDS[s.ground]).all() and (picture[:, [0, -1]] == GROUNDS[s.ground]).all()
    for o in s.objects:
        r = int(RADII[o.size])
        box = picture[(o.y - r) * scale : (o.y + r) * scale, (o.x - r) * scale : (o.x + r) * scale]
        assert (box == COLOURS[o.colour]).all(-1).sum() >= 4 * scale * scale
    coarse = picture.reshape(64, scale, 64, scale, 3).mean((1, 3))
    assert abs(coarse - render(s)).max() <= 40 and abs(coarse - render(s)).mean() <= 0.5


def parsed(text: str) -> Prompt:
    """What a caption says, found without the code that wrote it."""
    left = text
    ground = None
    if match := re.search(r" on an? (\w+) ground$", left):
        ground, left = match[1], left[: match.start()]
    elif match := re.match(r"an? (\w+) ground with ", left):
        ground, left = match[1], left[match.end() :]
    left = left.removeprefix("there is ")
    swapped = left.endswith(" inside")
    left = left.removesuffix(" inside")
    pieces = re.split(r" (?:which is )?(left of|right of|above|below|inside|and|with) ", left)
    wants = []
    for noun in pieces[::2]:
        article, *words = noun.split()
        assert article == ("an" if words[0][0] in "aeiou" else "a")
        size = next((w for w in words if w in SIZES), None)
        fill = next((w for w in words if w in FILLS), None)
        (colour,) = (w for w in words if w in COLOURS)
        (form,) = (w for w in words if w in FORMS)
        assert words == [w for w in (size, colour, fill, form) if w]
        wants.append(Wanted(form, colour, size, fill))
    relations = tuple(w for w in pieces[1::2] if w in RELATIONS)
    if swapped:
        assert pieces[1] == "with"
        wants, relations = wants[::-1], ("inside",)
    return Prompt(text, tuple(wants), relations, ground)


@given(drawn)
def test_captions_say_what_the_prompt_wants_and_it_is_true(s):
    said = wordings(s)
    assert captions(s) == tuple(p.text for p in said) and len(set(captions(s))) == len(said) >= 4
    for prompt in said:
        assert parsed(prompt.text) == prompt
        assert prompt.text == prompt.text.lower()
        assert len(prompt.text.split()) <= (22 if len(s.objects) < 3 else 30)
        assert prompt.ground in (None, s.ground)
        for i, want in enumerate(prompt.objects):
            (thing,) = (o for o in s.objects if (o.form, o.colour) == (want.form, want.colour))
            assert want.size in (None, thing.size) and want.fill in (None, thing.fill)
            if i < len(prompt.relations):
                after = prompt.objects[i + 1]
                (other,) = (o for o in s.objects if (o.form, o.colour) == (after.form, after.colour))
                assert holds(prompt.relations[i], thing, other)


def test_the_vocabulary_is_small():
    words = {
        w for split in SPLITS for i in range(500) for c in captions(scene(i, split=split)) for w in c.split()
    }
    assert len(words) <= 50


@given(st.integers(0, 20), splits, st.integers(0, 9))
@settings(max_examples=20)
def test_prompts_are_repeatable_and_state_every_relation(n, split, seed):
    chosen = prompts(n, split=split, seed=seed)
    assert chosen == prompts(n + 3, split=split, seed=seed)[:n]
    assert all(len(p.relations) == len(p.objects) - 1 for p in chosen)


def test_a_source_is_a_sequence():
    source = ShapesSource(5, seed=3, split="val", resolution=128)
    pairs = list(source)
    assert len(source) == len(pairs) == 5
    picture, said = pairs[2]
    assert (picture == render(scene(2, seed=3, split="val"), 128)).all() and said == captions(
        scene(2, seed=3, split="val")
    )
    for i in (5, -1):
        with pytest.raises(IndexError):
            source[i]


def test_fingerprints_tell_sources_apart():
    makes = [
        ShapesSource(5),
        ShapesSource(6),
        ShapesSource(5, seed=1),
        ShapesSource(5, split="val"),
        ShapesSource(5, resolution=128),
    ]
    assert len({s.fingerprint() for s in makes}) == 5
    assert makes[0].fingerprint() == ShapesSource(5).fingerprint()


@pytest.mark.parametrize(
    "request_, words",
    [
        (lambda: scene(0, split="held-colour"), "held-c"),
        (lambda: ShapesSource(3, split="trian"), "'train'"),
        (lambda: prompts(3, split="vale"), "'val'"),
        (lambda: scene(0, objects=3), "3"),
        (lambda: scene(-1), "-1"),
        (lambda: render(scene(0), 96), "96"),
        (lambda: render(Scene("whit", (), ())), "'white'"),
        (lambda: holds("left", *scene(0, objects=2).objects), "'left of'"),
        (lambda: prompts(-1), "-1"),
        (lambda: ShapesSource(3, resolution=32), "32"),
    ],
)
def test_mistakes_are_named(request_, words):
    with pytest.raises(RequestError, match=re.escape(words)):
        request_()
