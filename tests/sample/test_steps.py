"""The steps of drawing one by one, as a server takes them, against drawing at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from armchair.errors import RequestError
from armchair.sample.engine import Engine, exact_products
from armchair.sample.generate import FREE, MicroBatch, candidate_uniforms, draw_micro_batch, read_prompts
from armchair.sample.next_token import Settings
from armchair.sample.pipeline import UNDRAWN, Artist, load_artist
from conftest import write_tiny_bundle


@pytest.fixture(scope="module")
def artist(tmp_path_factory: pytest.TempPathFactory) -> Artist:
    return load_artist(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "ranked", ranked=True), "cpu")


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_steps_make_the_drawing(artist: Artist, photo: Image.Image) -> None:
    for image, redraw in ((None, None), (photo, (4, 4, 12, 16))):
        plan = artist.plan("a red circle", image=image, redraw=redraw, candidates=5, keep=2, seed=3)
        if image is None:
            whole = artist.draw("a red circle", candidates=5, keep=2, seed=3)
            every = artist.draw("a red circle", candidates=5, seed=3)
        else:
            whole = artist.complete(image, "a red circle", redraw=redraw, candidates=5, keep=2, seed=3)
            every = artist.complete(image, "a red circle", redraw=redraw, candidates=5, seed=3)
        codes = every.codes[np.argsort(every.candidates)]
        plans = [plan] * 5
        images = artist.pictures(plans, codes)
        drawing = artist.drawing(plan, codes, images, artist.scores(plans, images, codes))
        assert drawing.record(1) == whole.record(1) and drawing.scores == whole.scores
        assert [i.tobytes() for i in drawing.images] == [i.tobytes() for i in whole.images]
    assert artist.pictures([], codes[:0]) == [] and artist.scores([], [], codes[:0]) == []


def test_what_is_not_drawn_is_grey_and_what_is_kept_is_there(artist: Artist, photo: Image.Image) -> None:
    plan = artist.plan("a", image=photo, redraw=(0, 4, 8, 16), candidates=1)
    codes = np.zeros((1, 4, 4), np.int64)
    (picture,) = artist.pictures([plan], codes, [2])
    pixels, original = np.asarray(picture), np.asarray(photo)
    assert np.array_equal(pixels[:4], original[:4]) and np.array_equal(pixels[:, 8:], original[:, 8:])
    assert (pixels[8:, :8] == UNDRAWN).all() and not (pixels[4:8, :8] == UNDRAWN).all()


def test_pictures_of_many_prompts_are_scored_as_each_alone(artist: Artist) -> None:
    prompts = ["a red circle", "two blue squares", "a", "a red circle", "a green star on a black ground"] * 3
    images = [artist.draw(prompt, candidates=1, seed=seed).images[0] for seed, prompt in enumerate(prompts)]
    assert artist.ranker is not None
    together = artist.ranker.score(images, prompts)
    assert together == [artist.rank(image, prompt)[0] for image, prompt in zip(images, prompts, strict=True)]
    with pytest.raises(RequestError, match="some words"):
        artist.ranker.score(images[:1], [" "])


def test_a_picture_can_be_completed_untold_and_drawn_again(artist: Artist, photo: Image.Image, tmp_path: Path) -> None:
    plan = artist.plan("", image=photo, redraw=(0, 8, 16, 16), candidates=2)
    uniforms = candidate_uniforms(0, [0, 1], 16)
    assert plan.forced is not None
    forced = torch.from_numpy(plan.forced).view(1, -1).expand(2, -1)
    prompts = artist.read_prompt("").rows(torch.zeros(2, dtype=torch.int64))
    batch = MicroBatch(artist.decoder(), prompts, artist.empty_prompt, uniforms, plan.settings, forced)
    *_, codes = draw_micro_batch(artist.decoder(), batch)
    found = codes.view(2, 4, 4).numpy()
    images = artist.pictures([plan] * 2, found)
    drawing = artist.drawing(plan, found, images, artist.scores([plan] * 2, images, found))
    assert drawing.scores == [None, None]
    for path, image in zip(drawing.save(tmp_path / "one.png"), drawing.images, strict=True):
        assert artist.redraw(path).images[0].tobytes() == image.tobytes()
    with pytest.raises(RequestError, match="some words"):
        artist.plan("")


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_rows_that_are_left_come_out_as_before(guidance: float) -> None:
    if not exact_products():
        pytest.skip("this processor does not add up eight-bit products exactly")
    stream = tiny.shape()
    engine = Engine(tiny.prior(stream, "full", "row", "convolutional"), "int8")
    prompts = read_prompts(engine, tiny.texts(5, stream))
    uniforms, settings = candidate_uniforms(0, range(5), stream.image_length), Settings(guidance=guidance)
    null = read_prompts(engine, torch.full((1, stream.text_length), stream.pad_id))

    def begun() -> MicroBatch:
        return MicroBatch(engine, prompts, null, uniforms, settings, torch.full(uniforms.shape, FREE))

    whole, cut = begun(), begun()
    for kept in ([0, 2, 3, 4], [1, 3], [0]):
        for batch in (whole, cut):
            for _ in range(3):
                batch.take(engine.decode_steps(*batch.step()))
        cut.keep(kept)
    while not whole.done:
        for batch in (whole, cut):
            batch.take(engine.decode_steps(*batch.step()))
    assert cut.done and torch.equal(cut.codes[0], whole.codes[2])
