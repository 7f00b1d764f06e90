import hashlib
import json
import os
import shutil
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armchair import bundle
from armchair.bundle import bundled_names, find_bundle, read_bundle, write_bundle
from armchair.errors import BundleError, RequestError, WorkError

TIED = torch.arange(6.0).reshape(2, 3)
WEIGHTS = {
    "prior": {"embed": TIED, "head": TIED, "half": torch.ones(2, dtype=torch.bfloat16), "t": TIED.t()},
    "image_tokenizer": {"codes": torch.arange(4), "none": torch.zeros(0, 3)},
}
INFO = {
    "name": "tiny",
    "recipe": {"prior": {"kind": "dalle", "lr": 1e-4}},
    "metrics": {"fid": 9.5},
    "note": "사과",
}
FILES = ["bundle.json", "card.md", "image_tokenizer.safetensors", "prior.safetensors", "text_tokenizer.json"]


def write(out: Path, **changes: Any) -> None:
    write_bundle(
        out, **{"info": INFO, "card": "# Tiny\n", "text_tokenizer": '{"a": 1}', "weights": WEIGHTS} | changes
    )


def read_all(path: Path) -> tuple[Any, ...]:
    """Read and verify every byte; a summary that compares by value."""
    b = read_bundle(path)
    tensors = {(part, k): (v.dtype, v.tolist()) for part in b.parts for k, v in b.weights(part).items()}
    return b.name, b.info, b.card, b.fingerprint, b.text_tokenizer, b.parts, tensors


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "tiny")
        write(Path(folder) / "tiny.zip")
        yield Path(folder)


def test_round_trip(whole: Path) -> None:
    assert sorted(os.listdir(whole / "tiny")) == FILES
    b = read_bundle(str(whole / "tiny"))
    assert (b.name, b.path, b.info, b.card) == ("tiny", whole / "tiny", INFO, "# Tiny\n")
    assert b.text_tokenizer == '{"a": 1}' and b.parts == ("image_tokenizer", "prior")
    for part, tensors in WEIGHTS.items():
        got = b.weights(part)
        assert got.keys() == tensors.keys()
        assert all(got[k].dtype == v.dtype and torch.equal(got[k], v) for k, v in tensors.items())
    with pytest.raises(BundleError, match="no 'ranker' in this bundle"):
        b.weights("ranker")


def test_directory_and_zip_are_the_same_bundle(whole: Path, tmp_path: Path) -> None:
    assert read_all(whole / "tiny") == read_all(whole / "tiny.zip")
    shutil.copytree(whole / "tiny", tmp_path / "elsewhere")
    assert read_bundle(tmp_path / "elsewhere").fingerprint == read_bundle(whole / "tiny").fingerprint
    write(tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (whole / "tiny.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "flat.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            archive.write(whole / "tiny" / name, name)
    assert read_all(tmp_path / "flat.zip") == read_all(whole / "tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {"card": "other"},
        {"info": INFO | {"metrics": {"fid": 9.6}}},
        {"text_tokenizer": None},
        {"weights": {"prior": WEIGHTS["prior"]}},
    ],
)
def test_fingerprint_covers_everything(whole: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path / "b", **changes)
    assert read_bundle(tmp_path / "b").fingerprint != read_bundle(whole / "tiny").fingerprint


def test_name_without_one_in_info(tmp_path: Path) -> None:
    write(tmp_path / "a.b", info={})
    write(tmp_path / "c.zip", info={})
    assert (read_bundle(tmp_path / "a.b").name, read_bundle(tmp_path / "c.zip").name) == ("a.b", "c")


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_byte_or_cut_is_found(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    original = (whole / "tiny" / name).read_bytes()
    i = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(0, 255))  # 0 cuts the file at i instead
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(whole / "tiny", folder, dirs_exist_ok=True)
        altered = original[:i] + bytes([original[i] ^ flip]) + original[i + 1 :] if flip else original[:i]
        (Path(folder) / name).write_bytes(altered)
        with pytest.raises(BundleError) as error:
            read_all(Path(folder))
    assert name in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_zip_is_refused_or_reads_the_same(whole: Path, data: st.DataObject) -> None:
    original = (whole / "tiny.zip").read_bytes()
    tail = original.rindex(b"PK\5\6")
    directory = original.index(b"PK\1\2")
    places = st.integers(0, len(original) - 1) | st.integers(directory, tail + 21)
    i, flip = data.draw(places), data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.zip"
        path.write_bytes(
            original[:i] + bytes([original[i] ^ flip]) + original[i + 1 :] if flip else original[:i]
        )
        try:
            assert read_all(path) == read_all(whole / "tiny")
        except BundleError as error:
            assert "tiny.zip" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("old", "new"), [(b" ", b"\t"), (b"\n", b"\r"), (b"u", b"U"), (b"}", b"}\n")])
