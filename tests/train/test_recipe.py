from pathlib import Path

import pytest
import torch

from armchair.config import from_dict, to_dict
from armchair.errors import RequestError
from armchair.image.dvae import DVAEConfig
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior, PriorConfig
from armchair.train.recipe import Recipe, read_recipe
from train import train_tiny

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = """
name: small
data: {resolution: 64}
image_tokenizer: {resolution: 64, patch: 4, n_groups: 2}
image_tokenizer_training: {steps: 10, batch_size: 4, lr: 1e-4}
prior_training: {steps: 20, batch_size: 8, lr: 4.5e-4}
"""


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


FIT = {"steps": 1, "batch_size": 1, "lr": 1e-3}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert recipe.data.resolution == recipe.image_tokenizer.resolution
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_there_are_recipes():
    assert RECIPES


def test_the_papers_recipe_is_the_papers():
    """Its numbers as published (sections 2 and appendices A and B), and of a size that nothing here could hold."""
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "dalle-12b"))
    assert recipe.prior == PriorConfig() and recipe.image_tokenizer == DVAEConfig()
    assert not recipe.data.train and recipe.ranker is None and recipe.autoencoder_training is None
    t, p = recipe.image_tokenizer_training, recipe.prior_training
    assert (t.batch_size, t.lr, t.final_lr) == (512, 1e-4, 1.25e-6)
    assert (p.batch_size, p.steps, p.lr, p.warmup, p.schedule) == (1024, 430_000, 4.5e-4, 5_000, "plateau")
    assert (p.lr_width, p.matrix_lr, p.beta2, p.weight_decay, p.clip) == (3968, None, 0.96, 4.5e-2, 4)
    assert not (p.caption_dropout or p.dropout or p.code_dropout or p.code_noise or p.label_smoothing)
    shape = StreamShape(
        text_vocab_size=recipe.text_tokenizer.vocab_size,
        text_length=recipe.text_tokenizer.length,
        codebook_size=recipe.image_tokenizer.codebook_size,
        grid=recipe.image_tokenizer.grid,
    )
    assert shape == StreamShape(text_vocab_size=16384, text_length=256, codebook_size=8192, grid=32)
    with torch.device("meta"):
        prior = Prior(recipe.prior, shape)
    assert round(sum(w.numel() for w in prior.parameters()) / 1e9) == 12


def test_fields_left_out_are_the_papers(small):
    recipe = read_recipe(small)
    assert recipe.image_tokenizer_training.lr == 1e-4  # YAML itself reads 1e-4 as text
    t, p = recipe.image_tokenizer_training, recipe.prior_training
    assert (t.tau_start, t.tau_end, t.tau_steps, t.kl_weight, t.kl_steps) == (1, 1 / 16, 150_000, 6.6, 5_000)
    assert (t.beta1, t.beta2, t.eps, t.weight_decay, t.ema) == (0.9, 0.999, 1e-8, 1e-4, 0.999)
    assert (p.beta1, p.beta2, p.eps, p.weight_decay, p.clip, p.text_weight) == (
        0.9,
        0.96,
        1e-8,
        4.5e-2,
        4,
        1 / 8,
    )
    text = recipe.text_tokenizer
    assert (text.vocab_size, text.length, text.dropout) == (16384, 256, 0.1)


