"""Scores of a ranker that captions, beside those of the same ranker without a captioner."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from armchair.bundle import read_bundle, write_bundle
from armchair.errors import BundleError, RequestError
from armchair.image.pixels import to_pil
from armchair.sample.export import export_bundle
from armchair.sample.pipeline import load_artist
from armchair.sample.ranker import Ranker, load_ranker
from conftest import write_tiny_bundle

PROMPTS = ["a red circle", "two blue squares", "a", "a green star left of a large blue cross on a grey ground"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("captioned") / "tiny", ranked=True, captioned=True)


@pytest.fixture(scope="module")
def ranker(bundle: Path) -> Ranker:
    return load_ranker(bundle, "cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    """Towers of the same weights."""
    return load_ranker(write_tiny_bundle(tmp_path_factory.mktemp("plain") / "tiny", ranked=True), "cpu")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return to_pil(tiny.pictures(20, 16))


def test_a_score_is_the_cosine_and_what_the_caption_adds(ranker: Ranker, plain: Ranker, images: list) -> None:
    prompts = [PROMPTS[i % 4] for i in range(len(images))]
    cosines, scores = plain.score(images, prompts), ranker.score(images, prompts)
    said = ranker.caption_log_probs(ranker.image_states(images), prompts)
    assert all(value < 0 for value in said) and len(set(said)) == len(said)
    assert scores == pytest.approx([cosine + 0.5 * log_p for cosine, log_p in zip(cosines, said, strict=True)])
    for image, prompt, log_p in zip(images[:4], prompts, said, strict=False):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            tokens = ranker._read_texts([prompt])
            expected = ranker.model.caption_log_prob(ranker.model.image_states(pixels), tokens) / math.log(2)
        assert log_p == pytest.approx(float(expected), abs=1e-4)


def test_where_a_caption_counts_for_nothing_scores_are_cosines(bundle: Path, plain: Ranker, images: list) -> None:
    ranker = load_ranker(bundle, "cpu")
    ranker.caption_weight = 0.0
    assert ranker.rank(images, PROMPTS[0]) == plain.rank(images, PROMPTS[0])
    assert torch.equal(ranker.embed_images(images), plain.embed_images(images))
    assert torch.equal(ranker.embed_texts(PROMPTS), plain.embed_texts(PROMPTS))


def test_a_score_does_not_depend_on_what_else_is_scored(ranker: Ranker, images: list) -> None:
    prompts = [PROMPTS[i * i % 4] for i in range(len(images))]
    together = ranker.score(images, prompts)
    assert together == [ranker.rank(image, prompt)[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together[3:9] == ranker.score(images[3:9], prompts[3:9])


def test_candidates_are_ranked_by_both(bundle: Path) -> None:
    artist = load_artist(bundle, "cpu")
    drawing, few = (artist.draw(PROMPTS[0], candidates=count) for count in (9, 5))
    assert drawing.scores == sorted(drawing.scores, reverse=True)
    assert drawing.scores == artist.rank(drawing.images, PROMPTS[0])
    scores = dict(zip(drawing.candidates, drawing.scores, strict=True))
    assert all(scores[c] == score for c, score in zip(few.candidates, few.scores, strict=True))
    assert len(artist.draw(PROMPTS[0], candidates=8, keep=2, halve=True).images) == 2


def test_a_ranker_without_a_captioner_says_so(plain: Ranker, images: list) -> None:
    assert plain.caption_weight == 0
    for ask in (lambda: plain.image_states(images), lambda: plain.caption_log_probs(torch.zeros(1, 17, 16), ["a"])):
        with pytest.raises(RequestError, match="ranker of bundle tiny has no captioner"):
            ask()


def test_an_exported_bundle_scores_the_same(bundle: Path, ranker: Ranker, images: list, tmp_path: Path) -> None:
    export_bundle(bundle, tmp_path / "eight")
    assert load_ranker(tmp_path / "eight", "cpu").rank(images, PROMPTS[1]) == ranker.rank(images, PROMPTS[1])


def test_weights_without_the_captioner_that_the_recipe_has_are_refused(bundle: Path, tmp_path: Path) -> None:
    whole = read_bundle(bundle)
    weights = {part: whole.weights(part) for part in whole.parts}
    weights["ranker"] = {name: w for name, w in weights["ranker"].items() if not name.startswith("captioner.")}
    tokenizer = whole.text_tokenizer
    write_bundle(tmp_path / "b", info=whole.info, card=whole.card, text_tokenizer=tokenizer, weights=weights)
    with pytest.raises(BundleError, match="ranker.safetensors does not fit"):
        load_ranker(tmp_path / "b", "cpu")