def test_changes_that_json_does_not_see_are_found(
    whole: Path, tmp_path: Path, old: bytes, new: bytes
) -> None:
    shutil.copytree(whole / "tiny", tmp_path / "b")
    index = tmp_path / "b" / "bundle.json"
    index.write_bytes(index.read_bytes().replace(old, new, 1))
    with pytest.raises(BundleError, match=r"bundle\.json is"):
        read_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole / "tiny", tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(BundleError, match=name):
        read_bundle(tmp_path / "b")


def reindex(folder: Path, **changes: Any) -> None:
    """Change bundle.json as somebody would who knows how its digest is made."""
    index = json.loads((folder / "bundle.json").read_bytes()) | changes
    index["digest"] = bundle._digest(index)
    (folder / "bundle.json").write_bytes(bundle._render(index))


def entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this armchair reads 1"),
        ({"files": []}, "expected 'files'"),
        ({"files": {}}, "expected 'files'"),
        ({"files": {"card.md": 1}}, "expected 'files'"),
        ({"files": {"card.md": {"sha256": "x", "bytes": -1}}}, "expected 'files'"),
        ({"files": {"card.md": {"sha256": "x", "bytes": 3}, "../x": entry(b"")}}, "expected 'files'"),
        ({"files": {"card.md": entry(b"# Tiny\n")}}, "image_tokenizer.safetensors is not listed"),
    ],
)
def test_wrong_index(whole: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    shutil.copytree(whole / "tiny", tmp_path / "b")
    reindex(tmp_path / "b", **changes)
    with pytest.raises(BundleError, match=f"bundle.json.*{message}|{message}.*bundle.json"):
        read_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"nonsense", b"[" * 100_000, b"\xff", b'{"format_version": NaN}']
)
def test_index_of_nonsense(whole: Path, tmp_path: Path, text: bytes) -> None:
    shutil.copytree(whole / "tiny", tmp_path / "b")
    (tmp_path / "b" / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match="bundle.json"):
        read_bundle(tmp_path / "b")


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "b")
    pickle = b"\x80\x04cos\nsystem\n(S'false'\ntR."
    (tmp_path / "b" / "prior.safetensors").write_bytes(pickle)
    files = json.loads((tmp_path / "b" / "bundle.json").read_bytes())["files"]
    reindex(tmp_path / "b", files=files | {"prior.safetensors": entry(pickle)})
    with pytest.raises(BundleError, match="prior.safetensors is not a safetensors file"):
        read_bundle(tmp_path / "b").weights("prior")


def test_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("hello")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    for place, message in (
        (tmp_path, "has no bundle.json"),
        (tmp_path / "nowhere", "no such file"),
        (tmp_path / "text.zip", "not a bundle"),
        (tmp_path / "empty.zip", "has no bundle.json"),
        (tmp_path / ("x" * 5000), "no such file"),
        (tmp_path / "x\0y", "no such file"),
    ):
        with pytest.raises(BundleError, match=message):
            read_bundle(place)


@pytest.mark.parametrize("name", ["../evil", "/etc/x", "sub/bundle.json", "weights.pt", "card.md"])
def test_zip_with_other_names_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(whole / "tiny.zip", tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name, "x")
    with pytest.raises(BundleError, match=f"unexpected '{name}'"):
        read_bundle(tmp_path / "b.zip")


@pytest.mark.parametrize("name", ["bundle.json", "prior.safetensors"])
def test_zip_bomb_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for other in FILES:
            if other != name:
                archive.write(whole / "tiny" / other, other)
        with archive.open(name, "w") as member:
            for _ in range(65):
                member.write(bytes(1 << 20))
    with pytest.raises(BundleError, match=f"{name} would unpack to 68157440 bytes, refused"):
        read_bundle(tmp_path / "b.zip")


class Crash(BaseException):
    """The machine stops: nothing after it runs."""