def test_overrides_are_dotted_names(small):
    recipe = read_recipe(small, {"prior.n_layer": 4, "prior.d_model": 128, "prior.n_head": 4, "seed": 3})
    assert (recipe.prior.n_layer, recipe.prior.d_model, recipe.seed) == (4, 128, 3)
    assert recipe.prior_training.steps == 20
    both = {"data.resolution": 128, "image_tokenizer.resolution": 128}
    assert read_recipe(small, both).image_tokenizer.grid == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prior.n_layers": 4}, r"'prior\.n_layers'.*did you mean 'n_layer'"),
        ({"prior_trainning.lr": 4}, r"'prior_trainning'.*did you mean 'prior_training'"),
        ({"image_tokenizer_training.tau_step": 1}, r"'image_tokenizer_training\.tau_step'.*'tau_steps'"),
        ({"data.flips": True}, r"'data\.flips'.*'flip'"),
        ({"prior.n_layer": "four"}, r"prior\.n_layer: expected int, got 'four'"),
        ({"prior.n_layer": 4.5}, r"prior\.n_layer: expected int, got 4\.5"),
        ({"prior_training.lr": "fast"}, r"prior_training\.lr: expected float, got 'fast'"),
        ({"prior_training.lr": 0}, r"prior_training: lr: expected a number above 0"),
        ({"prior_training.steps": 0}, r"prior_training: steps: expected at least 1, got 0"),
        ({"prior_training.schedule": "cosin"}, r"schedule: unknown 'cosin'.*'cosine'"),
        ({"prior_training.precision": "fp23"}, r"precision: unknown 'fp23'.*'fp32'"),
        ({"autoencoder_training": {**FIT, "noise": 0.0}}, r"autoencoder_training: noise: expected a number above 0"),
        ({"autoencoder_training": {**FIT, "images": 0}}, r"autoencoder_training: images: expected at least 1, got 0"),
        ({"autoencoder_training": {**FIT, "crop": 10}}, r"autoencoder_training\.crop: expected a multiple of 8"),
        ({"image_tokenizer_training.crop": 128}, r"image_tokenizer_training\.crop: expected a multiple of 8.* got 128"),
        ({"prior_training.accumulate": 3}, r"batch_size 8 is not a multiple of accumulate 3"),
        ({"prior_training.accumulate": 4, "prior_training.at_once": 3}, r"accumulate 4 is not a multiple of at_once 3"),
        ({"prior_training.matrix_lr": 0}, r"matrix_lr: expected a number above 0, or null, got 0"),
        ({"prior_training.ema": 1.0}, r"ema: expected 0 or more and less than 1"),
        ({"prior_training.dropout": 1}, r"prior_training: dropout: expected 0 or more and less than 1"),
        ({"prior_training.code_noise": 1.0}, r"prior_training: code_noise: expected 0 or more and less than 1"),
        ({"prior_training.code_dropout": -0.1}, r"prior_training: code_dropout: expected 0 or more and less than 1"),
        ({"prior_training.label_smoothing": 1.0}, r"label_smoothing: expected 0 or more and less than 1, got 1\.0"),
        ({"prior_training.lr_width": 0}, r"prior_training: lr_width: expected at least 1, got 0"),
        (
            {"prior_training.thinned": 0.5, "prior.attention": ["full", "row"]},
            r"prior_training\.thinned: codes can be left out where all layers have full attention",
        ),
        ({"prior.norm": "batch"}, r"prior: norm: unknown 'batch': valid names: layer, rms"),
        ({"prior.mlp": "swigl"}, r"prior: mlp: unknown 'swigl': did you mean 'swiglu'"),
        ({"prior.qk_norm": "rms"}, r"prior\.qk_norm: expected bool, got 'rms'"),
        ({"prior.tied": True, "prior.code_features": 8}, r"prior: tied: code_features makes .* take one of the two"),
        ({"prior.kind": "transformr"}, r"prior: kind: unknown 'transformr'.*'transformer'"),
        ({"image_tokenizer.kind": "vqgan"}, r"image_tokenizer: kind: unknown 'vqgan'.*'vq'"),
        ({"ranker": {"kind": "siglip"}}, r"ranker: kind: unknown 'siglip'.*clip"),
        ({"prior.attention": ["rows"]}, r"prior: unknown attention pattern 'rows'.*'row'"),
        ({"text_tokenizer.vocab_size": 100}, r"text_tokenizer: vocab_size: expected at least 256"),
        ({"text_tokenizer.length": 0}, r"text_tokenizer: length"),
        ({"text_tokenizer.dropout": 1}, r"text_tokenizer: dropout"),
        ({"data.resolution": 128}, r"data\.resolution 128 and image_tokenizer\.resolution 64 differ"),
        ({"image_tokenizer.patch": 5}, r"image_tokenizer: resolution 64 is not a multiple"),
        ({"image_tokenizer.codebook_size": 70_000}, r"at most 65536 codes"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_that_names_the_field(small, overrides, message):
    with pytest.raises(RequestError, match=message) as error:
        read_recipe(small, overrides)
    assert str(error.value).startswith(f"{small}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML"),
        ("- a\n- b", "expected a mapping of fields, got list"),
        ("", "expected a mapping of fields, got NoneType"),
        ("name: small", "missing field 'image_tokenizer_training'"),
        (SMALL + "prior_training: 3\n", "prior_training: expected a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no recipe at .*nothing.yaml"):
        read_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RequestError, match="cannot read the recipe"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(RequestError, match="cannot read the recipe .*latin.yaml"):
        read_recipe(tmp_path / "latin.yaml")


def test_a_recipe_may_say_only_what_differs_from_its_base(small, tmp_path):
    (tmp_path / "below").mkdir()
    ranked = tmp_path / "below" / "ranked.yaml"
    ranked.write_text("base: ../small.yaml\nname: ranked\nprior_training: {steps: 7}\ndrawing: {prompts: [a, b]}\n")
    again = tmp_path / "again.yaml"
    again.write_text("base: below/ranked.yaml\ndrawing: {prompts: [c]}\n")
    plain = read_recipe(small)
    recipe = read_recipe(again, {"prior_training.lr": 1e-3})
    assert recipe.name == "ranked"
    assert (recipe.prior_training.steps, recipe.prior_training.batch_size, recipe.prior_training.lr) == (7, 8, 1e-3)
    assert recipe.drawing.prompts == ("c",)
    assert recipe.image_tokenizer == plain.image_tokenizer


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nothing.yaml", r"no recipe at .*nothing\.yaml, which .*own\.yaml names as its base"),
        ("own.yaml", r"own\.yaml: base: a recipe cannot be its own base"),
        ("3", r"own\.yaml: base: expected the path of a recipe, got 3"),
    ],
)
def test_a_wrong_base_is_refused(tmp_path, base, message):
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {base}\nname: own\n")
    with pytest.raises(RequestError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(("crop", "told"), [("square", True), ("random", False)])
def test_views_that_are_all_the_same_are_told_of(tmp_path, caplog, crop, told):
    recipe = {**train_tiny.RECIPE, "data": {**train_tiny.RECIPE["data"], "crop": crop}}
    train_tiny.open_run(tmp_path / "run", recipe).report.close()
    assert ("all views of a picture are the same" in caplog.text) == told
