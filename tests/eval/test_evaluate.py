"""`armchair evaluate` from end to end on a model of random weights."""

import argparse
import json
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from armchair.cli import COMMANDS, main
from armchair.eval.distribution import blurred
from armchair.eval.features import EfficientNetLite0, TorchScriptNetwork, resized
from armchair.eval.figures import Figure, bootstrap, mean_figure
from armchair.eval.reconstruction import code_figures
from armchair.eval.run import SUITES
from armchair.shapes.accuracy import wilson
from conftest import write_tiny_bundle

SMALL = {
    "pictures": 8,
    "train-pictures": 6,
    "prompts": 2,
    "best-of-prompts": 2,
    "most": 4,
    "diversity-prompts": 2,
    "blur": 4,
    "memorising": 4,
    "probe": 3,
}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, (2, 2))
        return y.flatten(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "pool.pt"
    torch.jit.save(torch.jit.script(Pool()), str(path))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Path:
    """A whole report."""
    folder = tmp_path_factory.mktemp("evaluate")
    bundle = write_tiny_bundle(folder / "tiny", ranked=True, resolution=64)
    data = ["--data", "shapes:val,length=9", "--train", "shapes:train,length=7"]
    out = folder / "report"
    networks = ["--features", str(network), "ranker"]
    assert main(["evaluate", str(bundle), *data, "--report", str(out), *networks, *FLAGS]) == 0
    return out


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
            assert values["alt"]
        if "id" in values:
            self.ids.append(values["id"] or "")
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and ("//" in v)]
        assert tag not in ("script", "link")


def test_a_report_is_a_page_with_its_pictures_and_the_same_figures_as_json(report: Path) -> None:
    page = Page()
    page.feed((report / "index.html").read_text())
    assert page.ids == list(SUITES) and page.outside == []
    for name in page.images:
        with Image.open(report / name) as picture:
            picture.load()
    data = json.loads((report / "report.json").read_text())
    assert [s["key"] for s in data["sections"]] == list(SUITES)
    assert not any(s["skipped"] for s in data["sections"]), [s["skipped"] for s in data["sections"]]
    for section in data["sections"]:
        assert section["protocol"] and section["tables"]
        for table in section["tables"]:
            assert all(len(row) == len(table["columns"]) for row in table["rows"])


def table(report: Path, section: str, title: str) -> dict:
    data = json.loads((report / "report.json").read_text())
    (found,) = [t for s in data["sections"] if s["key"] == section for t in s["tables"] if t["title"].startswith(title)]
    return found


def test_numbers_over_different_networks_are_in_tables_of_their_own_with_their_names(report: Path) -> None:
    data = json.loads((report / "report.json").read_text())
    tables = [t for s in data["sections"] if s["key"] == "distribution" for t in s["tables"]]
    assert [t["features"].split(" (")[0] for t in tables] == ["pool", "ranker of tiny", "pool"]  # the last under blur
    assert len({t["features"] for t in tables}) == 2


