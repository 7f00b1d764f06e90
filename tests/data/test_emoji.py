"""The emoji set, built from packages of a few icons that a stand-in for npm hands out."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import resvg_py
from PIL import Image

import tiny_icons
from armchair.cli import main
from armchair.data import emoji
from armchair.data.emoji_heldout import HELDOUT, SIBLINGS
from armchair.data.sources import DataConfig, open_source
from armchair.data.tar_shards import TarSource
from armchair.errors import DataError, RequestError

SIZE = 32


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The folder of `tiny_icons.write_packages`, whose packages are those of the set."""
    return use(tiny_icons.icon_sets(), tmp_path / "packages", monkeypatch)


def use(sets, folder, monkeypatch):
    tiny_icons.write_packages(folder, sets)
    icons, captions = tiny_icons.read_packages(folder)
    monkeypatch.setattr(emoji, "PACKAGES", icons)
    monkeypatch.setattr(emoji, "CAPTIONS", captions)
    monkeypatch.setattr(emoji, "LISTING", ("noto",))
    monkeypatch.setenv("PATH", str(folder / "bin"))
    return folder


def build(out, *flags):
    return main(["data", "build", "emoji", "--out", str(out), "--size", str(SIZE), "--workers", "1", *map(str, flags)])


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def read(out):
    """split -> [(fields, captions, image)], without the samples' order."""
    samples = {}
    for split in emoji.SPLITS:
        found = [TarSource(path) for path in sorted(out.glob(f"{split}-*.tar"))]
        samples[split] = [(s.fields(i), s[i].captions, s[i].image) for s in found for i in range(len(s))]
    return samples


