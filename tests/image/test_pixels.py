import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from armchair.errors import RequestError
from armchair.image.pixels import BrokenSample, random_crop, read_image, square, stack, to_pil
from armchair.image.sheet import contact_sheet


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_and_path_read_exactly(tmp_path):
    pixels = noise(5, 7)
    data = encoded(Image.fromarray(pixels))
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(data), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


def test_alpha_is_put_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(rgba)))[0, :, 0], [255, 127, 0])


def test_palette_transparency_is_put_on_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        read_image(encoded(image, transparency=1)), [[[10, 20, 30], [255, 255, 255]]]
    )


@pytest.mark.parametrize("mode, format", [
    ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("L", "JPEG"), ("CMYK", "JPEG"),
    ("YCbCr", "JPEG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("RGB", "BMP"), ("CMYK", "TIFF"),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, format):
    grey = Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode)
    pixels = read_image(encoded(grey, format))
    assert pixels.shape == (6, 8, 3) and pixels.dtype == np.uint8
    assert pixels.min() >= 250


def test_sixteen_bit_grey_is_scaled():
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(levels)))[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(
        read_image(encoded(Image.fromarray(levels), "TIFF"))[0, :, 2], [0, 1, 128, 255]
    )


def test_exif_orientation_is_applied():
    image = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    np.testing.assert_array_equal(read_image(encoded(image, exif=exif)), np.rot90(np.asarray(image), k=-1))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [8001, 12_000, 60_000])
def test_bombs_are_refused_by_their_header(width):
    with pytest.raises(BrokenSample) as caught:
        read_image(png_header(width, 8000))
    assert caught.value.cause == "image over 64 megapixels"


def test_missing_file_and_programs_in_disguise_are_broken(tmp_path):
    with pytest.raises(BrokenSample, match="unreadable file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(BrokenSample, match="not an image"):
        read_image(encoded(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF89a", b"II*\0"]),
)
def test_random_bytes_are_broken(data, magic):
    with pytest.raises(BrokenSample):
        read_image(magic + data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged EXIF data
@settings(max_examples=60)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]))
def test_damaged_images_are_read_or_broken(data, format):
    whole = bytearray(encoded(Image.fromarray(noise(16, 16)), format))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = read_image(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except BrokenSample:
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@settings(max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32), st.booleans())
def test_crops_have_their_shape_and_stay_within_the_values(height, width, resolution, seed, flip):
    image = noise(height, width) // 2 + 64
    for cut in (random_crop(image, resolution, np.random.default_rng(seed), flip), square(image, resolution)):
        assert cut.shape == (resolution, resolution, 3) and cut.dtype == np.uint8
        assert cut.min() >= image.min() and cut.max() <= image.max()
    again = random_crop(image, resolution, np.random.default_rng(seed), flip)
    np.testing.assert_array_equal(again, random_crop(image, resolution, np.random.default_rng(seed), flip))


def test_random_crop_takes_the_middle_and_varies():
    image = np.zeros((64, 640, 3), np.uint8)
    image[:, :, 0] = np.arange(640) * 255 // 639
    firsts = [int(random_crop(image, 64, np.random.default_rng(s), False)[0, 0, 0]) for s in range(200)]
    columns = np.array(firsts) / 255 * 639
    assert columns.min() >= 3 / 8 * 576 - 4 and columns.max() <= 5 / 8 * 576 + 4
    assert np.ptp(columns) > 100


def test_random_crop_scales_at_most_by_nine_eighths():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    slopes = []
    for seed in range(100):
        row = random_crop(np.ascontiguousarray(ramp), 64, np.random.default_rng(seed), False)[0, :, 0].astype(
            float
        )
        slopes.append((row[-1] - row[0]) / 63)
    assert min(slopes) >= 4 * 8 / 9 - 0.05 and max(slopes) <= 4.05
    assert max(slopes) - min(slopes) > 0.3


def test_flip_mirrors_half_of_the_crops():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    mirrored = [random_crop(image, 8, np.random.default_rng(s), True)[0, 0, 0] == 0 for s in range(200)]
    assert 60 < sum(mirrored) < 140
    assert not any(random_crop(image, 8, np.random.default_rng(s), False)[0, 0, 0] == 0 for s in range(50))


def test_square_is_the_centre_by_area():
    image = noise(4, 10)
    np.testing.assert_array_equal(square(image, 4), image[:, 3:7])
    blocks = image[:, 3:7].reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(square(image, 2) - blocks).max() <= 1


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_pixels_go_to_tensors_and_back(count, resolution, seed):
    images = [noise(resolution, resolution, seed + k) for k in range(count)]
    tensor = stack(images)
    assert tensor.shape == (count, 3, resolution, resolution) and tensor.dtype == torch.float32
    assert tensor.is_contiguous() and tensor.min() >= 0 and tensor.max() <= 1
    for image, back in zip(images, to_pil(tensor), strict=True):
        np.testing.assert_array_equal(np.asarray(back), image)


def test_to_pil_clamps_and_rounds():
    tensor = torch.tensor([-1.0, 0.499 / 255, 0.501 / 255, 2.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert np.asarray(to_pil(tensor)[0])[:, :, 0].ravel().tolist() == [0, 0, 1, 255]


@settings(max_examples=30)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 3))
def test_contact_sheet_takes_any_label(labels, columns, scale):
    images = [Image.fromarray(noise(8, 8, k)) for k in range(len(labels))]
    sheet = contact_sheet(images, labels, columns, scale)
    np.testing.assert_array_equal(
        np.asarray(sheet)[8 : 8 + 8 * scale, 8 : 8 + 8 * scale],
        np.asarray(images[0]).repeat(scale, axis=0).repeat(scale, axis=1),
    )


def test_contact_sheet_lays_out_rows_and_refuses_nothing_to_show():
    images = [Image.new("RGB", (10, 10), "red")] * 5
    assert contact_sheet(images, None, columns=2, scale=2).size == (8 + 2 * 28, 8 + 3 * 28)
    labelled = contact_sheet(images, ["a", "b", "c", "d", "long words, many of them, never fit"], 2, 6)
    assert labelled.size[1] > 8 + 3 * 68
    with pytest.raises(RequestError):
        contact_sheet([], None, columns=2, scale=1)
    with pytest.raises(RequestError):
        contact_sheet(images, ["a"], columns=2, scale=1)
