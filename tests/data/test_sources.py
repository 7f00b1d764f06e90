import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from armchair.config import from_dict
from armchair.data.sources import DataConfig, caption_lines, expand_template, open_source
from armchair.data.tar_shards import TarSource
from armchair.errors import DataError, RequestError
from armchair.image.pixels import BrokenSample

CONFIG = DataConfig()


def picture(seed: int, format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for n in range(first, first + count):
        fields = {"caption": f"picture {n}", "style": "flat" if n % 2 else "round", "tags": ["one", f"n{n}"]}
        members += [(f"{n:05}.json", json.dumps(fields).encode()), (f"{n:05}.txt", f"picture {n}".encode()),
                    (f"{n:05}.png", picture(n))]  # fmt: skip
    return members


def cause(source, i) -> str:
    with pytest.raises(BrokenSample) as caught:
        source[i]
    return caught.value.cause


def read_all(source) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(source[i].image.tobytes(), source[i].captions) for i in range(len(source))]


def write_folder(root: Path, count: int = 3) -> Path:
    for n in range(count):
        path = root / ("deep/er" if n == 2 else "") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(n))
        path.with_suffix(".txt").write_text(f"picture {n}\r\n\n  the number {n} \n", encoding="utf-8")
    return root


def test_folder_with_text_files(tmp_path):
    source = open_source([str(write_folder(tmp_path))], CONFIG)
    assert len(source) == 3
    assert [source.key(i) for i in range(3)] == ["0.png", "1.png", "deep/er/2.png"]
    assert source[2].captions == ("picture 2", "the number 2")
    assert source[2].image.shape == (6, 5, 3)
    assert source.fields(1) == {"caption": ["picture 1", "the number 1"]}
    for out_of_range in (3, -1):
        with pytest.raises(IndexError):
            source[out_of_range]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_with_metadata(tmp_path, kind):
    rows = [
        ("a.png", "a red, round thing", "round"),
        ("sub/b.png", "émoji ✨", "flat"),
        ("c.png", "gone", "flat"),
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "sub/b.png").write_bytes(picture(1))
    if kind == "csv":
        text = "file_name,text,style\n" + "".join(f'{f},"{t}",{s}\n' for f, t, s in rows)
    else:
        text = "".join(json.dumps({"file_name": f, "text": t, "style": s}) + "\n" for f, t, s in rows)
    (tmp_path / f"metadata.{kind}").write_text(text, encoding="utf-8")
    source = open_source([str(tmp_path)], CONFIG)
    assert [source.key(i) for i in range(len(source))] == ["a.png", "c.png", "sub/b.png"]
    assert source[0].captions == ("a red, round thing",)
    assert source.fields(2)["style"] == "flat" and source[2].captions == ("émoji ✨",)
    assert cause(source, 1) == "unreadable file"


