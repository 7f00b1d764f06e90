import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from armchair.errors import RequestError
from armchair.shapes.accuracy import ATTRIBUTES, Accuracy, Verdict, judge, judge_scene, wilson
from armchair.shapes.captions import prompts, wordings
from armchair.shapes.world import (
    COLOURS,
    FILLS,
    FORMS,
    GROUNDS,
    SIZES,
    SPLITS,
    Scene,
    relation_of,
    render,
    scene,
)

drawn = st.builds(lambda i, split: scene(i, split=split), st.integers(0, 10**6), st.sampled_from(SPLITS))
ONE_OFF = {"form": FORMS, "colour": tuple(COLOURS), "size": SIZES, "fill": FILLS}
MARK = {"form": "forms", "colour": "colours", "size": "sizes", "fill": "fills"}


def test_a_prompts_own_picture_is_whole():
    right = []
    for split in SPLITS:
        for i, prompt in enumerate(prompts(60, split=split, seed=21)):
            right.append(judge(prompt, render(scene(i, split=split, seed=21))).whole)
    assert np.mean(right) >= 0.999


@given(drawn)
def test_every_wording_holds_of_its_scene_in_any_order(s):
    turned = Scene(s.ground, s.objects[::-1], ())
    for prompt in wordings(s):
        verdict = judge_scene(prompt, turned)
        assert verdict.whole and all(getattr(verdict, name) is not False for name in ATTRIBUTES)


@given(drawn, st.data())
def test_one_wrong_attribute_is_found_and_named(s, data):
    prompt = data.draw(st.sampled_from(wordings(s)))
    k = data.draw(st.integers(0, len(s.objects) - 1))
    name = data.draw(st.sampled_from(sorted(ONE_OFF)))
    was = getattr(s.objects[k], name)
    now = data.draw(st.sampled_from([v for v in ONE_OFF[name] if v != was]))
    changed = replace(s.objects[k], **{name: now})
    (want,) = (w for w in prompt.objects if (w.form, w.colour) == (s.objects[k].form, s.objects[k].colour))
    things = (*s.objects[:k], changed, *s.objects[k + 1 :])
    if name == "size":  # a larger inner object is no longer inside
        assume([relation_of(a, b) for a, b in itertools.pairwise(things)] == list(s.relations))
    verdict = judge_scene(prompt, Scene(s.ground, things, ()))
    if getattr(want, name) is None:
        assert verdict.whole
    else:
        assert not verdict.whole and verdict.count
        assert len(s.objects) > 1 or getattr(verdict, MARK[name]) is False


@given(drawn, st.data())
def test_wrong_ground_count_and_relation_are_found(s, data):
    prompt = data.draw(st.sampled_from([p for p in wordings(s) if len(p.relations) == len(s.relations)]))
    other = data.draw(st.sampled_from([g for g in GROUNDS if g != s.ground]))
    verdict = judge_scene(prompt, Scene(other, s.objects, ()))
    assert verdict.whole is (prompt.ground is None) and verdict.ground is (
        None if prompt.ground is None else False
    )
    for things in (s.objects[1:], (*s.objects, replace(s.objects[0], form="none")), ()):
        verdict = judge_scene(prompt, Scene(s.ground, things, ()))
        assert not verdict.whole and not verdict.count
    if len(s.objects) == 2:
        a, b = s.objects
        if "inside" in s.relations:
            b = replace(b, x=b.x + 40)
        elif "of" in s.relations[0]:
            a, b = replace(a, x=b.x), replace(b, x=a.x)
        else:
            a, b = replace(a, y=b.y), replace(b, y=a.y)
        verdict = judge_scene(prompt, Scene(s.ground, (a, b), ()))
        assert not verdict.whole and verdict.relations is False and verdict.forms and verdict.colours


@given(drawn, st.sampled_from(sorted(COLOURS)))
@settings(max_examples=25)
def test_a_repainted_picture_is_not_whole(s, colour):
    assume(colour != s.objects[0].colour)
    painted = replace(s.objects[0], colour=colour)
    assume(len(s.objects) == 1 or relation_of(painted, s.objects[1]) != "inside")
    picture = render(Scene(s.ground, (painted, *s.objects[1:]), s.relations))
    assert not judge(wordings(s)[0], picture).whole


@given(st.integers(1, 2000), st.data())
def test_the_interval_holds_the_share(number, data):
    right = data.draw(st.integers(0, number))
    low, high = wilson(right, number)
    assert 0 <= low <= right / number + 1e-12 and right / number - 1e-12 <= high <= 1


def test_accuracy_counts_only_what_was_said():
    yes = Verdict(
        whole=True, count=True, forms=True, colours=True, sizes=None, fills=True, relations=None, ground=None
    )
    no = replace(yes, whole=False, colours=False, fills=None)
    found = Accuracy.of([yes, yes, no, yes])
    assert (found.number, found.whole) == (4, 0.75)
    assert found.shares == {
        "count": 1.0,
        "forms": 1.0,
        "colours": 0.75,
        "sizes": None,
        "fills": 1.0,
        "relations": None,
        "ground": None,
    }
    assert found.interval == pytest.approx((0.3006, 0.9544), abs=1e-3)
    with pytest.raises(RequestError):
        Accuracy.of([])
