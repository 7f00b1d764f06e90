"""The official client against the server: every call, and every error as the client's own class for it."""

import base64
import io
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from armchair.sample.pipeline import Artist, load_artist

R = 16


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def photo(height: int = R, width: int = R) -> bytes:
    return png(np.random.Generator(np.random.PCG64(0)).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(clear: tuple[int, int, int, int] | None, height: int = R, width: int = R) -> bytes:
    pixels = np.full((height, width, 4), 255, np.uint8)
    if clear is not None:
        x, y, x2, y2 = clear
        pixels[y:y2, x:x2, 3] = 0
    return png(pixels)


def opened(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def artist(ranked_bundle: Path) -> Artist:
    return load_artist(ranked_bundle, "cpu")


def test_models_and_aliases_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["first", "second", "dall-e-3"]
    assert client.models.retrieve("dall-e-3").object == "model"


def test_pictures_are_those_of_draw_best_first(client: openai.OpenAI, artist: Artist) -> None:
    own = {"seed": 5, "candidates": 6, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "guidance": 2, "min_p": 0.01}
    own["naturalness"] = 0.5
    answer: Any = client.images.generate(prompt="A Red Circle", model="dall-e-3", n=3, extra_body=own)
    drawing = artist.draw("A Red Circle", keep=3, **own)
    assert [np.asarray(opened(p.b64_json)).tobytes() for p in answer.data] == [i.tobytes() for i in drawing.images]
    assert [p.score for p in answer.data] == drawing.scores
    assert [p.candidate for p in answer.data] == drawing.candidates and answer.data[0].seed == 5
    assert answer.data[0].revised_prompt == "a red circle" and answer.model == "first"
    usage = answer.usage
    assert usage.output_tokens == 6 * 16 and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert answer.size == "16x16" and answer.output_format == "png" and abs(answer.created - time.time()) < 60


def test_a_png_can_be_drawn_again_from_itself(client: openai.OpenAI, artist: Artist, tmp_path: Path) -> None:
    answer = client.images.generate(prompt="a red circle", extra_body={"seed": 3})
    path = tmp_path / "served.png"
    path.write_bytes(base64.b64decode(answer.data[0].b64_json))
    drawing = artist.redraw(path)
    assert drawing.images[0].tobytes() == opened(answer.data[0].b64_json).tobytes() and drawing.model == "first"


def test_without_a_seed_pictures_differ_and_with_its_seed_one_comes_again(client: openai.OpenAI) -> None:
    one, two = (client.images.generate(prompt="a red circle").data[0] for _ in range(2))
    assert one.b64_json != two.b64_json
    again = client.images.generate(prompt="a red circle", extra_body={"seed": one.seed})  # type: ignore[attr-defined]
    assert again.data[0].b64_json == one.b64_json


def test_pictures_come_in_any_square_and_as_they_are_where_that_is_a_whole_multiple(client: openai.OpenAI) -> None:
    small, large = (
        opened(client.images.generate(prompt="a", size=s, extra_body={"seed": 1}).data[0].b64_json)
        for s in ("auto", "1024x1024")
    )
    assert small.size == (R, R) and large.size == (1024, 1024)
    assert np.array_equal(np.asarray(large), np.asarray(small).repeat(64, 0).repeat(64, 1))
    for side in (8, 100):
        answer = client.images.generate(prompt="a", size=f"{side}x{side}", extra_body={"seed": 1})
        resized = opened(answer.data[0].b64_json)
        assert resized.size == (side, side)
        near = np.asarray(small.resize((side, side), Image.Resampling.BOX), float)
        assert np.abs(near - np.asarray(resized, float)).mean() < 32  # the same picture
    for size in ("1792x1024", "4x4", "2048x2048", "0x0", "16X16", "large"):
        with pytest.raises(openai.BadRequestError, match="16x16.*1024x1024") as refused:
            client.images.generate(prompt="a", size=size)
        assert refused.value.param == "size"


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats(client: openai.OpenAI, form: Any) -> None:
    answer = client.images.generate(prompt="a", output_format=form, output_compression=80)
    assert opened(answer.data[0].b64_json).format == form.upper() and answer.output_format == form


def test_a_url_serves_the_same_bytes_without_a_key(client: openai.OpenAI) -> None:
    both = [
        client.images.generate(prompt="a", response_format=form, extra_body={"seed": 2}).data[0]
        for form in ("b64_json", "url")
    ]
    answer = httpx2.get(both[1].url)
    assert answer.content == base64.b64decode(both[0].b64_json) and answer.headers["content-type"] == "image/png"
    assert httpx2.get(both[1].url.replace("/files/", "/files/x")).status_code == 404


def test_fields_that_the_model_has_no_use_for_are_accepted(client: openai.OpenAI) -> None:
    client.images.generate(
        prompt="a", quality="hd", style="vivid", background="transparent", moderation="low", user="me", n=None
    )


def test_a_stream_has_partial_pictures_and_ends_with_the_whole_one(client: openai.OpenAI) -> None:
    for _ in range(10):  # what is drawn before it could be sent is left out, and this model draws in milliseconds
        *partial, last = client.images.generate(prompt="a", stream=True, partial_images=3, extra_body={"seed": 4})
        if partial:
            break
    assert [e.type for e in partial] == ["image_generation.partial_image"] * len(partial) and 1 <= len(partial) <= 3
    assert [e.partial_image_index for e in partial] == list(range(len(partial)))
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 16
    whole = client.images.generate(prompt="a", extra_body={"seed": 4})
    assert last.b64_json == whole.data[0].b64_json
    grey = (np.asarray(opened(partial[0].b64_json)) == 128).all((1, 2))
    assert grey[-4:].all() and not grey[:4].any()


def test_a_stream_without_partial_pictures_is_one_event(client: openai.OpenAI) -> None:
    (only,) = client.images.generate(prompt="a", stream=True)
    assert only.type == "image_generation.completed"


def test_an_edit_is_a_completion(client: openai.OpenAI, artist: Artist) -> None:
    answer: Any = client.images.edit(
        image=photo(), mask=mask((4, 8, 14, 16)), prompt="a red circle", n=2, extra_body={"seed": 6, "candidates": 4}
    )
    original = Image.open(io.BytesIO(photo()))
    drawing = artist.complete(original, "a red circle", redraw=(4, 8, 14, 16), candidates=4, keep=2, seed=6)
    pixels = np.asarray(opened(answer.data[0].b64_json))
    assert pixels.tobytes() == drawing.images[0].tobytes() and answer.data[0].score == drawing.scores[0]
    kept = np.ones((R, R), bool)
    kept[8:16, 4:14] = False
    assert np.array_equal(pixels[kept], np.asarray(original)[kept]) and not np.array_equal(pixels, np.asarray(original))
    assert answer.usage.input_tokens_details.image_tokens == 16


def test_an_edit_streams_under_its_own_names(client: openai.OpenAI) -> None:
    events = list(
        client.images.edit(image=photo(), mask=mask((0, 4, 16, 16)), prompt="a", stream=True, partial_images=2)
    )
    assert {e.type for e in events[:-1]} == {"image_edit.partial_image"} and events[-1].type == "image_edit.completed"


def test_the_image_can_be_its_own_mask_and_of_any_size(client: openai.OpenAI, artist: Artist) -> None:
    pixels = np.full((64, 96, 4), 200, np.uint8)  # the centre square is 64 x 64, four pixels make one
    pixels[32:63, 16:48, 3] = 0
    answer = client.images.edit(image=png(pixels), prompt="a", extra_body={"seed": 1})
    drawn = opened(answer.data[0].b64_json)
    expected = artist.complete(Image.fromarray(pixels), "a", redraw=(0, 8, 8, 16), candidates=1, seed=1)
    assert drawn.tobytes() == expected.images[0].tobytes()


@pytest.mark.parametrize(
    "image, its_mask, said",
    [
        (photo(), None, "fully transparent part"),
        (photo(), mask(None), "no fully transparent pixel"),
        (photo(), photo(), "no transparency"),
        (photo(), mask((0, 0, 4, 4), 8, 8), "size of the image"),
        (photo(), png(np.full((R, R, 4), 255 * (1 - np.eye(R, dtype=np.uint8))[:, :, None])), "no rectangle"),
        (photo(R, 64), mask((0, 0, 8, 8), R, 64), "centre square"),
        (b"nothing", mask((0, 0, 4, 4)), "PNG, JPEG or WEBP"),
        (photo()[:200], mask((0, 0, 4, 4)), "damaged"),
        (photo(), b"\x89PNG\r\n\x1a\n", "mask"),
    ],
)  # fmt: skip
def test_other_masks_are_refused_and_told_what_is_possible(
    client: openai.OpenAI, image: bytes, its_mask: bytes | None, said: str
) -> None:
    own = {} if its_mask is None else {"mask": its_mask}
    with pytest.raises(openai.BadRequestError, match=said):
        client.images.edit(image=image, prompt="a", **own)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_variation_keeps_the_upper_part_and_can_be_drawn_again(
    client: openai.OpenAI, artist: Artist, tmp_path: Path
) -> None:
    answer = client.images.create_variation(image=photo(), n=2, extra_body={"seed": 2, "keep_top": 0.25})
    one, two = (np.asarray(opened(p.b64_json)) for p in answer.data)
    original = np.asarray(Image.open(io.BytesIO(photo())))
    assert np.array_equal(one[:4], original[:4]) and np.array_equal(two[:4], original[:4])
    assert not np.array_equal(one[4:], two[4:])
    path = tmp_path / "served.png"
    path.write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert artist.redraw(path).images[0].tobytes() == one.tobytes()
    answer = client.images.create_variation(image=photo(), response_format="url", size="256x256", model="dall-e-3")
    assert Image.open(io.BytesIO(httpx2.get(answer.data[0].url).content)).size == (256, 256)


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({"prompt": ""}, "prompt", "some words"),
        ({"prompt": "x" * 10_001}, "prompt", "10000 characters"),
        ({"prompt": "x" * 32_001}, "prompt", "32000"),
        ({"prompt": "a", "n": 11}, "n", "10"),
        ({"prompt": "a", "n": "2"}, "n", "integer"),
        ({"prompt": "a", "quality": "best"}, "quality", "'hd'"),
        ({"prompt": "a", "output_format": "gif"}, "output_format", "webp"),
        ({"prompt": "a", "response_format": "file"}, "response_format", "b64_json"),
        ({"prompt": "a", "extra_body": {"temperature": -1}}, "temperature", "0.001 to 100"),
        ({"prompt": "a", "extra_body": {"top_p": 0}}, "top_p", "more than 0"),
        ({"prompt": "a", "extra_body": {"seed": 2**63}}, "seed", "less than or equal"),
        ({"prompt": "a", "extra_body": {"candidates": 65}}, "candidates", "at most 64"),
        ({"prompt": "a", "n": 4, "extra_body": {"candidates": 2}}, "candidates", "at least n"),
        ({"prompt": "a", "extra_body": {"temprature": 1}}, "temprature", "unknown field"),
    ],
)
def test_wrong_fields_are_named(client: openai.OpenAI, fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.images.generate(**fields)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"
    assert refused.value.request_id is not None and refused.value.request_id.startswith("req_")


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for call in (lambda: client.images.generate(prompt="a", model="/etc/passwd"), lambda: client.models.retrieve("x")):
        with pytest.raises(openai.NotFoundError, match="/v1/models") as refused:
            call()
        assert refused.value.code == "model_not_found" and refused.value.param == "model"