def test_rows_of_one_image_give_it_several_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "./a.png", "text": ["two", "thr\nee"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_source([str(tmp_path)], CONFIG)[0].captions == ("one", "two", "thr ee")


@pytest.mark.parametrize(
    "table", ["{", '{"text": "no name"}', '["a.png"]', '{"file_name": "a.png", "caption": "x"}']
)
def test_a_wrong_table_is_refused(tmp_path, table):
    (tmp_path / "metadata.jsonl").write_text(table)
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        open_source([str(tmp_path)], CONFIG)


def test_broken_samples_of_a_folder_say_why(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(picture(0) if name != "d" else b"nonsense")
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "d.txt").write_text("fine")
    source = open_source([str(tmp_path)], CONFIG)
    assert [cause(source, i) for i in range(4)] == [
        "no caption", "empty caption", "caption is not Unicode", "not an image"
    ]  # fmt: skip


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_shard(tmp_path, format):
    deep = "long" * 40 + "/ü"
    members = [*samples(2), (f"{deep}.jpg", picture(5, "JPEG")), (f"{deep}.txt", b"\xef\xbb\xbfdeep\nlines")]
    if format == tarfile.USTAR_FORMAT:
        members = [(name.replace("long" * 40, "short"), data) for name, data in members]
    source = open_source([str(write_tar(tmp_path / "s.tar", members, format))], CONFIG)
    assert len(source) == 3
    assert source.key(1) == "s.tar/00001"
    assert source[1].captions == ("picture 1",)
    assert source.fields(1)["tags"] == ["one", "n1"] and source.fields(1)["style"] == "flat"
    assert source[2].captions == ("deep", "lines")
    assert source[2].image.shape == (6, 5, 3)
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(IndexError):
        source[-1]


def test_broken_samples_of_a_tar_say_why(tmp_path):
    members = [("a.png", picture(0)), ("b.txt", b"no image"), ("c.png", picture(0)), ("c.txt", b""),
               ("d.png", b""), ("d.txt", b"d"), ("e.png", picture(0)), ("e.json", b"[1"),
               ("f.webp", picture(0, "WEBP")), ("f.json", b'{"caption": "from the JSON"}'),
               ("README.md", b"-"), ("g.png", picture(0)), ("g.json", b'{"caption": "\\ud800"}')]  # fmt: skip
    source = TarSource(write_tar(tmp_path / "s.tar", members))
    causes = {"a": "no caption", "b": "no image", "c": "empty caption", "d": "not an image",
              "e": "damaged JSON", "g": "caption is not Unicode"}  # fmt: skip
    found = {source.key(i)[-1]: i for i in range(len(source))}
    assert set(found) == set("abcdefg")
    assert {key: cause(source, found[key]) for key in causes} == causes
    assert source[found["f"]].captions == ("from the JSON",)


@pytest.fixture(scope="module", params=[tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def whole_tar(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    members = samples(3)
    if request.param == tarfile.PAX_FORMAT:
        members = [("é" * 60 + name, data) for name, data in members]
    path = write_tar(folder / "whole.tar", members, request.param)
    return folder, path.read_bytes(), read_all(TarSource(path))


@settings(max_examples=120)
@given(st.data())
def test_a_tar_cut_anywhere_gives_a_prefix_and_one_broken(whole_tar, data):
    folder, content, whole = whole_tar
    zeros = len(content) - len(content.rstrip(b"\0"))
    at = data.draw(
        st.integers(0, len(content) - zeros) | st.integers(0, len(content) // 512).map(lambda b: b * 512)
    )
    cut = folder / "cut.tar"
    cut.write_bytes(content[:at])
    source = TarSource(cut)
    read = []
    for i in range(len(source)):
        try:
            read.append((source[i].image.tobytes(), source[i].captions))
        except BrokenSample as broken:
            assert broken.cause == "cut tar" and i == len(source) - 1
    assert read == whole[: len(read)]
    assert len(read) == len(whole) or len(source) == len(read) + 1
    assert source.fingerprint()


@settings(max_examples=80)
@given(st.data())
def test_a_damaged_tar_never_crashes(whole_tar, data):
    folder, content, _ = whole_tar
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.tar"
    path.write_bytes(damaged)
    try:
        source = TarSource(path)
    except DataError:
        return
    for i in range(len(source)):
        with contextlib.suppress(BrokenSample):
            source[i]


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_any_unicode_caption_is_kept(tmp_path_factory, caption):
    folder = tmp_path_factory.mktemp("unicode")
    (folder / "a.png").write_bytes(picture(0))
    (folder / "a.txt").write_bytes(caption.encode())
    tar = write_tar(folder / "s.tar", [("a.png", picture(0)), ("a.txt", caption.encode())])
    expected = [line.strip() for line in caption.removeprefix("\ufeff").replace("\r", "\n").split("\n")]
    expected = [line for line in expected if line]
    for source in (open_source([str(folder)], CONFIG), TarSource(tar)):
        if expected:
            assert source[0].captions == tuple(expected)
        else:
            assert cause(source, 0) == "empty caption"


def test_globs_and_ranges_concatenate_in_order(tmp_path):
    for n in range(12):
        write_tar(tmp_path / f"train-{n:03}.tar", samples(2, first=2 * n))
    ranged = open_source([str(tmp_path / "train-{000..011}.tar")], CONFIG)
    globbed = open_source([str(tmp_path / "train-*.tar")], CONFIG)
    assert len(ranged) == 24
    assert [ranged[i].captions[0] for i in range(24)] == [f"picture {n}" for n in range(24)]
    assert ranged.key(23) == "train-011.tar/00023" and ranged.fields(23)["style"] == "flat"
    assert ranged.fingerprint() == globbed.fingerprint()
    two = open_source([str(tmp_path / "train-{001..001}.tar"),
                       str(tmp_path / "train-000.tar")], CONFIG)  # fmt: skip
    assert two[0].captions == ("picture 2",) and two[2].captions == ("picture 0",)
    with pytest.raises(IndexError):
        ranged[24]


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    one = write_tar(tmp_path / "one.tar", samples(3))
    (tmp_path / "else").mkdir()
    same = write_tar(tmp_path / "else/two.tar", samples(3))
    changed = [(n, b"another caption" if n == "00001.txt" else data) for n, data in samples(3)]
    other = write_tar(tmp_path / "else/three.tar", changed)
    assert TarSource(one).fingerprint() == TarSource(same).fingerprint() != TarSource(other).fingerprint()
    folder = open_source([str(write_folder(tmp_path / "a"))], CONFIG)
    assert folder.fingerprint() == open_source([str(write_folder(tmp_path / "b"))], CONFIG).fingerprint()
    before = folder.fingerprint()
    (tmp_path / "a/0.txt").write_text("changed")
    assert folder.fingerprint() != before


def test_paths_that_are_not_data_say_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / "bad.tar").write_bytes(b"not a tar at all" * 100)
    write_tar(tmp_path / "bare.tar", [("README", b"-")])
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/0.tar", samples(1))
    wrong = {
        "absent": "no such file or folder", "absent-{00..02}.tar": "no such", "none-*.tar": "nothing matches",
        "empty": "no images here", "notes.md": "unknown kind", "bad.tar": "not a tar",
        "bare.tar": "no images", "shards": r"for its shards give .*\*\.tar", "x-{3..1}.tar": "low to high",
    }  # fmt: skip
    for name, message in wrong.items():
        with pytest.raises(DataError, match=message) as caught:
            open_source([str(tmp_path / name)], CONFIG)
        assert name.split("-")[0] in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="expected a folder"):
        open_source(["hf:someone/something"], CONFIG)
    with pytest.raises(RequestError, match="no data was given"):
        open_source([], CONFIG)


def test_a_folder_under_the_name_of_a_built_in_set_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("shapes").mkdir()
    Path("shapes/a.png").write_bytes(picture(0))
    Path("shapes/a.txt").write_text("my own")
    assert len(open_source(["shapes,length=3"], DataConfig())) == 3 and not caplog.records
    assert len(open_source(["shapes"], DataConfig())) == 20_000
    assert "shapes is the built-in set; for what lies here under that name write ./shapes" in caplog.text
    own = open_source(["./shapes"], DataConfig())
    assert len(own) == 1 and own[0].captions == ("my own",)


def test_shapes_are_a_source():
    config = DataConfig(resolution=64)
    source = open_source(["shapes:train,length=4,seed=3"], config)
    assert len(source) == 4 and len(open_source(["shapes,length=7"], config)) == 7
    image, captions = source[0]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and all(captions)
    assert source.fields(0)["caption"] == list(captions)
    assert source.fingerprint() != open_source(["shapes,length=4,seed=4"], config).fingerprint()
    assert len({source.key(i) for i in range(4)}) == 4
    with pytest.raises(IndexError):
        source[4]
    for spec, message in {"shapes,lenght=3": "did you mean 'length'", "shapes,length=x": "whole number",
                          "shapes:nowhere": "nowhere", "shapes,length=0": "1 or more"}.items():  # fmt: skip
        with pytest.raises(RequestError, match=message):
            open_source([spec], config)


def test_templates_expand_over_the_fields():
    fields = {"caption": ["a", "b"], "label": "cat", "tags": ["x", "y"], "none": None, "blank": " ", "n": 3}
    assert expand_template("{caption}", fields) == ["a", "b"]
    assert expand_template("{label}, {tags}", fields) == ["cat, x", "cat, y"]
    assert expand_template("{n} {label} {n}", fields) == ["3 cat 3"]
    assert expand_template("", fields) == [""]
    assert expand_template("{{{label}}}", fields) == ["{cat}"]
    for missing in ("{other}", "{label} {none}", "{blank}"):
        assert expand_template(missing, fields) == []
    assert expand_template("{caption}", {"caption": "{label}"}) == ["{label}"]
    assert expand_template("{x}", {"x": "\ud800"}) == ["?"]


@pytest.mark.parametrize("text, broken", [
    (None, "no caption"), ("", "empty caption"), ([], "empty caption"), ([" ", 3], "empty caption"),
    ("\udcff", "caption is not Unicode"),
])  # fmt: skip
def test_captions_that_are_none(text, broken):
    with pytest.raises(BrokenSample, match=broken):
        caption_lines(text)


@pytest.mark.parametrize("data, message", [
    ({"crop": "randon"}, "did you mean 'random'"), ({"resolutoin": 32}, "did you mean 'resolution'"),
    ({"resolution": 0}, "resolution"), ({"val_fraction": 1.0}, "val_fraction"),
    ({"captions": []}, "template"),
    ({"captions": ["{caption"]}, "captions"), ({"captions": ["{}"]}, "plain fields"),
    ({"captions": ["{a!r}"]}, "plain fields"), ({"weights": {"(": 1.0}}, "regular expression"),
    ({"weights": {"a": -1.0}}, "0 or more"), ({"weights": {"a": float("nan")}}, "weights"),
])  # fmt: skip
def test_wrong_configs_are_refused(data, message):
    with pytest.raises(RequestError, match=message):
        from_dict(DataConfig, data)


def test_config_reads_from_plain_data():
    config = from_dict(DataConfig, {"train": ["a.tar"], "weights": {"skin tone": 0.3}, "balance": "style"})
    assert config.train == ("a.tar",) and config.weights == {"skin tone": 0.3} and config.val == ()


def test_misspelt_template_fields_are_named_in_the_log(tmp_path, caplog):
    path = write_tar(tmp_path / "s.tar", samples(2))
    open_source([str(path)], DataConfig(captions=("{stile}", "{style}")))
    assert (
        "'stile'" in caplog.text and "did you mean 'style'" in caplog.text and "'style' is" not in caplog.text
    )
