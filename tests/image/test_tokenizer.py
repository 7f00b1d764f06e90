"""What every kind of image tokenizer keeps to."""

import pytest
import torch

import tiny
from armchair.config import to_dict
from armchair.errors import RequestError
from armchair.image.network import ImageTokenizer
from armchair.image.tokenizer import IMAGE_TOKENIZER_CONFIGS, image_tokenizer_config, make_image_tokenizer

KINDS = list(IMAGE_TOKENIZER_CONFIGS)
SETTINGS = {"tau": 0.5, "kl_weight": 0.1}


def tokenizer(kind: str, **sizes) -> ImageTokenizer:
    return {"dvae": tiny.dvae, "vq": tiny.vq, "fsq": tiny.fsq}[kind](**sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_pictures_have_the_promised_shapes_and_ranges(kind):
    model, images = tokenizer(kind), tiny.pictures(5, 16)
    codes = model.encode(images)
    assert codes.shape == (5, model.grid, model.grid) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < model.codebook_size
    assert torch.equal(codes, model.encode(images))
    back = model.decode(torch.arange(model.codebook_size).view(-1, 4, 4))
    assert back.shape[1:] == (3, model.resolution, model.resolution) and back.dtype == torch.float32
    assert back.min() >= 0 and back.max() <= 1
    vectors = model.code_vectors
    assert vectors.shape == (model.codebook_size, 8) and len(vectors.unique(dim=0)) == model.codebook_size
    assert not vectors.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_with_kernels_of_one_codes_are_found_by_distinct_patches(kind):
    model = tokenizer(kind, patch=4, n_groups=1, stem_kernel=1, encoder_kernel=1)
    images = tiny.pictures(6, 16)
    with torch.no_grad():
        plain = model.codes_of(model.features(images))
    assert torch.equal(model.encode(images), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_first_convolution_through_the_codes(kind):
    model, images = tokenizer(kind), tiny.pictures(4, 16)
    done = model.training_pass(images, tiny.seeded(), SETTINGS)
    done.loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert done.mu.shape == images.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_learnt_by_heart(kind):
    model, images = tokenizer(kind, n_hid=16), tiny.pictures(8, 16)
    model.start(images, tiny.seeded())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    noise = tiny.seeded()

    def error() -> float:
        with torch.no_grad():
            return float((model.decode(model.encode(images)) - images).square().mean())

    before = error()
    for step in range(150):
        optimizer.zero_grad()
        done = model.training_pass(images, noise, {"tau": max(1 / 16, 1 - step / 100), "kl_weight": 0.1})
        done.loss.backward()
        optimizer.step()
        model.after_update(done.seen, noise)
    assert error() < before / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_read_back_by_its_kind(kind):
    config = tokenizer(kind).config
    assert config.kind == kind and image_tokenizer_config(to_dict(config)) == config
    with torch.random.fork_rng():
        assert make_image_tokenizer(config).state_dict().keys() == tokenizer(kind).state_dict().keys()


def test_without_a_kind_it_is_a_dvae():
    assert image_tokenizer_config({"codebook_size": 16}).kind == "dvae"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "vqgan"}, "image_tokenizer: kind: unknown 'vqgan': did you mean 'vq'"),
        ({"kind": ["vq"]}, "image_tokenizer: kind: unknown"),
        ({"kind": "vq", "levels": [8, 8]}, "unknown field 'image_tokenizer.levels' for kind 'vq'"),
        ({"kind": "fsq", "codebook_size": 64}, "unknown field 'image_tokenizer.codebook_size' for kind 'fsq'"),
        ({"kind": "fsq", "level": [8, 8]}, "'image_tokenizer.level' for kind 'fsq': did you mean 'levels'"),
        ({"decay": 0.5}, "unknown field 'image_tokenizer.decay' for kind 'dvae'"),
        ({"kind": "fsq", "levels": [8, "x"]}, r"image_tokenizer.levels\[1\]: expected int, got 'x'"),
        ("vq", "image_tokenizer: expected a mapping of fields, got 'vq'"),
    ],
)
def test_what_does_not_fit_the_kind_is_refused_by_name(data, message):
    with pytest.raises(RequestError, match=message):
        image_tokenizer_config(data, "image_tokenizer")


def test_kinds_differ_in_the_bottleneck_alone():
    def networks(kind: str) -> dict:
        shapes = {name: p.shape for name, p in tokenizer(kind).named_parameters()}
        return {name: shape for name, shape in shapes.items() if name.startswith(("encoder.", "decoder."))}

    assert networks("dvae") == networks("vq") == networks("fsq")
