import errno
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from armchair.errors import RequestError, WorkError
from armchair.sample import png
from armchair.sample.png import output_paths, read_record, save_png, slug

RECORD = {"prompt": "a red apple", "seed": 7, "codes": [[0, 8191], [3, 4]], "score": None, "top_p": 0.95}
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((16, 12), 80).convert("RGB")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


@one_folder
@given(record=st.dictionaries(st.text(), values, max_size=4), prompt=st.text(), force=st.booleans())
def test_any_record_round_trips(tmp_path: Path, record: dict[str, Any], prompt: str, force: bool) -> None:
    record["prompt"] = prompt
    path = tmp_path / "a.png"
    path.unlink(missing_ok=True)
    save_png(Image.new("RGB", (2, 2), "red"), path, record, force=force)
    assert read_record(path) == record


def test_picture_is_whole_and_nothing_else_is_left(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(image, path, RECORD)
    with Image.open(path) as saved:
        assert saved.tobytes() == image.tobytes()
        assert saved.info.keys() == {"armchair"}  # other readers find it too
    assert os.listdir(path.parent) == ["a.png"]


def test_no_overwriting_without_force(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "a.png"
    path.write_text("precious")
    with pytest.raises(RequestError, match="a.png is there already"):
        save_png(image, path, RECORD)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["a.png"]
    save_png(image, path, RECORD, force=True)
    assert read_record(path) == RECORD


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, WorkError), (errno.EROFS, RequestError)])
def test_failure_leaves_no_file(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch, code: int, kind: type, force: bool
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(kind, match="cannot write .*a.png"):
                save_png(image, tmp_path / "a.png", RECORD, force=force)
        assert os.listdir(tmp_path) == []


def test_unwritable_places(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, force in ((tmp_path / "file" / "a.png", False), (tmp_path / "folder", True)):
        with pytest.raises(RequestError, match="cannot write") as error:
            save_png(image, path, RECORD, force=force)
        assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []
    with pytest.raises(RequestError, match="at most"):
        save_png(image, tmp_path / "b.png", {"prompt": "x" * png.MAX_RECORD})


@pytest.mark.parametrize("compressed", [False, True])
def test_record_is_found_where_other_programs_put_it(tmp_path: Path, compressed: bool) -> None:
    text = b'{"seed":7}'
    body = b"armchair\0" + (b"\1\0" if compressed else b"\0\0") + b"en\0Sessel\0"
    body += zlib.compress(text) if compressed else text
    other = chunk(b"iTXt", b"Comment\0\0\0\0\0armchair")
    (tmp_path / "a.png").write_bytes(png_with(chunk(b"IDAT", bytes(99)), other, chunk(b"iTXt", body)))
    assert read_record(tmp_path / "a.png") == {"seed": 7}


BOMB = zlib.compress(bytes(64 << 20), 9)
DEFECTS = {
    "empty": (b"", "not a PNG"),
    "jpeg": (b"\xff\xd8\xff\xe0", "not a PNG"),
    "no record": (png_with(chunk(b"IDAT", bytes(9))), "no armchair metadata"),
    "no end": (png_with()[:8], "cut short"),
    "not JSON": (png_with(chunk(b"iTXt", b"armchair\0\0\0\0\0{")), "damaged"),
    "not UTF-8": (png_with(chunk(b"iTXt", b'armchair\0\0\0\0\0{"\xff":1}')), "damaged"),
    "not an object": (png_with(chunk(b"iTXt", b"armchair\0\0\0\0\0[1]")), "damaged"),
    "deep": (png_with(chunk(b"iTXt", b"armchair\0\0\0\0\0" + b"[" * 100_000)), "damaged"),
    "checksum": (png_with(chunk(b"iTXt", b"armchair\0\0\0\0\0{}")[:-1] + b"?"), "damaged"),
    "no fields": (png_with(chunk(b"iTXt", b"armchair\0")), "damaged"),
    "compression": (png_with(chunk(b"iTXt", b"armchair\0\1\0\0\0nonsense")), "damaged"),
    "bomb": (png_with(chunk(b"iTXt", b"armchair\0\1\0\0\0" + BOMB)), "more than"),
    "large": (png_with(chunk(b"iTXt", b"armchair\0\0\0\0\0" + bytes(5 << 20))), "more than"),
    "huge": (png_with(b"\xff\xff\xff\xffiTXtarmchair\0"), "too large"),
}


@pytest.mark.parametrize(("data", "message"), DEFECTS.values(), ids=DEFECTS.keys())
def test_defects(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=message) as error:
        read_record(path)
    assert "a.png" in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.png"):
        with pytest.raises(RequestError, match="cannot read"):
            read_record(path)


@one_folder
@given(data=st.data())
def test_damage_is_found_or_does_not_touch_the_record(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (2, 2)), path, RECORD, force=True)
    whole = path.read_bytes()
    i = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(whole[:i] if cut else whole[:i] + bytes([whole[i] ^ 0x20]) + whole[i + 1 :])
    try:
        assert read_record(path) == RECORD
    except RequestError as error:
        assert "a.png" in str(error)


@given(st.text())
def test_slug_is_a_safe_name(prompt: str) -> None:
    name = slug(prompt)
    assert 0 < len(name) <= 60 and name == slug(name)
    assert not set(name) & set('/\\.:*?"<>| \0\n') and name[0] != "-" and name[-1] != "-"
    assert len(f"{name}-9999.png".encode()) <= 255


def test_slug_examples() -> None:
    assert slug("A red apple, on a table!") == "a-red-apple-on-a-table"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("सेब 사과") == "सेब-사과"
    assert slug("🍎") == slug("") == slug("..") == "image"
    assert slug("CON") == "con-image"


def test_output_paths(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "x.png", "a cat", 1) == [tmp_path / "x.png"]
    assert output_paths(tmp_path / "x.PNG", "a cat", 2) == [tmp_path / "x-01.PNG", tmp_path / "x-02.PNG"]
    assert output_paths(tmp_path, "a cat", 1) == [tmp_path / "a-cat.png"]
    assert output_paths(tmp_path / "v1.5", "a cat", 2)[1] == tmp_path / "v1.5" / "a-cat-02.png"
    assert [p.name for p in output_paths(tmp_path, "c", 100)][::99] == ["c-001.png", "c-100.png"]
    (tmp_path / "dir.png").mkdir()
    assert output_paths(tmp_path / "dir.png", "a cat", 1) == [tmp_path / "dir.png" / "a-cat.png"]
    with pytest.raises(RequestError, match="use .*x.png"):
        output_paths(tmp_path / "x.jpg", "a cat", 1)
    with pytest.raises(RequestError, match="at least one"):
        output_paths(tmp_path, "a cat", 0)
