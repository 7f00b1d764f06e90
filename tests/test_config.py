import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from armchair.config import from_dict, nearest, to_dict, with_overrides
from armchair.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.96)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise RequestError(f"lr: expected a positive number, got {self.lr}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    steps: int
    name: str = "x"
    flip: bool = False
    widths: tuple[int, ...] = ()
    size: int | str = "auto"
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    optimiser: Optimiser = Optimiser()
    stages: tuple[Optimiser, ...] = ()
    extra: Any = None


finite = st.floats(allow_nan=False, allow_infinity=False)
optimisers = st.builds(
    Optimiser,
    lr=st.floats(1e-9, 1e9),
    betas=st.tuples(finite, finite),
    clip=st.none() | finite,
)
recipes = st.builds(
    Recipe,
    steps=st.integers(),
    name=st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    flip=st.booleans(),
    widths=st.lists(st.integers()).map(tuple),
    size=st.integers() | st.just("auto"),
    weights=st.dictionaries(st.text("abc", min_size=1), finite, max_size=3),
    optimiser=optimisers,
    stages=st.lists(optimisers, max_size=2).map(tuple),
)


@given(recipes)
def test_round_trip(recipe: Recipe) -> None:
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert from_dict(Recipe, yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "missing field 'steps'"),
        ({"step": 3}, "unknown field 'step': did you mean 'steps'?"),
        ({"steps": 3, 7: 1}, "unknown field '7': valid names: steps, name"),
        ({"steps": 3, "optimiser": {"lrr": 1}}, "unknown field 'optimiser.lrr': did you mean 'lr'?"),
        ({"steps": 3, "stages": [{}, {"lrr": 1}]}, "unknown field 'stages[1].lrr': did you mean 'lr'?"),
        ({"steps": 3, "optimiser": [1]}, "optimiser: expected a mapping of fields, got [1]"),
        ({"steps": 3, "optimiser": {"lr": -1}}, "optimiser: lr: expected a positive number, got -1.0"),
        ({"steps": "3"}, "steps: expected int, got '3'"),
        ({"steps": 3.0}, "steps: expected int, got 3.0"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"steps": None}, "steps: expected int, got None"),
        ({"steps": 3, "name": 3}, "name: expected str, got 3"),
        ({"steps": 3, "flip": 1}, "flip: expected bool, got 1"),
        ({"steps": 3, "widths": 4}, "widths: expected a list, got 4"),
        ({"steps": 3, "widths": [4, "x"]}, "widths[1]: expected int, got 'x'"),
        ({"steps": 3, "size": 1.5}, "size: expected str, got 1.5"),
        ({"steps": 3, "weights": [1]}, "weights: expected a mapping, got [1]"),
        ({"steps": 3, "weights": {"a": "b"}}, "weights.a: expected float, got 'b'"),
        ({"steps": 3, "optimiser": {"betas": [1]}}, "optimiser.betas: expected 2 values, got [1]"),
        ({"steps": 3, "optimiser": {"betas": [1, False]}}, "optimiser.betas[1]: expected float, got False"),
        ({"steps": 3, "optimiser": {"lr": float("nan")}}, "optimiser.lr: expected float, got nan"),
        ({"steps": 3, "optimiser": {"lr": "inf"}}, "optimiser.lr: expected float, got 'inf'"),
        ([], "Recipe: expected a mapping of fields, got []"),
    ],
)
def test_strict_reading(data: Any, message: str) -> None:
    with pytest.raises(RequestError) as error:
        from_dict(Recipe, data)
    assert str(error.value).startswith(message)


def test_a_number_too_large_for_a_float() -> None:
    with pytest.raises(RequestError, match="optimiser.lr: expected float"):
        from_dict(Recipe, {"steps": 3, "optimiser": {"lr": 10**400}})


def test_numbers_as_yaml_reads_them() -> None:
    recipe = from_dict(
        Recipe, yaml.safe_load("{steps: 3, optimiser: {lr: 1e-4, clip: 4, betas: [1e-1, .9]}}")
    )
    assert recipe.optimiser == Optimiser(1e-4, (0.1, 0.9), 4.0)
    assert isinstance(recipe.optimiser.clip, float)
    assert from_dict(Recipe, {"steps": 3, "optimiser": {"clip": None}}).optimiser.clip is None


def test_overrides() -> None:
    data = {"steps": 3, "optimiser": {"lr": 1.0}}
    out = with_overrides(data, {"optimiser.clip": 2, "optimiser.lr": 5, "weights.a": 1, "steps": 4})
    assert out == {"steps": 4, "optimiser": {"lr": 5, "clip": 2}, "weights": {"a": 1}}
    assert data == {"steps": 3, "optimiser": {"lr": 1.0}}
    for overrides, message in (
        ({"optimiser.lrr": 1}, "'optimiser.lrr': did you mean 'lr'"),
        ({"optimizer.lr": 1}, "'optimizer': did you mean 'optimiser'"),
        ({"steps.a": 1}, "steps: expected int"),
        ({"": 1}, "unknown field ''"),
    ):
        with pytest.raises(RequestError, match=message):
            from_dict(Recipe, with_overrides(data, overrides))


def test_nearest() -> None:
    assert nearest("prio", ["ranker", "prior"]) == "did you mean 'prior'?"
    assert nearest("conv", ["column", "convolutional"]) == "did you mean 'convolutional'?"
    assert nearest("zzz", ["ranker", "prior"]) == "valid names: ranker, prior"
