"""The lists that an emoji model is measured with, and what is said of its drawings."""

import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from armchair.bundle import read_bundle
from armchair.card import render_card
from armchair.cli import main
from armchair.data.emoji_heldout import HELDOUT, HeldOut, split_of
from armchair.data.sources import DataConfig, open_source
from armchair.errors import RequestError
from armchair.eval.features import Extracted
from armchair.sample.engine import default_weights
from armchair.sample.pipeline import load_artist
from conftest import write_tiny_bundle
from test_benchmarks import benchmark

ROOT = Path(__file__).parents[1]
EMOJI = Path(os.environ.get("EMOJI_DATA", ROOT.parent / "shared/data"))  # what `armchair data build emoji` writes
SIDE = 16
COLOURS = {"red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220), "grey": (120, 120, 120)}
STYLES = ("flat", "round")
HELD = HeldOut("L", "white thing", "flat"), HeldOut("P", "yellow thing", "round")


class Colours:
    """Features of a picture: its mean colour in each quarter, beside a constant that tells white from grey."""

    name, fingerprint = "colours", "0" * 16

    def __init__(self) -> None:
        self.seen = 0

    def extract(self, images: Any) -> Extracted:
        self.seen += len(images)
        x = torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2)
        means = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return Extracted(torch.cat([means, torch.full((len(means), 1), 200.0)], 1), None)


