import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from armchair.config import from_dict
from armchair.data import token_cache
from armchair.data.loader import load_item
from armchair.data.sources import DataConfig, Sample, open_source
from armchair.data.token_cache import TokenCache, build_cache, open_cache
from armchair.errors import DataError
from armchair.image.pixels import BrokenSample, square, stack
from armchair.train import run as run_module
from armchair.train.recipe import Recipe
from armchair.train.report import Report
from armchair.train.run import Run
from train import train_tiny

CONFIG = DataConfig(resolution=16, crop="random", flip=True)


class Memory:
    """Small pictures in memory, some of them broken."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()):
        self.n, self.broken = n, broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        if i in self.broken:
            raise BrokenSample("damaged image")
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Sample(pixels, tuple(self.fields(i)["caption"]))

    def key(self, i: int) -> str:
        return f"memory/{i}"

    def fields(self, i: int) -> dict:
        return {"caption": [f"picture {i}", f"the {i}th"], "kind": "odd" if i % 2 else "even"}

    def fingerprint(self) -> str:
        return f"{self.n} {self.broken}"


def build(folder: Path, source: Memory, config: DataConfig = CONFIG, views: int = 1, **options) -> TokenCache:
    encode = torch.inference_mode()(tiny.dvae().encode)
    return build_cache(folder, source, config, encode, fingerprint="f", views=views, seed=3, **options)


def all_codes(cache: TokenCache, view: int) -> torch.Tensor:
    images = np.arange(len(cache))
    return cache.codes(images, np.full_like(images, view))


@torch.inference_mode()
def encoded(images: list[np.ndarray]) -> torch.Tensor:
    return tiny.dvae().encode(stack(images)).flatten(1)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_codes_are_those_of_the_images_and_their_crops(tmp_path, batch_size):
    source = Memory(11)
    cache = build(tmp_path / "c", source, views=3, batch_size=batch_size)
    assert len(cache) == 11 and cache.views == 3
    codes = all_codes(cache, 0)
    assert codes.dtype == torch.int64 and codes.shape == (11, 16)
    assert torch.equal(codes, encoded([square(source[i].image, 16) for i in range(11)]))
    for view in (1, 2):
        crops = [load_item(source, i, i * 3 + view, CONFIG, 3)[0] for i in range(11)]
        assert torch.equal(all_codes(cache, view), encoded(crops))
    assert not torch.equal(all_codes(cache, 1), all_codes(cache, 2))


@settings(max_examples=15)
@given(
    n=st.integers(1, 23),
    shard=st.integers(1, 8),
    broken=st.sets(st.integers(0, 22), max_size=4),
    data=st.data(),
)
def test_shards_and_skipped_images_keep_codes_and_captions_together(tmp_path_factory, n, shard, broken, data):
    source = Memory(n, tuple(broken))
    kept = [i for i in range(n) if i not in broken]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "SHARD", shard)
        patch.setattr("armchair.data.loader.MAX_BROKEN", 1.0)
        folder = tmp_path_factory.mktemp("cache") / "c"
        if not kept:
            with pytest.raises(DataError, match="no image could be encoded"):
                build(folder, source)
            return
        cache = build(folder, source, views=2, batch_size=data.draw(st.integers(1, 5)))
        assert len(list(folder.glob("codes-*.npy"))) == -(-len(kept) // shard)
        expected = encoded([square(source[i].image, 16) for i in kept])
        picked = np.array(data.draw(st.lists(st.integers(0, len(kept) - 1), min_size=1, max_size=6)))
        assert torch.equal(cache.codes(picked, np.zeros_like(picked)), expected[torch.from_numpy(picked)])
    assert cache.captions == [[[f"picture {i}", f"the {i}th"]] for i in kept]
    assert cache.weights.tolist() == [1.0] * len(kept)


def test_captions_follow_the_templates_and_weights_the_recipe(tmp_path):
    config = DataConfig(
        resolution=16, captions=("{caption}", "a {kind} one"), weights={r"picture [0-4]\b": 3.0}
    )
    cache = build(tmp_path / "c", Memory(10), config)
    assert cache.captions[3] == [["picture 3", "the 3th"], ["a odd one"]]
    assert cache.weights[0] / cache.weights[9] == pytest.approx(3)
    assert cache.weights.mean() == pytest.approx(1)


def test_broken_images_are_left_out_and_counted(tmp_path, caplog):
    cache = build(tmp_path / "c", Memory(300, broken=(2, 250)))
    assert len(cache) == 298
    info = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert info["images"] == 298 and info["broken"] == {"damaged image": 2}
    assert "memory/2'" in caplog.text and "memory/250'" in caplog.text
    assert cache.captions[2] == [["picture 3", "the 3th"]]


def test_too_many_broken_images_stop_with_the_counts(tmp_path):
    with pytest.raises(DataError, match=r"4 broken samples .* \(4 damaged image\)"):
        build(tmp_path / "c", Memory(300, broken=(1, 5, 9, 13)))
    assert open_cache(tmp_path / "c", "f") is None


def test_a_cache_is_opened_only_by_its_own_fingerprint(tmp_path):
    built = build(tmp_path / "c", Memory(5))
    found = open_cache(tmp_path / "c", "f")
    assert found is not None and found.captions == built.captions
    assert torch.equal(all_codes(found, 0), all_codes(built, 0))
    assert open_cache(tmp_path / "c", "g") is None
    assert open_cache(tmp_path / "nothing", "f") is None
    (tmp_path / "c" / "cache.json").write_text("{")
    assert open_cache(tmp_path / "c", "f") is None


@pytest.mark.parametrize("crash", ["encode", "rmtree", "replace"])
def test_a_crash_leaves_no_cache_that_looks_whole(tmp_path, monkeypatch, crash):
    class Crash(BaseException):
        pass

    def die(*args, **kwargs):
        raise Crash

    folder = tmp_path / "c"
    with monkeypatch.context() as patch:
        if crash == "encode":
            patch.setattr(token_cache, "stack", die)
        else:
            # The first rmtree only clears what an earlier crash left.
            real, calls = shutil.rmtree, iter(range(9))
            patch.setattr(
                shutil,
                "rmtree",
                lambda *a, **k: die() if next(calls) and crash == "rmtree" else real(*a, **k),
            )
            if crash == "replace":
                patch.setattr(os, "replace", die)
        with pytest.raises(Crash):
            build(folder, Memory(5))
    assert open_cache(folder, "f") is None
    assert len(build(folder, Memory(5))) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# What a run counts as stale.


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    built: list[str] = []

    def counting(folder, *args, **options):
        built.append(folder.name)
        return build_cache(folder, *args, **options)

    monkeypatch.setattr(run_module, "build_cache", counting)
    return built


def cache_of(folder: Path, tokenizer, views: int = 1, **changes) -> TokenCache:
    """The training cache as a run with these changes of the recipe would get it."""
    fields = {**train_tiny.RECIPE, "seed": changes.pop("seed", 0)}
    recipe = from_dict(Recipe, {**fields, "data": {"train": ["shapes:train,length=6"], **changes}})
    source = open_source(recipe.data.train, recipe.data)
    with contextlib.closing(Report(folder, None)) as report:
        run = Run(recipe, folder, sources=(source, source), report=report, device=torch.device("cpu"))
        return run._cache("train", source, tokenizer, views)


@pytest.fixture
def tokenizer():
    return tiny.dvae(resolution=64, patch=8)


def test_a_cache_is_used_again_where_nothing_has_changed(tmp_path, builds, tokenizer):
    first = cache_of(tmp_path, tokenizer)
    again = cache_of(tmp_path, tiny.dvae(resolution=64, patch=8))
    assert builds == ["train"]
    assert torch.equal(all_codes(first, 0), all_codes(again, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"views": 2},
        {"seed": 1},
        {"train": ["shapes:train,length=7"]},
        {"train": ["shapes:train,length=6,seed=1"]},
        {"crop": "square"},
        {"flip": True},
        {"weights": {"red": 2.0}},
        {"captions": ["a drawing of {caption}"]},
    ],
    ids=str,
)
def test_a_cache_of_other_data_or_settings_is_not_used(tmp_path, builds, tokenizer, changes):
    cache_of(tmp_path, tokenizer)
    cache = cache_of(tmp_path, tokenizer, **changes)
    assert builds == ["train", "train"]
    fresh = cache_of(tmp_path / "fresh", tokenizer, **changes)
    assert torch.equal(all_codes(cache, 0), all_codes(fresh, 0)) and cache.captions == fresh.captions


def test_a_cache_of_other_weights_is_not_used(tmp_path, builds, tokenizer):
    cache_of(tmp_path, tokenizer)
    with torch.no_grad():
        next(tokenizer.parameters()).flatten()[0].add_(1e-6)
    cache_of(tmp_path, tokenizer)
    cache_of(tmp_path, tokenizer)
    assert builds == ["train", "train"]
