"""Prompts with words to choose from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armchair.errors import RequestError
from armchair.serve.prompt_grid import MAX_COMBINATIONS, parse_prompt

PLAIN = st.text(st.characters(exclude_characters="{}|", exclude_categories=["Cs"]), max_size=12)
WORD = PLAIN.map(str.strip).filter(bool)
CHOICES = st.lists(st.lists(WORD, min_size=2, max_size=3, unique=True), min_size=1, max_size=3)


@given(CHOICES, st.data())
def test_every_combination_is_there_once_and_the_last_choice_changes_fastest(choices, data):
    texts = [data.draw(PLAIN) for _ in range(len(choices) + 1)]
    written = texts[0] + "".join("{" + "|".join(c) + "}" + t for c, t in zip(choices, texts[1:], strict=True))
    grid = parse_prompt(written)
    assert [list(words) for words in grid.choices] == choices
    found = grid.prompts()
    assert len(found) == math.prod(map(len, choices)) == grid.combinations
    for place, prompt in enumerate(found):
        for words in reversed(choices):
            place, which = divmod(place, len(words))
            assert words[which] in prompt


@given(PLAIN)
def test_a_prompt_without_braces_is_itself(prompt):
    assert parse_prompt(prompt).prompts() == [prompt] and not parse_prompt(prompt).choices


def test_the_published_example():
    prompts = parse_prompt("a {red|green|blue} {heart|star} in {flat|noto} style").prompts()
    assert len(prompts) == 12
    assert prompts[:3] == [
        "a red heart in flat style",
        "a red heart in noto style",
        "a red star in flat style",
    ]
    assert prompts[-1] == "a blue star in noto style"


def test_an_empty_choice_leaves_no_gap_and_doubles_are_one():
    assert parse_prompt("a {|big} dog").prompts() == ["a dog", "a big dog"]
    assert parse_prompt("{ red |red| blue } dog").prompts() == ["red dog", "blue dog"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a {red|blue", 'without its "}"'),
        ("a red} dog", 'without its "{"'),
        ("a {red|{dark|light} blue} dog", "cannot stand within"),
        ("a {red} dog", "at least two"),
        ("a {} dog", "at least two"),
        ("{a|b|c|d|e|f|g} {a|b|c|d|e|f|g}", f"7 × 7 = 49 combinations; a table has at most {MAX_COMBINATIONS}"),
    ],
)
def test_what_is_wrong_is_said(prompt, said):
    with pytest.raises(RequestError, match=".") as error:
        parse_prompt(prompt)
    assert said in str(error.value)
