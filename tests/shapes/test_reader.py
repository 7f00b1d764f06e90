import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from armchair.shapes.reader import UNKNOWN, read
from armchair.shapes.world import COLOURS, GROUNDS, SPLITS, Object, Scene, holds, render, scene


def same(truth: Scene, found: Scene, dx: int = 0, dy: int = 0) -> bool:
    if truth.ground != found.ground or len(truth.objects) != len(found.objects):
        return False
    for chosen in itertools.permutations(found.objects):
        pairs = list(zip(truth.objects, chosen, strict=True))
        if all(
            (a.form, a.colour, a.size, a.fill) == (b.form, b.colour, b.size, b.fill)
            and max(abs(a.x + dx - b.x), abs(a.y + dy - b.y)) <= 2
            for a, b in pairs
        ):
            return all(holds(r, *chosen[i : i + 2]) for i, r in enumerate(truth.relations))
    return False


def as_jpeg(picture: np.ndarray, _: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file).convert("RGB"))


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.6)), np.int16)
    return (soft + rng.integers(-4, 5, soft.shape)).clip(0, 255).astype(np.uint8)


def clean(picture: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return picture


@pytest.mark.parametrize("change, least", [(clean, 0.999), (as_jpeg, 0.99), (noisy, 0.99)])
def test_rendered_scenes_are_read_back_whole(change, least):
    rng = np.random.default_rng(0)
    scenes = [scene(i, split=split, seed=11) for split in SPLITS for i in range(50)]
    right = [same(s, read(change(render(s), rng))) for s in scenes]
    assert np.mean(right) >= least


def test_shifted_scenes_are_read_back_whole():
    rng = np.random.default_rng(1)
    right = []
    for i in range(150):
        s = scene(i, split=SPLITS[i % len(SPLITS)], seed=12)
        dx, dy = (int(v) for v in rng.integers(-4, 5, 2))
        wide = np.empty((72, 72, 3), np.uint8)
        wide[:] = GROUNDS[s.ground]
        wide[4:68, 4:68] = render(s)
        right.append(same(s, read(wide[4 - dy : 68 - dy, 4 - dx : 68 - dx]), dx, dy))
    assert np.mean(right) >= 0.99


@given(st.integers(0, 10**6), st.integers(2, 3))
@settings(max_examples=20)
def test_larger_pictures_and_pil_pictures_read_the_same(index, scale):
    s = scene(index, split="val")
    assert same(s, read(render(s, 64 * scale)))
    assert read(Image.fromarray(render(s))) == read(render(s))


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(3, 90), st.integers(3, 90))
@settings(max_examples=25)
def test_any_picture_is_read_without_a_crash(seed, blobs, width, height):
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    assert isinstance(read(picture), Scene)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width, height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(blobs):
        corners = [tuple(rng.integers(0, (width, height)).tolist()) for _ in range(3)]
        draw.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    assert isinstance(read(picture), Scene)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_picture_has_no_objects(value):
    found = read(np.full((64, 64, 3), value, np.uint8))
    assert found.objects == () and found.ground == ("white" if value == 255 else UNKNOWN)


@given(st.integers(0, 10**6), st.sampled_from(sorted(COLOURS)), st.integers(5, 9))
@settings(max_examples=30)
def test_an_extra_blob_is_counted(index, colour, side):
    s = scene(index, split="val")
    picture = render(s).copy()
    free = [
        (x, y)
        for x in range(4, 60 - side)
        for y in range(4, 60 - side)
        if (picture[y - 4 : y + side + 4, x - 4 : x + side + 4] == GROUNDS[s.ground]).all()
        and all(max(abs(x + side / 2 - o.x), abs(y + side / 2 - o.y)) > 14 for o in s.objects)
    ]
    if free:
        x, y = free[index % len(free)]
        picture[y : y + side, x : x + side] = COLOURS[colour]
        assert len(read(picture).objects) == len(s.objects) + 1


@pytest.mark.parametrize("fill", ["solid", "outlined", "striped", "dotted"])
def test_half_an_object_is_not_taken_for_a_whole_one(fill):
    for form in ("circle", "star", "heart", "square"):
        whole = Scene("white", (Object(form, "blue", "large", fill, 32, 32),), ())
        picture = render(whole).copy()
        picture[:, 32:] = 255
        found = read(picture).objects
        assert [(o.form, o.size) for o in found] != [(form, "large")]


def test_a_colour_unlike_any_has_no_name():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[20:38, 20:38] = (0, 230, 230)
    (thing,) = read(picture).objects
    assert thing.colour == UNKNOWN
