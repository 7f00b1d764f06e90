import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hypothesis
import pytest
import torch

import tiny
from armchair.bundle import write_bundle
from armchair.card import render_card
from armchair.cli import main
from armchair.clip.model import TextShape
from armchair.config import from_dict, to_dict
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior
from armchair.shapes.captions import prompts
from armchair.text.bpe import TextTokenizer
from armchair.train.recipe import Recipe

# No test of ours is about how long one example takes, and a busy machine would fail it at random.
hypothesis.settings.register_profile("armchair", deadline=None)
hypothesis.settings.load_profile("armchair")


if "PYTEST_XDIST_WORKER" in os.environ:  # tests are shared out to processes, which would take each other's cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command that draws or serves sets up the process that it runs in, which here is that of all tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as Playwright drives it, for tests of pages; of a module, as it keeps an event loop running."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if not Path(CHROMIUM).is_file():
        pytest.skip("needs Chromium: apt-get install chromium, or its path in $CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def tiny_recipe_dict(resolution: int = 16) -> dict[str, Any]:
    """A recipe of 16 x 16 pictures, or larger, 4 x 4 codes and all four attention patterns; it names no data."""
    fit = {"batch_size": 4, "lr": 1e-3, "warmup": 1, "precision": "fp32"}
    image_tokenizer = {"resolution": resolution, "patch": resolution // 8, "n_groups": 2, "n_blocks": 1}
    image_tokenizer |= {"n_hid": 8, "n_init": 8}
    return {
        "name": "tiny",
        "description": "Random weights, for tests.",
        "licence": "none",
        "data": {"resolution": resolution, "crop": "square"},
        "text_tokenizer": {"vocab_size": 300, "length": 8},
        "image_tokenizer": {**image_tokenizer, "codebook_size": 32, "stem_kernel": 3},
        "prior": {
            "d_model": 32,
            "n_layer": 4,
            "n_head": 2,
            "attention": ["row", "column", "convolutional", "full"],
            "last_attention": None,
            "code_features": 8,
        },
        "autoencoder_training": {**fit, "steps": 2, "images": 8},
        "image_tokenizer_training": {
            **fit,
            "steps": 2,
            "min_psnr": -99.0,
            "min_usage": 0.0,
        },
        "prior_training": {**fit, "steps": 2},
        "drawing": {"guidance": 1.5, "top_p": 0.95},
    }


def write_tiny_bundle(
    out: Path,
    seed: int = 0,
    *,
    ranked: bool = False,
    captioned: bool = False,
    resolution: int = 16,
    options: Mapping[str, Any] = MappingProxyType({}),
    **changes: Any,
) -> Path:
    """A bundle of random weights at `out`, with a ranker if `ranked`, which captions too if `captioned`.

    `options`: of its prior, as in `tiny.OPTIONS`; `changes` replace fields of its info.
    """
    fields = tiny_recipe_dict(resolution)
    fields["prior"] |= {**options, **({"code_features": 0} if options.get("tied") else {})}
    captioner = tiny.CAPTIONER if captioned else None
    if ranked:
        sizes = to_dict(tiny.clip_config(captioner=captioner))
        fields |= {"ranker": sizes, "ranker_training": {"steps": 2, "batch_size": 4, "lr": 1e-3}}
    recipe = from_dict(Recipe, fields)
    text_tokenizer = TextTokenizer.train([p.text for p in prompts(50)], recipe.text_tokenizer.vocab_size)
    image_tokenizer = tiny.dvae(seed, **to_dict(recipe.image_tokenizer))
    shape = StreamShape(
        text_vocab_size=text_tokenizer.vocab_size,
        text_length=recipe.text_tokenizer.length,
        codebook_size=image_tokenizer.codebook_size,
        grid=image_tokenizer.grid,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = Prior(recipe.prior, shape, image_tokenizer.code_vectors)
        tiny.randomise(prior)
    info: dict[str, Any] = {
        "name": recipe.name,
        "recipe": to_dict(recipe),
        "text_vocab_size": text_tokenizer.vocab_size,
        "metrics": {"prior": {"loss": 3.0, "command": "none"}},
        "data": {"fingerprint": "0", "images": 0, "licence": recipe.licence},
        "versions": {},
        **changes,
    }
    weights = {
        part: {k: v.half() for k, v in model.state_dict().items()}
        for part, model in (("image_tokenizer", image_tokenizer), ("prior", prior))
    }
    if ranked:
        texts = TextShape.of_captions(shape.text_length, shape.text_vocab_size)
        ranker = tiny.clip(seed, shape=texts, captioner=captioner)
        weights["ranker"] = {k: v.half() for k, v in ranker.state_dict().items()}
    write_bundle(
        out, info=info, card=render_card(info), text_tokenizer=text_tokenizer.to_json(), weights=weights
    )
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a bundle that draws at once: 16 x 16 pixels, 4 x 4 codes, random weights."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve captioned images."""
    out = tmp_path_factory.mktemp("data") / "pictures"
    assert main(["data", "build", "shapes", "--out", str(out), "--count", "12", "--split", "val"]) == 0
    return out