def icon(colour: tuple[int, int, int], style: str) -> np.ndarray:
    """Flat ones fill their picture, round ones have a white corner."""
    pixels = np.full((SIDE, SIDE, 3), colour, np.uint8)
    if style == "round":
        pixels[: SIDE // 2, : SIDE // 2] = 255
    return pixels


def write_shard(path: Path, icons: list[tuple[str, str, np.ndarray]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, (label, style, pixels) in enumerate(icons):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, format="PNG")
            fields = {"label": label, "style": style, "group": "things", "caption": f"{label}, {style}"}
            for suffix, data in ((".png", png.getvalue()), (".json", json.dumps(fields).encode())):
                member = tarfile.TarInfo(f"{path.stem}-{i:03d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four things in two styles, one of them under a second name too, and two held-out pairs."""
    folder = tmp_path_factory.mktemp("emoji")
    icons = [(f"{name} thing", style, icon(colour, style)) for name, colour in COLOURS.items() for style in STYLES]
    write_shard(folder / "train-0000.tar", [*icons, ("Gray Thing", "round", icon(COLOURS["grey"], "round"))])
    white, yellow = icon((255, 255, 255), "flat"), icon((230, 220, 0), "round")
    write_shard(folder / "heldout-0000.tar", [("white thing", "flat", white), ("yellow thing", "round", yellow)])
    return folder


def pictures_of(labels: Any, folder: Path, shard: str, network: Any = None, **options: Any) -> Any:
    source = open_source([str(folder / shard)], DataConfig())
    return labels.read_pictures(source, network or Colours(), SIDE, **options)


class Obedient:
    """Draws what was asked for as its second candidate, which its ranker likes best, and a green thing as its first."""

    resolution = SIDE

    def __init__(self, folder: Path) -> None:
        self.known = {}
        for shard in folder.glob("*.tar"):
            source = open_source([str(shard)], DataConfig())
            self.known |= {source.fields(i)["caption"][0]: source[i].image for i in range(len(source))}

    def draw(self, prompt: str, *, candidates: int, seed: int) -> Any:
        images = [self.known[prompt], self.known["green thing, flat"]]
        return SimpleNamespace(images=[Image.fromarray(image) for image in images], candidates=[1, 0])

    def encode(self, images: list[Image.Image]) -> list[Image.Image]:
        return images

    def decode(self, codes: list[Image.Image]) -> list[Image.Image]:
        return codes


# The lists.


def lists() -> Any:
    return benchmark("emoji_lists")


def test_the_list_of_training_captions_has_a_third_of_skin_tones_and_gives_no_held_out_pair_away():
    made = lists()
    lines = made.read_list(made.PROMPTS)
    labels = [line.pair[0] for line in lines]
    assert len(lines) == len(set(labels)) == 200
    assert Counter("skin tone" in label for label in labels) == {True: 67, False: 133}
    assert all((line.heading == "skin tone") == ("skin tone" in line.pair[0]) for line in lines)
    assert all(split_of(str(i), *line.pair) in ("train", "val") for line in lines for i in range(3))


def test_the_sheet_has_training_captions_of_all_kinds_and_held_out_pairs_of_both_levels():
    made = lists()
    lines = made.read_list(made.SHEET)
    assert Counter(line.heading for line in lines) == {"training": 24, "held out, level L": 6, "held out, level P": 6}
    assert len({line.pair[0] for line in lines}) == 36
    for line in lines:
        if line.heading == "training":
            assert split_of("0", *line.pair) in ("train", "val")
        else:
            assert HeldOut(line.heading[-1], *line.pair) in HELDOUT
    assert max(Counter(line.pair[1] for line in lines[:24]).values()) == 3


def test_the_lists_are_what_the_training_pictures_give():
    if not list(EMOJI.glob("train-*.tar")):
        pytest.skip(f"no emoji set at {EMOJI}: armchair data build emoji, and EMOJI_DATA=FOLDER")
    made = lists()
    icons = made.read_icons(EMOJI)
    known = {(icon.label, icon.style) for icon in icons}
    assert all(line.pair in known for line in made.read_list(made.PROMPTS))
    assert all(line.pair in known for line in made.read_list(made.SHEET) if line.heading == "training")
    assert made.written(made.choose_prompts(icons)) == made.PROMPTS.read_text(encoding="utf-8")
    assert made.written(made.choose_sheet(icons)) == made.SHEET.read_text(encoding="utf-8")


def test_what_is_chosen_does_not_depend_on_the_order_of_the_pictures():
    made = lists()
    icons = [
        made.Icon(f"thing {i}{': dark skin tone' if i % 3 else ''}", f"style {s}", f"kind {i % 12}")
        for i in range(60)
        for s in range(9)
    ]
    shuffled = random.Random(0).sample(icons, len(icons))
    chosen, sheet = made.choose_prompts(icons, 30, 10), made.choose_sheet(icons)
    assert chosen == made.choose_prompts(shuffled, 30, 10) and sheet == made.choose_sheet(shuffled)
    assert [len(prompts) for prompts in chosen.values()] == [20, 10]
    assert not [prompt for prompt in chosen["no skin tone"] if "skin tone" in prompt]
    assert len(sheet["training"]) == 24
    for of in (lambda p: p.rpartition(", ")[2], lambda p: int(p.split(":")[0].split(",")[0].split()[1]) % 12):
        assert max(Counter(map(of, sheet["training"])).values()) <= 3


def test_a_list_is_read_as_it_was_written(tmp_path):
    made = lists()
    two = ["woman: dark skin tone, beard, noto emoji"]
    chosen = {"one": ["keycap: #, twemoji", "keycap: 7, noto emoji"], "two": two}
    (tmp_path / "list.txt").write_text(made.written(chosen), encoding="utf-8")
    lines = made.read_list(tmp_path / "list.txt")
    assert [tuple(line) for line in lines] == [(heading, p) for heading, of in chosen.items() for p in of]
    assert lines[2].pair == ("woman: dark skin tone, beard", "noto emoji")


# Labels of nearest pictures.


def test_the_same_picture_under_two_names_bears_both(shards):
    labels = benchmark("emoji_labels")
    gallery = labels.Gallery([pictures_of(labels, shards, "train-0000.tar")])
    assert len(gallery.pairs) == 8  # of nine
    (row,), _ = gallery.nearest(labels.unit(Colours().extract([icon(COLOURS["grey"], "round")]).features))
    assert gallery.pairs[row] == {("grey thing", "round"), ("gray thing", "round")}
    assert gallery.right(row, ("gray thing", "round")) == {"label": True, "style": True, "both": True}
    assert gallery.right(row, ("grey thing", "flat")) == {"label": True, "style": False, "both": False}
    assert gallery.chance(("grey thing", "flat")) == {"label": 2 / 8, "style": 4 / 8, "both": 1 / 8}
    assert gallery.chance(("no such thing", "flat"))["label"] == 0


def measured(labels: Any, shards: Path, monkeypatch: pytest.MonkeyPatch, artist: Any, candidates: int = 2) -> Any:
    monkeypatch.setattr(labels, "HELDOUT", HELD)
    train, held = (pictures_of(labels, shards, f"{name}-0000.tar") for name in ("train", "heldout"))
    lines = [labels.Line("plain", f"{colour} thing, {style}") for colour in ("red", "blue") for style in STYLES]
    groups = [(lines, train, labels.Gallery([train])), (labels.held_out_lines(), held, labels.Gallery([train, held]))]
    return labels.measure(artist, Colours(), groups, candidates)


def test_whoever_draws_what_is_asked_for_is_right_and_whoever_draws_one_thing_is_not(shards, monkeypatch):
    labels = benchmark("emoji_labels")
    found, framed = measured(labels, shards, monkeypatch, Obedient(shards))
    groups = labels.by_group(found)
    assert list(groups) == ["training captions", "training captions, plain", *(f"{labels.HELD}{x}" for x in "LP")]
    for table in groups.values():
        assert {kind: table[kind]["label"]["share"] for kind in labels.KINDS[:3]} == {
            "best": 1,
            "first": 0,
            "round trip": 1,
        }
        assert table["best"]["both"]["share"] == 1 and table["chance"]["label"]["share"] <= 0.25
    assert groups["training captions"]["first"]["style"]["right"] == 2  # it draws flat things, and half are
    assert groups["training captions"]["best"]["label"]["interval"][0] == pytest.approx(0.51, abs=0.01)
    left_out = [row["round trip, true picture left out"] for row in found]
    assert not any(row["both"] for row in left_out) and left_out[0]["nearest"] != found[0]["best"]["nearest"]
    assert found[0]["best"]["nearest"] == ["red thing, flat"] and found[0]["candidate"] == 1
    frames = {tuple(np.asarray(cell)[0, 0]) for cell in framed}
    assert frames == {labels.RIGHT} and framed[0].size == (2 * SIDE + 9, SIDE + 6)


def test_what_a_better_choice_could_reach_is_told(shards, monkeypatch):
    class ChoosesBadly(Obedient):
        def draw(self, *args: Any, **settings: Any) -> Any:
            drawing = super().draw(*args, **settings)
            return SimpleNamespace(images=drawing.images[::-1], candidates=drawing.candidates[::-1])

    labels = benchmark("emoji_labels")
    found, _ = measured(labels, shards, monkeypatch, ChoosesBadly(shards))
    table = labels.by_group(found)["training captions"]
    assert table["best"]["label"]["share"] == 0 and table[labels.ANY]["label"]["share"] == 1

    monkeypatch.setattr(ChoosesBadly, "draw", lambda artist, *_, **__: SimpleNamespace(
        images=[Image.fromarray(artist.known["green thing, flat"])] * 2, candidates=[0, 1]
    ))  # fmt: skip
    found, _ = measured(labels, shards, monkeypatch, ChoosesBadly(shards))
    assert labels.by_group(found)["training captions"][labels.ANY]["label"]["share"] == 0


def test_features_are_kept_and_only_for_the_same_pictures(shards, tmp_path):
    labels, cache = benchmark("emoji_labels"), tmp_path / "gallery.npz"
    network = Colours()
    first = pictures_of(labels, shards, "train-0000.tar", network, cache=cache)
    again = pictures_of(labels, shards, "train-0000.tar", network, cache=cache)
    assert network.seen == 9 and np.array_equal(first.features, again.features) and first.digests == again.digests
    pictures_of(labels, shards, "heldout-0000.tar", network, cache=cache)
    assert network.seen == 11 and os.listdir(tmp_path) == ["gallery.npz"]
    cache.write_text("mine")
    with pytest.raises(SystemExit, match="is no cache of features"):
        pictures_of(labels, shards, "train-0000.tar", network, cache=cache)
    assert cache.read_text() == "mine"


def test_a_list_of_another_set_is_refused(shards):
    labels = benchmark("emoji_labels")
    part = pictures_of(labels, shards, "train-0000.tar")
    assert labels.true_picture(labels.Line("", "Red THING, round"), part) == 1
    with pytest.raises(SystemExit, match="no picture of 'red apple, flat' in the data"):
        labels.true_picture(labels.Line("", "red apple, flat"), part)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", ranked=True)


@pytest.fixture(scope="module")
def found_labels(bundle: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The JSON and the page of a whole run on a bundle of random weights."""
    labels, folder = benchmark("emoji_labels"), tmp_path_factory.mktemp("labels")
    (folder / "list.txt").write_text("# plain\nred thing, flat\nblue thing, round\n")
    flags = ["--list", folder / "list.txt", "--candidates", 3, "--json", folder / "labels.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "HELDOUT", HELD)
        patch.setattr(labels, "EfficientNetLite0", Colours)
        argv = ["", bundle, "--data", shards, *flags, "--sheet", folder / "sheet.png"]
        patch.setattr("sys.argv", list(map(str, argv)))
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        labels.main()
    return folder, out.getvalue()


def test_labels_of_a_bundle_are_measured_and_shown(found_labels, bundle):
    folder, out = found_labels
    found = json.loads((folder / "labels.json").read_text())
    assert found["command"] == "python benchmarks/emoji_labels.py tiny --list list.txt --candidates 3"
    assert found["bundle"]["fingerprint"] == read_bundle(bundle).fingerprint
    assert [row["prompt"] for row in found["prompts"]] == [
        "red thing, flat",
        "blue thing, round",
        "white thing, flat",
        "yellow thing, round",
    ]
    drawing = load_artist(bundle, "cpu").draw("blue thing, round", candidates=3, seed=1)
    assert found["prompts"][1]["candidate"] == drawing.candidates[0]
    assert out.count("best of 3") == 4 and "held-out pairs, level P, 1 prompts" in out
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 4 * 2 * SIDE


def test_what_tells_a_right_candidate_from_a_wrong_one_is_found():
    choice, g = benchmark("emoji_choice"), np.random.default_rng(0)
    right = g.random((300, 8)) < 0.2
    signals = g.normal(size=(300, 8, len(choice.SIGNALS)))
    signals[..., 0] += 5 * right  # knows
    signals[..., 1] += g.normal(size=(300, 1)) * 50  # another level for each prompt says nothing
    found = choice.told(signals, right)
    best, blind = found["any candidate"]["share"], found["mean candidate"]["share"]
    assert best == right.any(1).mean() and blind == pytest.approx(0.2, abs=0.03)
    assert found["cosine"]["share"] > best - 0.02 and found["cosine"]["correlation"] > 0.8
    for name in choice.SIGNALS[1:]:
        assert abs(found[name]["correlation"]) < 0.08 and abs(found[name]["share"] - blind) < 0.1


def test_candidates_of_captions_outside_the_list_are_measured(bundle, shards, tmp_path, monkeypatch, capsys):
    choice = benchmark("emoji_choice")
    (tmp_path / "list.txt").write_text("# plain\nred thing, flat\n")
    monkeypatch.setattr(choice, "PROMPTS", tmp_path / "list.txt")
    monkeypatch.setattr(choice, "EfficientNetLite0", Colours)
    flags = ["--prompts", 3, "--candidates", 4, "--data", shards, "--json", tmp_path / "choice.json"]
    monkeypatch.setattr("sys.argv", list(map(str, ["", bundle, *flags])))
    choice.main()
    found = json.loads((tmp_path / "choice.json").read_text())
    assert found["prompts"] == 3 and set(choice.SIGNALS) < set(found)
    assert found["any candidate"]["share"] >= found["mean candidate"]["share"] > 0
    assert "information" in capsys.readouterr().out
    icons = lists().read_icons(shards)
    chosen = [icon.label for icon in choice.choose(icons, {"red thing"}, 3)]
    assert len(set(chosen)) == 3 and "red thing" not in chosen
    toned = [choice.Icon(f"{i}: dark skin tone", "flat", "") for i in range(9)]
    assert sum("tone" in icon.label for icon in choice.choose([*icons, *toned], set(), 6)) <= 2


def test_a_sheet_of_a_list_shows_the_best_of_the_candidates(bundle, tmp_path, monkeypatch):
    sheet = benchmark("emoji_sheet")
    (tmp_path / "list.txt").write_text("# training\na red thing\n# held out, level L\na heart, flat\n")
    flags = ["--model", bundle, "--list", tmp_path / "list.txt", "--candidates", 3, "--columns", 2]
    monkeypatch.setattr("sys.argv", list(map(str, ["", tmp_path / "a.png", *flags])))
    sheet.main()
    best = load_artist(bundle, "cpu").draw("a red thing", candidates=3, keep=1, seed=0).images[0]
    with Image.open(tmp_path / "a.png") as drawn:
        assert np.array_equal(np.asarray(drawn)[8 : 8 + 128 : 8, 8 : 8 + 128 : 8], np.asarray(best))
    lines = benchmark("emoji_lists").read_list(tmp_path / "list.txt")
    assert sheet.captions(lines) == ["a red thing", "a heart, flat (held out, L)"]


# The card.


def test_measured_figures_get_into_the_card_and_weights_stay(bundle, shards, found_labels, tmp_path, monkeypatch):
    card, model, report = benchmark("emoji_card"), tmp_path / "tiny", tmp_path / "report"
    write_tiny_bundle(model, ranked=True)
    before = read_bundle(model)
    assert before.fingerprint == read_bundle(bundle).fingerprint  # what was measured above
    kept = {name: (model / name).read_bytes() for name in os.listdir(model) if name.endswith(".safetensors")}
    data = ["--data", str(shards / "heldout-0000.tar"), "--train", str(shards / "train-0000.tar")]
    options = ["--suite", "memorising", "--features", "ranker", "--memorising", "5", "--report", str(report)]
    assert main(["evaluate", str(model), *data, *options]) == 0

    def run(*flags: object) -> None:
        monkeypatch.setattr("sys.argv", ["", str(model), *map(str, flags)])
        card.main()

    run("--report", report)
    run("--labels", found_labels[0] / "labels.json")  # the fingerprint is another one by now
    after = read_bundle(model)
    assert {name: (model / name).read_bytes() for name in kept} == kept and after.fingerprint != before.fingerprint
    assert after.card == render_card(after.info)
    stage = after.info["metrics"]["near-copies by pixels"]
    made = "armchair evaluate tiny --data heldout-0000.tar --train train-0000.tar --suite memorising"
    drawn_with = f"--weights {default_weights()} --device cpu"
    assert stage["command"] == f"{made} --features ranker {drawn_with} --memorising 5 --report DIR"
    assert stage["measured"] == before.fingerprint[:16]
    rows = json.loads((report / "report.json").read_text())["sections"][0]["tables"][1]["rows"]
    share = {row[0]: row[2]["value"] for row in rows}["drawings of training captions"]
    assert f"| near-copies by pixels | drawings of training captions (5) | {share:.3f} [" in after.card
    assert "| right in label | held-out pairs, level L (1), best of 3 |" in after.card
    assert f"`{stage['command']}`" in after.card
    assert "python benchmarks/emoji_labels.py tiny" in after.card and str(tmp_path) not in after.card
    assert "| prior | loss | 3.0 |" in after.card and load_artist(model, "cpu").draw("a red thing", candidates=1).images


def test_figures_of_another_bundle_are_refused(bundle, found_labels, tmp_path, capsys, monkeypatch):
    card, model = benchmark("emoji_card"), tmp_path / "tiny"
    write_tiny_bundle(model, seed=1, ranked=True)
    before = {name: (model / name).read_bytes() for name in os.listdir(model)}
    monkeypatch.setattr("sys.argv", ["", str(model), "--labels", str(found_labels[0] / "labels.json")])
    with pytest.raises(SystemExit):
        card.main()
    assert "measured on a bundle" in capsys.readouterr().err
    assert {name: (model / name).read_bytes() for name in os.listdir(model)} == before
    with pytest.raises(RequestError, match="nothing on memorising"):
        card.of_memorising({"sections": [{"key": "memorising", "skipped": "no --train"}], "about": {}})