def crashing(step: Any, countdown: Iterator[int]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(countdown, None) is None:
            raise Crash
        return step(*args, **kwargs)

    return call


STEPS = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_crash_at_any_step_leaves_a_whole_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    old, new = INFO | {"v": "old"}, INFO | {"v": "new"}
    seen = set()
    for k in range(100):
        out = tmp_path / str(k) / f"b{suffix}"
        write(out, info=old)
        countdown = iter(range(k))

        with monkeypatch.context() as patch:
            for module, name in STEPS:
                patch.setattr(module, name, crashing(getattr(module, name), countdown))
            try:
                write(out, info=new)
            except Crash:
                crashed = True
            else:
                crashed = False
        info = read_bundle(out).info
        assert info in (old, new)
        read_all(out)
        assert find_bundle(str(out)) == out
        seen.add((info["v"], crashed))
        write(out, info=new)  # and the next write finds its way
        read_all(out)
        assert read_bundle(out).info == new and not (out.parent / f".{out.name}.old").exists()
        if not crashed:
            break
    assert seen == {("old", True), ("new", True), ("new", False)} and k > 5


@pytest.mark.parametrize("at", [1, 2])
def test_failed_rename_is_one_error_and_the_old_bundle_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write(tmp_path / "b")
    before = read_all(tmp_path / "b")
    rename, calls = os.rename, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        rename(*args)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(WorkError, match="cannot write bundle .*No space left"):
        write(tmp_path / "b", card="new")
    assert read_all(tmp_path / "b") == before
    assert len(os.listdir(tmp_path)) == 1


def test_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    for out in (tmp_path / "b", tmp_path / "b.zip"):
        for card in ("one", "two"):
            write(out, card=card)
        assert read_bundle(out).card == "two"
    assert sorted(os.listdir(tmp_path)) == ["b", "b.zip"]


def test_writing_behind_a_link_keeps_the_link(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", card="new")
    assert (tmp_path / "link").is_symlink() and read_bundle(tmp_path / "real").card == "new"


def test_writing_never_destroys_anything_else(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "file").touch()
    (tmp_path / "folder.zip").mkdir()
    for name, message in (("pictures", "'a.png'"), ("file", "is a file"), ("folder.zip", "a directory")):
        with pytest.raises(RequestError, match=message):
            write(tmp_path / name)
    with pytest.raises(RequestError, match="cannot write"):
        write(tmp_path / "file" / "b")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.zip", "pictures"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"info": {"digest": 1}}, "digest"),
        ({"info": {"metric": float("nan")}}, "not JSON"),
        ({"info": {"path": Path("x")}}, "not JSON"),
        ({"weights": {"priors": {}}}, "did you mean 'prior'"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        write(tmp_path / "b", **changes)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundled"
    write(folder / "emoji")
    write(folder / "shapes")
    monkeypatch.setattr(bundle, "_BUNDLED", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_find_bundled(bundled: Path) -> None:
    assert bundled_names() == ["emoji", "shapes"]
    assert find_bundle(None) == find_bundle("emoji") == bundled / "emoji"
    Path("emoji").mkdir()  # a folder of pictures
    assert find_bundle("emoji") == bundled / "emoji"
    write(Path("shapes"))
    assert find_bundle("shapes") == Path("shapes")
    write(Path("x.zip"))
    assert find_bundle("x.zip") == Path("x.zip")


@pytest.mark.parametrize(
    "model", ["shape", "", "/nowhere/at/all", "./org/name", "a/b/c", "x" * 5000, "a\0b", "~x/y"]
)
def test_find_nothing(bundled: Path, model: str) -> None:
    with pytest.raises(BundleError, match="did you mean 'shapes'" if model == "shape" else "emoji, shapes"):
        find_bundle(model)


def test_no_bundled_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_BUNDLED", tmp_path / "none")
    assert bundled_names() == []
    for model in (None, "emoji"):
        with pytest.raises(BundleError, match="no bundled model"):
            find_bundle(model)


def test_hub(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((hub_id, sorted(allow_patterns)))
        if hub_id == "org/gone":
            raise ValueError("404 Client Error\nmany\nlines")
        return str(bundled / "shapes")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    assert find_bundle("org/name-1.0") == bundled / "shapes"
    assert asked == [("org/name-1.0", sorted([*FILES, "ranker.safetensors"]))]
    with pytest.raises(BundleError, match="no path 'org/gone'.*404 Client Error$"):
        find_bundle("org/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="pip install huggingface_hub"):
        find_bundle("org/name")