def refusal(capsys):
    """The one line that the command ended with."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("armchair: error: ")
    return line


def test_without_out_the_set_is_built_where_its_name_finds_it(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARMCHAIR_DATA", str(tmp_path / "home"))
    with pytest.raises(DataError, match="`armchair data build emoji` builds it there"):
        open_source(["emoji"], DataConfig())
    assert main(["data", "build", "emoji", "--size", str(SIZE), "--workers", "1"]) == 0
    assert str(tmp_path / "home/emoji") in capsys.readouterr().err
    place = tmp_path / "home/emoji"
    for name, split in (("emoji", "train"), *((f"emoji:{split}", split) for split in emoji.SPLITS)):
        found, shards = open_source([name], DataConfig()), sorted(map(str, place.glob(f"{split}-*.tar")))
        assert found.fingerprint() == open_source(shards, DataConfig()).fingerprint()
    with pytest.raises(RequestError, match="did you mean 'val'"):
        open_source(["emoji:vall"], DataConfig())
    (place / "index.json").unlink()  # as in a set that is still being built
    with pytest.raises(DataError, match="builds it there"):
        open_source(["emoji"], DataConfig())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(tiny_icons.icon_sets(), folder / "packages", monkeypatch)
        assert build(folder / "set") == 0
    return folder / "set"


def test_every_picture_is_in_its_split_with_all_that_is_known_of_it(built):
    samples = read(built)
    train = {(fields["label"], fields["style"]): fields for fields, _, _ in samples["train"] + samples["val"]}
    apple = train["red apple", "noto emoji"]
    assert apple["tags"] == ["apple", "fruit", "red", "ripe"] and apple["group"] == "all things"
    assert apple["hexcode"] == "1F34E" and apple["icon"] == "red-apple" and apple["manner"] == "shaded style"
    # by the name without hyphens, by a shortcode, by its parts, by our own list, and by the icon's own name
    assert {label for label, style in train if style == "firefox os emoji"} == {
        "red apple", "clapping hands", "big apple", "flag: France", "brown heart",
    }  # fmt: skip
    assert ("red apple", "flat color icon") in train and ("thing", "noto emoji") in train
    assert train["clapping hands: medium-light skin tone", "noto emoji"]["tags"] == ["clap", "hand"]
    assert {("left", "noto emoji"), ("right", "noto emoji")} <= train.keys()
    assert not {"gone", "white", "spare", "xyzzy"} & {label for label, _ in train}
    index = json.loads((built / "index.json").read_text())
    assert index["left_out"] == {"of one colour": 1, "without a name": 1, "near a held-out pair": 3, "broken": {}}
    assert index["images"] == {split: len(samples[split]) for split in emoji.SPLITS}
    assert 0 < index["images"]["val"] < 15
    assert index["styles"]["flat color icon"] == {"train": 1, "val": 0, "heldout": 0}


def test_held_out_pairs_and_what_gives_them_away_are_in_no_training_file(built):
    samples = read(built)
    held = {(fields["label"], fields["style"]) for fields, _, _ in samples["heldout"]}
    assert held == {("blue heart", "noto emoji"), ("woman mechanic", "noto emoji")}
    learned = {(f["label"], f["style"]) for f, _, _ in samples["train"] + samples["val"]}
    for level, label, style in HELDOUT:
        if level == "L":
            assert all(seen.partition(":")[0] != label and seen != label for seen, _ in learned)
        near = {style}.union(*(pair for pair in SIBLINGS if style in pair))
        assert not {(label, other) for other in near} & learned
    assert json.loads((built / "heldout.json").read_text()) == [held._asdict() for held in HELDOUT]


def test_licences_are_told_for_each_picture_and_in_all(built):
    table = {package.style: package for package in emoji.PACKAGES}
    text = (built / "LICENCES.md").read_text(encoding="utf-8")
    samples = [fields for part in read(built).values() for fields, _, _ in part]
    for fields in samples:
        package = table[fields["style"]]
        told = (fields["licence"], fields["credit"], fields["source"], fields["source_version"])
        assert told == (package.licence, package.credit, f"npm:{package.name}", package.version)
        assert f"`{package.name}` {package.version} | {package.licence} | {package.credit} |" in text
    assert len({fields["licence"] for fields in samples}) == 2


def test_captions_come_in_several_wordings_the_first_of_them_label_and_style(built):
    for fields, captions, _ in read(built)["train"]:
        label = fields["label"].lower()
        assert captions[0] == f"{label}, {fields['style']}"
        assert captions[1:3] == (label, f"{label}, {fields['manner']}")
        assert len(set(captions)) == len(captions) and all(text == text.lower() for text in captions)
        if fields["label"] == "red apple" and fields["tags"]:
            assert captions[3] == "red apple, kinds" and len(captions[4].split()) == 3
            assert set(captions[4].split()) < {"apple", "fruit", "red", "ripe"}


def test_the_set_is_read_like_any_other_data(built):
    source = open_source([str(built / "train-*.tar")], DataConfig(captions=("a {label}, {manner}", "{tags}")))
    assert len(source) > 100 and source.fields(0)["style"] == "noto emoji"


def test_pictures_are_what_was_drawn_but_for_webp(built):
    pictures = {f["label"]: image for f, _, image in read(built)["train"] if f["style"] == "noto emoji"}
    left, right = (pictures[name].astype(int) for name in ("left", "right"))
    assert left.shape == (SIZE, SIZE, 3)
    assert np.abs(left[:, 4:12] - [255, 0, 0]).max() < 60 and left[:, 20:].min() > 230
    assert np.abs(left - right[:, ::-1]).mean() < 4
    assert pictures["wide"][:10].min() > 230 and pictures["wide"][14:18, 2:6, 1].max() < 60  # centred


def test_rendering_is_twice_the_size_averaged_down():
    circle = '<circle cx="15" cy="14" r="11" fill="#2a7"/>'
    svg = emoji._svg({"body": circle}, {"width": 32, "height": 32})
    drawn = emoji.render(svg, 24)
    png = resvg_py.svg_to_bytes(svg_string=svg.replace("{SIZE}", "48"), width=48, height=48, background="white")
    whole = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB")).astype(float)
    mean = whole.reshape(24, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(drawn - mean).max() <= 1 and drawn.std() > 20


def test_the_same_packages_give_the_same_bytes(built, packages, tmp_path):
    assert build(tmp_path / "again", "--workers", 2, "--cache", tmp_path / "elsewhere") == 0
    assert contents(tmp_path / "again") == contents(built)
    assert sorted(os.listdir(tmp_path / "again")) == sorted(contents(built))  # nothing beside them
    assert len(os.listdir(tmp_path / "elsewhere")) == 4


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_was_stopped_goes_on(kill, tmp_path, monkeypatch, capsys):
    sets = tiny_icons.icon_sets()
    for icon in list(sets["noto"]["icons.json"]["icons"].values())[20:70]:
        icon["body"] = tiny_icons.SLOW
    folder, out = use(sets, tmp_path / "packages", monkeypatch), tmp_path / "set"
    monkeypatch.setattr(emoji, "CHUNK", 8)
    environment = {**os.environ, "PYTHONPATH": str(Path(emoji.__file__).parents[2])}
    program = subprocess.Popen(
        [sys.executable, tiny_icons.__file__, str(folder), str(out)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(chunks := sorted(out.glob(".work/noto-*.zip"))) < 3:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    program.send_signal(kill)
    last = program.communicate(timeout=60)[1].splitlines()[-1]  # workers hold stderr too: they have ended
    assert program.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL)
    assert last == "armchair: interrupted" or kill == signal.SIGKILL
    assert not list(out.glob("*.tar"))
    chunks[0].write_bytes(b"damaged")
    fetched = (folder / "fetched").read_text()
    assert build(out) == 0
    said = capsys.readouterr().err
    (kept,) = re.findall(r"noto emoji: \d+ drawn, (\d+) of them before", said)
    assert int(kept) >= 8 * (len(chunks) - 1)
    assert (folder / "fetched").read_text() == fetched
    assert build(tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole") and not (out / ".work").exists()


def test_a_set_that_is_whole_is_left_alone_and_a_damaged_one_mended(packages, tmp_path, capsys):
    out = tmp_path / "set"
    assert build(out) == 0
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(out) == 0 and "built already" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with (out / "train-0000.tar").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert build(out) == 0
    assert contents(out) == before


def test_a_set_that_was_built_otherwise_is_not_overwritten(packages, tmp_path, capsys):
    out = tmp_path / "set"
    assert build(out) == 0
    assert build(out, "--size", 16) == 2
    assert "another size" in refusal(capsys)
    assert build(out, "--size", 16, "--force") == 0
    assert read(out)["train"][0][2].shape == (16, 16, 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train-0000.tar").write_bytes(b"my own")
    assert build(tmp_path / "mine") == 2
    assert "train-0000.tar" in refusal(capsys)
    assert (tmp_path / "mine" / "train-0000.tar").read_bytes() == b"my own"
    (tmp_path / "file").write_text("")
    assert build(tmp_path / "file") == 2
    assert "is a file" in refusal(capsys)


def test_a_broken_icon_is_named_and_counted_and_many_stop_the_build(tmp_path, monkeypatch, capsys):
    sets = tiny_icons.icon_sets()
    icons = sets["noto"]["icons.json"]["icons"]
    icons["thing-7"] = {"body": "<path"}
    use(sets, tmp_path / "one", monkeypatch)
    assert build(tmp_path / "set") == 0
    said = capsys.readouterr().err
    assert "left out noto:thing-7, which cannot be drawn" in said and "1 broken" in said
    assert list(json.loads((tmp_path / "set" / "index.json").read_text())["left_out"]["broken"]) == ["noto:thing-7"]
    icons["thing-8"] = {"body": "</g>"}
    use(sets, tmp_path / "two", monkeypatch)
    assert build(tmp_path / "other") == 1
    assert "2 of 161 icons cannot be drawn, more than 1%" in refusal(capsys)


def test_without_npm(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(tmp_path / "set") == 2
    assert "npm, which is not installed" in refusal(capsys)
    # with the packages at hand it is not needed
    assert build(tmp_path / "set", "--cache", packages / "registry") == 0


def test_without_the_renderer(packages, tmp_path, monkeypatch, capsys):
    def version(name, found=metadata.version):
        if name == emoji.RENDERER:
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    assert build(tmp_path / "set") == 2
    assert "pip install 'armchair[data]'" in refusal(capsys)


def test_a_package_that_cannot_be_fetched(packages, tmp_path, capsys):
    (packages / "registry" / emoji.CAPTIONS.archive).unlink()
    assert build(tmp_path / "set") == 1
    assert refusal(capsys).endswith("npm could not fetch emojibase-data 17.0.0: 404 Not Found - emojibase-data")


def test_a_package_that_was_altered(packages, tmp_path, capsys):
    archive = packages / "registry" / emoji.PACKAGES[0].archive
    archive.write_bytes(archive.read_bytes() + b"x")
    assert build(tmp_path / "set") == 1
    assert "@iconify-json/noto 1.2.9 is not the package that was published" in refusal(capsys)
    assert not (tmp_path / "set" / ".packages" / archive.name).exists()


def test_flags_of_the_other_set_are_refused(tmp_path, capsys):
    assert build(tmp_path / "set", "--count", 3) == 2
    assert "--count is for the set shapes" in refusal(capsys)
    assert main(["data", "build", "shapes", "--out", str(tmp_path / "x"), "--cache", "y"]) == 2
    assert "--cache is for the set emoji" in refusal(capsys)
