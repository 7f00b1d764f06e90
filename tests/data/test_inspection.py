import numpy as np
import pytest
from PIL import Image

from armchair.data.inspection import inspect
from armchair.data.sources import DataConfig, open_source
from armchair.errors import DataError


@pytest.fixture
def source(tmp_path):
    sizes = [(20, 10), (21, 10), (10, 21), (10, 10), (10, 10)]
    for n, (width, height) in enumerate(sizes):
        pixels = np.full((height, width, 3), 50 if n >= 3 else n, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("A red thing\nthing no. 2" if n else "thing")
    (tmp_path / "5.png").write_bytes(b"nothing")
    (tmp_path / "5.txt").write_text("broken")
    (tmp_path / "6.png").write_bytes(b"nothing")
    return open_source([str(tmp_path)], DataConfig(resolution=16))


def test_counts(source):
    found = inspect(source, DataConfig(resolution=16), sheet=None)
    assert found["images"] == 5
    assert found["broken"] == {"not an image": 1, "no caption": 1}
    assert found["captions"] == 9
    assert found["caption_words"] == {"min": 1, "median": 3.0, "max": 3}
    assert found["distinct_words"] == 5
    assert found["frequent_words"][0] == ["thing", 9]
    assert found["sizes"] == {"10x10": 2, "20x10": 1, "21x10": 1, "10x21": 1}
    assert found["odd_aspect"] == pytest.approx(2 / 5)
    assert found["duplicates"] == 1


def test_limit_and_sheet(source, tmp_path):
    sheet = tmp_path / "sheet.out"
    assert inspect(source, DataConfig(resolution=16), sheet=sheet, limit=2)["images"] == 2
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width == 8 + 2 * (160 + 8)
    with pytest.raises(DataError, match="cannot write"):
        inspect(source, DataConfig(resolution=16), sheet=tmp_path / "no" / "sheet.png", limit=2)


def test_nothing_usable_is_counted_and_not_drawn(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    source = open_source([str(tmp_path)], DataConfig())
    found = inspect(source, DataConfig(), sheet=tmp_path / "sheet.png")
    assert found["images"] == 0 and found["caption_words"] is None and found["odd_aspect"] == 0.0
    assert not (tmp_path / "sheet.png").exists()
