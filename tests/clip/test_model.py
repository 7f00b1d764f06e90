import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from armchair.clip.contrast import contrastive_loss
from armchair.clip.model import CLIP, CLIPConfig, ImageTowerConfig, TextShape, TextTowerConfig, waves
from armchair.errors import RequestError

TOKENS = torch.tensor([[3, 5, 19, 19, 19, 19], [7, 1, 2, 4, 6, 19], [19, 19, 19, 19, 19, 19]])


def pixels(count: int, resolution: int) -> Tensor:
    return tiny.pictures(count, resolution)


@pytest.mark.parametrize("resnet", [False, True])
def test_embeddings_have_length_one_and_logits_are_their_products(resnet):
    model = tiny.clip(resnet=resnet)
    images = pixels(4, model.config.image.resolution)
    with torch.no_grad():
        a, b = model.encode_images(images), model.encode_text(TOKENS)
        logits = model(images, TOKENS)
    assert a.shape == (4, 12) and b.shape == (3, 12)
    torch.testing.assert_close(torch.cat([a, b]).norm(dim=1), torch.ones(7))
    torch.testing.assert_close(logits, model.scale * a @ b.T)
    assert float(a.std(0).mean()) > 1e-4 and float(b.std(0).mean()) > 1e-4


@pytest.mark.parametrize("resnet", [False, True])
def test_a_picture_does_not_depend_on_its_neighbours(resnet):
    model = tiny.clip(resnet=resnet)
    images = pixels(4, model.config.image.resolution)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_images(images)[1:2], model.encode_images(images[1:2]))


def test_what_comes_after_the_end_does_not_matter_and_what_comes_before_does():
    model = tiny.clip()
    changed = TOKENS.clone()
    changed[0, 3:] = torch.tensor([1, 2, 3])
    with torch.no_grad():
        before, after = model.encode_text(TOKENS), model.encode_text(changed)
        torch.testing.assert_close(after, before)
        for position in (0, 1):
            other = TOKENS.clone()
            other[0, position] = 9
            assert (model.encode_text(other)[0] - before[0]).abs().max() > 1e-4


def test_a_short_caption_reads_the_same_beside_a_long_one():
    model = tiny.clip()
    short = torch.tensor([[3, 5, 19, 19, 19, 19], [19, 19, 19, 19, 19, 19]])  # alone, the rest of the row is not read
    full = torch.tensor([[7, 1, 2, 4, 6, 19]])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(torch.cat([short, full]))[:2], model.encode_text(short))


@pytest.mark.parametrize(("side", "width"), [(8, 192), (7, 768), (3, 10)])
def test_positions_start_out_most_like_those_next_to_them(side, width):
    position = waves(side, width)
    assert position.shape == (side**2, width)
    apart = torch.cdist(position, position).fill_diagonal_(float("inf"))
    nearest = apart.argmin(1)
    place = torch.arange(side**2)
    steps = (place // side - nearest // side).abs() + (place % side - nearest % side).abs()
    assert (steps == 1).all()


def test_other_sizes_are_resized():
    model = tiny.clip()
    images = pixels(2, 16)
    large = F.interpolate(images, scale_factor=4, mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        assert float((model.encode_images(large) * model.encode_images(images)).sum(1).min()) > 0.98


def test_the_scale_is_clamped():
    model = tiny.clip()
    model.log_scale.data.fill_(20.0)
    assert float(model.scale.detach()) == 100


@pytest.mark.parametrize("resnet", [False, True])
def test_a_batch_can_be_learnt_by_heart(resnet):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(tiny.clip_config(resnet), TextShape(length=6, vocab_size=20))
    images = pixels(3, model.config.image.resolution)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        a, b = model.encode_images(images), model.encode_text(TOKENS)
        loss = contrastive_loss(a, b, model.scale, torch.eye(3).bool())
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


def test_the_defaults_are_the_released_vit_b_32():
    with torch.device("meta"):
        model = CLIP(CLIPConfig(), TextShape(length=77, vocab_size=49408))
        resnet = ImageTowerConfig(width=64, layers=(3, 4, 6, 3), heads=32)
        rn50 = CLIP(CLIPConfig(embed_dim=1024, image=resnet), TextShape(length=77, vocab_size=49408))
    # One more than the released ones: the bias of the sigmoid loss.
    assert sum(p.numel() for p in model.parameters()) == 151_277_313 + 1
    assert sum(p.numel() for p in rn50.parameters()) == 102_007_137 + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageTowerConfig(resolution=60, patch=8), "resolution 60 is not a multiple of 8"),
        (lambda: ImageTowerConfig(layers=(3, 4)), "layers: expected one number .* or four"),
        (lambda: ImageTowerConfig(width=10, heads=3), "width 10 cannot be shared among 3 heads"),
        (lambda: TextTowerConfig(width=10, heads=3), "width 10 is not a multiple of heads 3"),
        (lambda: CLIPConfig(activation="gelo"), "activation: unknown 'gelo': did you mean 'gelu'"),
        (lambda: CLIPConfig(mean=(0.5, 0.5)), "mean: expected three numbers, got 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()