class Classes(nn.Module):
    """Features and classes, as the Inception network of published figures has them."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        y = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, (2, 2)).flatten(1)
        return y if return_features else (8 * y).softmax(1)


def test_figures_that_are_compared_have_intervals_around_them(report: Path, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Classes()), str(tmp_path / "classes.pt"))
    out = tmp_path / "r"
    argv = ["evaluate", str(report.parent / "tiny"), "--data", "shapes:val,length=9", "--report", str(out), *FLAGS]
    argv += ["--suite", "reconstruction", "distribution", "best-of", "--features", str(tmp_path / "classes.pt")]
    assert main(argv) == 0
    blur, best = table(out, "distribution", "Both sides blurred"), table(out, "best-of", "Best of N")
    assert blur["columns"][1:] == ["FID", "IS", "IS of pictures"] and len(blur["rows"]) == 9
    assert best["columns"] == ["N", "score", "FID", "IS", "right as a whole", "any of the N"]
    trips = [row for row in table(out, "reconstruction", "Round trips")["rows"] if "code" in row[0]]
    assert len(trips) == 3
    for row in (*blur["rows"], *best["rows"], *trips):
        for cell in row[1:]:
            low, high = cell["interval"]
            assert low <= cell["value"] <= high and cell["count"], row
    assert any(cell["interval"][0] < cell["value"] for row in blur["rows"] for cell in row[1:])
    protocols = [s["protocol"] for s in json.loads((out / "report.json").read_text())["sections"]]
    told = ("200 for codes, 30 for rFID", "30 for FID, 200 for KID, 200 for IS", "30 for FID, 200 for IS")
    assert all(said in protocol for said, protocol in zip(told, protocols, strict=True))


def test_accuracies_by_attribute_have_wilsons_intervals(report: Path) -> None:
    found = table(report, "fidelity", "Exact accuracy")
    cells = [cell for row in found["rows"] for cell in row[3:] if cell != "-"]
    assert len(cells) > 2 * len(found["rows"])
    for cell in cells:
        assert 1 <= cell["count"] <= 2  # of two prompts, those that speak of it
        assert cell["interval"] == pytest.approx(wilson(round(cell["value"] * cell["count"]), cell["count"]))


def test_the_interval_of_codes_in_use_is_about_pictures() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 50, (1, 4, 4))
    for _, figure in code_figures(np.repeat(picture, 20, 0), 100):
        # Of the same pictures any sample has the same.
        assert figure.interval == pytest.approx((figure.value, figure.value))
    widths = []
    for count in (20, 320):
        used, perplexity, distinct = (figure for _, figure in code_figures(rng.integers(0, 100, (count, 4, 4)), 1000))
        assert used.value <= 0.1 and used.interval[0] <= used.value <= used.interval[1]
        assert distinct.interval[0] <= distinct.value <= distinct.interval[1]
        widths.append(perplexity.interval[1] - perplexity.interval[0])
    assert widths[1] < widths[0] / 2
    (_, used), *_ = code_figures(np.arange(32).reshape(2, 4, 4), 32)
    assert used.value == 1 and used.interval[1] == 1  # no more than all


def test_best_of_n_never_scores_less_with_more_candidates(report: Path) -> None:
    rows = table(report, "best-of", "Best of N")["rows"]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    scores = [row[1]["value"] for row in rows]
    assert scores == sorted(scores)


def test_the_second_time_the_figures_are_the_same(report: Path, network: Path, tmp_path: Path) -> None:
    bundle, out = report.parent / "tiny", tmp_path / "again"
    data = ["--data", "shapes:val,length=9", "--suite", "reconstruction", "diversity"]
    assert main(["evaluate", str(bundle), *data, "--report", str(out), "--features", str(network), *FLAGS]) == 0
    for section, title in (("reconstruction", "Round trips"), ("diversity", "Distances")):
        assert table(out, section, title)["rows"] == table(report, section, title)["rows"]
    assert [s["key"] for s in json.loads((out / "report.json").read_text())["sections"]] == [
        "reconstruction",
        "diversity",
    ]


def test_without_a_ranker_or_training_pictures_the_report_says_what_is_missing(
    tiny_bundle: Path, network: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "evaluate",
        str(tiny_bundle),
        "--data",
        str(pictures),
        "--report",
        str(tmp_path / "r"),
        "--features",
        str(network),
    ]
    assert main([*argv, "--suite", "fidelity", "best-of", "memorising", *FLAGS]) == 0
    err = capsys.readouterr().err
    assert "fidelity: not measured. The bundle has no ranker" in err and "memorising: not measured" in err
    assert (tmp_path / "r/index.html").read_text().count("Not measured") == 3


def test_captions_that_are_cut_are_told_once_a_test(
    tiny_bundle: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(tiny_bundle), "--data", "shapes:val,length=40", "--features", str(network), *FLAGS]
    assert main([*argv, "--suite", "likelihood", "diversity", "--report", str(tmp_path / "r")]) == 0
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "captions were cut to 8 tokens" in line]
    assert 1 <= len(lines) <= 2 and "of 1 captions cut" not in err, err


def test_a_folder_whose_name_begins_like_the_shapes_world_is_a_folder(
    network: Path, report: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its captions are its own: nobody asked for prompts of the shapes world."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "shapes-photos")
    argv = ["evaluate", str(report.parent / "tiny"), "--data", "shapes-photos", "--features", str(network), *FLAGS]
    assert main([*argv, "--suite", "fidelity", "best-of", "--report", "r"]) == 0
    fidelity, best = json.loads(Path("r/report.json").read_text())["sections"]
    assert [t["title"].partition(" ")[0] for t in fidelity["tables"]] == ["CLIP", "Caption"]
    assert best["tables"][0]["columns"] == ["N", "score", "FID", "IS"]
    exact = table(report, "fidelity", "Exact accuracy")  # which the world itself has, whatever follows its name
    assert exact["rows"]


def test_pictures_on_a_list_are_left_out(
    tiny_bundle: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_text("shapes:val,seed=0/0\nshapes:val,seed=0/3\n")
    argv = [
        "evaluate",
        str(tiny_bundle),
        "--data",
        "shapes:val,length=6",
        "--suite",
        "reconstruction",
        "--features",
        str(network),
    ]
    argv += ["--weights", "fp32", "--device", "cpu"]
    assert main([*argv, "--report", str(tmp_path / "r"), "--without-overlap", str(tmp_path / "list"), *FLAGS]) == 0
    about = json.loads((tmp_path / "r/report.json").read_text())["about"]
    assert about["held-out pictures"].startswith("4 of") and "2 keys left out" in about["held-out pictures"]
    made = about["made by"]  # and no folder of this machine
    assert made.startswith("armchair evaluate tiny --data shapes:val,length=6 --suite reconstruction")
    assert "--features pool.pt --weights fp32 --device cpu --without-overlap list" in made
    assert "--pictures 8" in made and made.endswith("--report DIR")


def test_everything_is_drawn_with_the_settings_that_were_asked_for(
    tiny_bundle: Path, network: Path, tmp_path: Path
) -> None:
    """A greedy model draws one picture a prompt, however often."""
    data = ["--data", "shapes:val,length=9", "--suite", "reconstruction", "diversity", "probe"]
    reports = {}
    for name, flags in (("own", []), ("greedy", ["--temperature", "0", "--top-k", "5", "--guidance", "2"])):
        out = ["--report", str(tmp_path / name), "--features", str(network)]
        assert main(["evaluate", str(tiny_bundle), *data, *out, *FLAGS, *flags]) == 0
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())

    def same(name: str) -> float:
        rows = table(tmp_path / name, "diversity", "Distances")["rows"]
        (row,) = [row for row in rows if row[0].startswith("drawings of one prompt that are the same")]
        return row[1]["value"]

    assert same("own") < 0.5 and same("greedy") == 1
    about = reports["greedy"]["about"]
    assert "--temperature 0.0 --top-k 5 --guidance 2.0" in about["made by"]
    assert "--temperature" not in reports["own"]["about"]["made by"]
    drawn_with = "temperature 0.0, top_k 5, top_p 0.95, min_p 0.0, guidance 2.0"
    assert about["drawn with"].startswith(drawn_with)
    _, *drawing = [section["protocol"] for section in reports["greedy"]["sections"]]
    assert all(f"Drawn with {drawn_with}" in protocol for protocol in drawing)
    assert all("(the bundle's own: temperature 1.0, top_k 0, guidance 1.5)" in protocol for protocol in drawing)
    assert "Drawn with" not in reports["own"]["sections"][0]["protocol"]
    assert "the bundle's own:" not in reports["own"]["sections"][1]["protocol"]


def test_the_command_in_the_report_has_every_flag_that_a_figure_depends_on(
    tiny_bundle: Path, network: Path, pictures: Path, tmp_path: Path
) -> None:
    ranker, without = write_tiny_bundle(tmp_path / "tiny", seed=1, ranked=True), tmp_path / "overlap.txt"
    without.write_text("000001.png\n")
    argv = [str(tiny_bundle), "--data", str(pictures), "--train", str(pictures), "--suite", "reconstruction", "probe"]
    argv += ["--features", str(network), "--ranker", str(ranker), "--without-overlap", str(without), *FLAGS]
    argv += ["--seed", "7", "--weights", "fp32", "--device", "cpu", "--temperature", "0.5", "--top-k", "9"]
    argv += ["--top-p", "0.9", "--min-p", "0.01", "--guidance", "3", "--report", str(tmp_path / "r")]
    assert main(["evaluate", *argv]) == 0
    program, command, *made = shlex.split(json.loads((tmp_path / "r/report.json").read_text())["about"]["made by"])
    assert (program, command) == ("armchair", "evaluate")
    parser = argparse.ArgumentParser()
    COMMANDS["evaluate"].flags(parser)
    given, found = (vars(parser.parse_args(words)) for words in (argv, made))

    def travelled(value: object) -> object:
        return Path(value).name if isinstance(value, str) else value

    for flag in given.keys() - {"model", "report", "human", "host", "port", "json", "force"}:
        assert given[flag] != parser.get_default(flag), f"{flag} is not tried here"
        told = [travelled(v) for v in given[flag]] if isinstance(given[flag], list) else travelled(given[flag])
        assert found[flag] == told, flag


def test_wrong_requests(tiny_bundle: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        capsys.readouterr()
        assert main(["evaluate", str(tiny_bundle), *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    data = ["--data", "shapes:val,length=4", "--report", str(tmp_path / "r")]
    assert "did you mean 'diversity'" in refused(*data, "--suite", "diversty", "--features", str(network))
    assert "efficientnet-lite0" in refused(*data, "--features", "efficientnet")
    assert "has none" in refused(*data, "--features", "ranker")
    assert "no such file" in refused(*data, "--features", "none.pt")
    (tmp_path / "broken.pt").write_bytes(b"no network")
    assert "not a TorchScript network" in refused(*data, "--features", str(tmp_path / "broken.pt"))
    assert "--data" in refused("--report", "r")
    assert "top_p: expected more than 0" in refused(*data, "--top-p", "2")
    assert "--top-k: expected a whole number" in refused(*data, "--top-k", "-1")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/index.html").write_text("mine")
    assert "is there already" in refused(*data)
    assert (tmp_path / "r/index.html").read_text() == "mine"


def test_the_offline_network_tells_pictures_apart_and_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    network = EfficientNetLite0()
    grey, noise = np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = network.extract([grey, noise, grey])
    assert found.features.shape == (3, 1280) and found.logits is not None and found.logits.shape == (3, 1000)
    torch.testing.assert_close(found.features[0], found.features[2])
    assert not torch.allclose(found.features[0], found.features[1], atol=0.1)
    assert torch.equal(torch.random.get_rng_state(), state) and len(network.fingerprint) == 16


def test_features_are_those_of_all_pictures_at_once() -> None:
    """A few at a time, each few by a thread of its own."""
    network, rng = EfficientNetLite0(), np.random.default_rng(1)
    images = [rng.integers(0, 256, (72, 72, 3), np.uint8) for _ in range(11)]
    pixels = torch.from_numpy(np.stack([resized(image, 224) for image in images])).permute(0, 3, 1, 2)
    before, found = torch.get_num_threads(), []
    with torch.inference_mode():
        expected = network.network.extract_features((pixels - 127) / 128).mean((2, 3))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(network.extract(images).features)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[2])
    for features in found:
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_resizing_is_antialiased_and_in_floating_point() -> None:
    fine = np.zeros((256, 256, 3), np.uint8)
    fine[:, ::2] = 255  # lines of one pixel become grey, and not a pattern
    assert np.abs(resized(fine, 64)[8:-8, 8:-8] - 127.5).max() < 1
    ramp = np.repeat(np.linspace(0, 10, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    assert len(np.unique(resized(ramp, 32))) > 20  # not rounded to whole greys


def test_blur_takes_detail_away_and_keeps_the_mean() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    spreads = [blurred(noise, r).std() for r in (0, 1, 2, 4)]
    assert spreads == sorted(spreads, reverse=True) and (blurred(noise, 0) == noise).all()
    assert blurred(noise, 4).mean() == pytest.approx(noise.mean(), abs=2)


def test_a_torchscript_network_gets_whole_bytes(network: Path) -> None:
    white = TorchScriptNetwork(network).extract([np.full((20, 20, 3), 255, np.uint8)])
    assert white.logits is None and white.features.flatten().tolist() == pytest.approx([1.0] * 12)


def test_bootstrap_intervals_shrink_with_the_root_of_the_number() -> None:
    rng = np.random.default_rng(0)
    few, many = (mean_figure(rng.normal(size=n)) for n in (50, 5000))
    widths = [f.interval[1] - f.interval[0] for f in (few, many)]
    assert 5 < widths[0] / widths[1] < 20
    assert bootstrap(50, lambda i: float(i.mean())) == bootstrap(50, lambda i: float(i.mean()))
    assert Figure(value=1.0).to_json() == {"value": 1.0, "interval": None, "count": None}


def test_the_page_in_a_browser(report: Path, browser) -> None:
    """Everything is there without a network, and can be reached from the keyboard on a narrow screen too."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 420, "height": 700})
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    page.goto((report / "index.html").as_uri())
    images = page.locator("img")
    for i in range(images.count()):
        images.nth(i).scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0

    page.keyboard.press("Home")
    page.wait_for_function("() => scrollY === 0")  # a browser scrolls there bit by bit
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the fourth link of the contents
    page.wait_for_function("() => location.hash === '#fidelity'")
    page.wait_for_function(
        "() => { const top = document.querySelector('#fidelity').getBoundingClientRect().top;"
        " return -1 <= top && top < 350; }"
    )
    wide = page.get_by_role("region", name="Exact accuracy")
    for _ in range(60):
        page.keyboard.press("Tab")
        if wide.evaluate("table => table === document.activeElement"):
            break
    else:
        pytest.fail("no key leads to the table")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("table => table.scrollLeft > 0", arg=wide.element_handle())
    context.close()
    assert not wrong
