import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

import tiny
from armchair import cli
from armchair.cli import COMMANDS, main
from armchair.config import to_dict
from armchair.sample.engine import default_weights
from armchair.sample.png import read_record
from armchair.train.report import Report
from conftest import tiny_recipe_dict

PROMPT = "a red circle"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: Any) -> Result:
        capfd.readouterr()
        code = main(list(map(str, argv)))
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def draw(run: Run, tiny_bundle: Path) -> Run:
    return lambda *argv: run("draw", "--model", tiny_bundle, "--device", "cpu", *argv)


@pytest.fixture
def recipe(tmp_path: Path, pictures: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    data = {**tiny_recipe_dict()["data"], "train": [str(pictures)]}
    path.write_text(yaml.safe_dump({**tiny_recipe_dict(), "data": data}))
    return path


def assert_refused(result: Result, *words: str, code: int = 2) -> None:
    """One line on stderr, nothing on stdout."""
    assert result.code == code and result.out == ""
    assert result.err.startswith("armchair: error: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err


def test_overview_and_help(run: Run) -> None:
    overview = run("--help")
    assert overview.code == 0 and overview.err == ""
    for name in COMMANDS:
        assert name in overview.out
        one = run(*name.split(), "--help")
        assert one.code == 0 and f"usage: armchair {name}" in one.out and f"  armchair {name} " in one.out
    assert "data inspect" in run("data", "--help").out
    assert run("--version").out.startswith("armchair 0.")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no command", "draw, complete"]),
        (["drw"], ["'drw'", "'draw'"]),
        (["--sead"], ["'--sead'"]),
        (["data"], ["no command", "data build", "data inspect"]),
        (["data", "inspct"], ["'data inspect'"]),
        (["data", "build", "shapse", "--out", "x"], ["'shapes'"]),
        (["data", "build", "shapes"], ["--out"]),
        (["data", "build", "shapes", "--out", "x", "--split", "vall"], ["'val'"]),
        (["data", "inspect", "nowhere"], ["nowhere", "no such file or folder"]),
        (["draw"], ["PROMPT"]),
        (["draw", "x", "--sead", "1"], ["'--sead'", "'--seed'"]),
        (["draw", "x", "--candidate=3"], ["'--candidates'"]),
        (["draw", "x", "-n", "0"], ["--candidates", "from 1 to 4096", "'0'"]),
        (["draw", "x", "-n", "4097"], ["--candidates"]),
        (["draw", "x", "--seed", "-1"], ["--seed"]),
        (["draw", "x", "--seed", "seven"], ["--seed"]),
        (["draw", "x", "--top-p", "most"], ["--top-p", "a number"]),
        (["draw", ""], ["empty"]),
        (["draw", "good", " "], ["empty"]),
        (["draw", "x" * 10_001], ["10000 characters", "10001"]),
        (["draw", "x", "--model", "nowhere"], ["'nowhere'"]),
        (["draw", "x", "--out", "x.jpg"], ["x.png"]),
        (["draw", "a", "b", "--out", "x.png"], ["a folder"]),
        (["draw", "a", "A!"], ["two pictures"]),
        (["complete", "nowhere.png", "x"], ["nowhere.png", "unreadable"]),
        (["complete", "x.png", "x", "--redraw", "1"], ["X,Y"]),
        (["complete", "x.png", "x", "--redraw", "1,2", "--keep-top", "0.5"], ["not allowed with"]),
        (["complete", "x.png"], ["PROMPT"]),
        (["redraw", "nowhere.png"], ["nowhere.png"]),
        (["redraw", "a.png", "b.png"], ["unexpected 'b.png'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train"], ["RECIPE"]),
        (["train", "x.yaml", "--stage", "rankr"], ["invalid choice"]),
        (["info", "nowhere"], ["'nowhere'"]),
        (["export", "nowhere", "--out", "x"], ["--format"]),
        (["export", "nowhere", "--format", "int8"], ["--out"]),
        (["export", "nowhere", "--format", "int4", "--out", "x"], ["format", "'int4'", "'int8'"]),
        (["export", "nowhere", "--format", "int8", "--out", "x"], ["'nowhere'"]),
    ],
)
def test_wrong_requests(run: Run, argv: list[str], words: list[str]) -> None:
    assert_refused(run(*argv), *words)


def test_draw(draw: Run, tmp_path: Path) -> None:
    result = draw(PROMPT, "--out", "pictures", "-n", 2, "--grid")
    assert result.code == 0 and result.out == "" and "2 pictures of 'a red circle' in" in result.err
    names = ["a-red-circle-01.png", "a-red-circle-02.png", "a-red-circle-grid.png"]
    assert sorted(os.listdir(tmp_path / "pictures")) == names
    assert read_record(tmp_path / "pictures" / names[1])["candidate"] == 1


def test_long_draws_say_how_far_they_are(draw: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "drawn" not in draw(PROMPT, "--out", "soon", "-n", 40).err
    monkeypatch.setattr(cli._DrawingProgress, "every", 0.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # with more, each draws a batch of its own
    lines = draw(PROMPT, "--out", "late", "-n", 40).err.splitlines()
    assert [line.rpartition(",")[0] for line in lines[:-1]] == [f"'a red circle': {n} of 40 drawn" for n in (13, 26)]
    assert lines[0].endswith(" left") and lines[-1].startswith("40 pictures")
    # Without a ranker only what is kept is drawn.
    assert "8 of 17 drawn" in draw(PROMPT, "--out", "kept", "-n", 20, "--keep", 17).err


def test_draw_json(draw: Run, tiny_bundle: Path) -> None:
    flags = ("-n", 3, "--keep", 2, "--seed", 5, "--temperature", 0.5, "--top-k", 9, "--json")
    one = json.loads(draw(PROMPT, *flags).out)
    assert set(one) == {"prompt", "bundle", "settings", "images"}
    assert one["bundle"]["name"] == "tiny" and len(one["bundle"]["fingerprint"]) == 64
    sampling = {"temperature": 0.5, "top_k": 9, "top_p": 0.95, "min_p": 0.0, "guidance": 1.5, "naturalness": 0.0}
    assert one["settings"] == {**sampling, "weights": default_weights()}
    assert [i["path"] for i in one["images"]] == ["a-red-circle-01.png", "a-red-circle-02.png"]
    assert all(i["seed"] == 5 and i["score"] is None and len(i["codes"]) == 4 for i in one["images"])
    several = json.loads(draw(PROMPT, "a \ud800 사과", *flags, "--out", "more").out)
    assert [d["prompt"] for d in several] == [PROMPT, "a \ud800 사과"]
    assert several[0]["images"][0]["codes"] == one["images"][0]["codes"]


def test_flags_between_prompts_and_prompts_that_look_like_flags(draw: Run) -> None:
    assert draw("red", "-n", 1, "blue").code == 0
    assert draw("-n", 1, "--", "--seed").code == 0
    assert {p.name for p in Path().iterdir()} == {"red.png", "blue.png", "seed.png"}


def test_never_overwrites(draw: Run, tmp_path: Path) -> None:
    (tmp_path / "x-03.png").write_text("mine")
    assert_refused(draw(PROMPT, "--out", "x.png"), "x-03.png", "--force")
    assert os.listdir(tmp_path) == ["x-03.png"]  # nothing was drawn before the refusal
    assert draw(PROMPT, "--out", "x.png", "--force").code == 0
    assert read_record(tmp_path / "x-03.png")["candidate"] == 2


def test_unwritable_output(draw: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(draw(PROMPT, "--out", "file/x.png"), "file", "not a folder")
    assert_refused(draw(PROMPT, "--out", "/proc/nowhere/x.png"), "cannot write")


def test_out_of_range_settings(draw: Run) -> None:
    for flag, value in (("--temperature", -1), ("--top-p", 0), ("--guidance", "nan"), ("--keep", 5)):
        assert_refused(draw(PROMPT, flag, value), flag.strip("-").replace("-", "_"))


def test_a_cut_prompt_is_told(draw: Run) -> None:
    result = draw("red circle " * 20, "--out", "x.png", "-n", 1, "--json")
    assert result.code == 0 and "cut to 8 tokens" in result.err
    json.loads(result.out)


def test_complete_and_redraw(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.effect_noise((30, 20), 90).save(tmp_path / "photo.jpg")
    result = run(
        "complete", "photo.jpg", PROMPT, "--model", tiny_bundle, "--redraw", "4,4,12,16", "-n", 1, "--json"
    )
    (image,) = json.loads(result.out)["images"]
    assert image["path"] == "a-red-circle.png"
    result = run("redraw", image["path"], "--json")
    (again,) = json.loads(result.out)["images"]
    assert again == {**image, "path": "a-red-circle-again.png"}
    assert Path(again["path"]).read_bytes() == Path(image["path"]).read_bytes()
    assert_refused(run("redraw", image["path"]), "a-red-circle-again.png", "--force")
    assert_refused(run("redraw", "photo.jpg"), "not a PNG")
    assert_refused(
        run("complete", "photo.jpg", PROMPT, "--model", tiny_bundle, "--redraw", "4,4,12,17", "--force")
    )
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8 nothing")
    assert_refused(run("complete", "photo.jpg", PROMPT), "photo.jpg", "not an image")


def test_damaged_bundle(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("prior.safetensors", "bundle.json", "card.md"):
        copy = shutil.copytree(tiny_bundle, tmp_path / "copy", dirs_exist_ok=True)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        assert_refused(run("draw", PROMPT, "--model", copy), name)
        assert_refused(run("info", copy), name)


def test_info(run: Run, tiny_bundle: Path) -> None:
    shown = run("info", tiny_bundle).out
    assert "M parameters" in shown and "Licence: none" in shown and "| prior | loss | 3.0 |" in shown
    data = json.loads(run("info", tiny_bundle, "--json").out)
    assert data["name"] == "tiny" and data["parameters"]["prior"] > 10_000
    assert {"fingerprint", "metrics", "data", "card", "recipe"} <= set(data)


def test_export(run: Run, recipe: Path, tiny_bundle: Path) -> None:
    for out in ("small", "small.zip"):
        export = ("export", tiny_bundle, "--format", "int8", "--out", out)
        result = run(*export)
        assert result.code == 0 and result.out == "" and f"-> {out}" in result.err
        assert_refused(run(*export), f"{out} is there already", "--force")
        assert run(*export, "--force").code == 0
    before, now = (json.loads(run("info", path, "--json").out) for path in (tiny_bundle, "small"))
    assert now["name"] == "tiny-int8" and now["exported"]["fingerprint"] == before["fingerprint"]
    # Steps are no parameters, and what computed the vectors of codes is folded in.
    assert now["parameters"]["prior"] < before["parameters"]["prior"]
    assert f"int8 from tiny {before['fingerprint']}\n" in run("info", "small").out

    drawn = []
    for model, out in ((tiny_bundle, "a"), ("small", "b"), ("small.zip", "c")):
        found = json.loads(run("draw", PROMPT, "--model", model, "-n", 2, "--json", "--out", out).out)
        drawn.append([image["codes"] for image in found["images"]])
    assert drawn[1] == drawn[2] and (drawn[0] == drawn[1] or default_weights() != "int8")
    assert run("redraw", "b/a-red-circle-01.png").code == 0
    assert_refused(run("export", "small", "--format", "int8", "--out", "x"), "exported already")
    assert_refused(run("train", recipe, "--init", "small"), "exported in int8", f"tiny ({before['fingerprint'][:12]})")
    assert not Path("runs").exists()


def test_garbage_is_looked_for_again_after_drawing(draw: Run) -> None:
    assert draw(PROMPT, "-n", 1).code == 0 and gc.isenabled()
    assert_refused(draw(" "), "empty")
    assert gc.isenabled()


def test_build(run: Run, tmp_path: Path) -> None:
    build = ("data", "build", "shapes", "--out", "new")
    result = run(*build, "--count", 5)
    assert result.code == 0 and result.out == "" and "5 captioned images -> new" in result.err
    assert sorted(os.listdir("new"))[:3] == ["000000.png", "000000.txt", "000001.png"]
    assert os.listdir(tmp_path) == ["new"]
    assert_refused(run(*build), "not empty", "--force")
    assert run(*build, "--count", 3, "--force").code == 0
    assert len(os.listdir("new")) == 6 and os.listdir(tmp_path) == ["new"]
    (tmp_path / "new" / "mine.txt").write_text("")
    assert_refused(run(*build, "--force"), "mine.txt", "lost")
    assert_refused(run(*build[:-1], "new/mine.txt"), "is a file")
    assert_refused(run(*build[:-1], "new/mine.txt/x"), "Not a directory")


def test_inspect(run: Run, pictures: Path) -> None:
    found = json.loads(run("data", "inspect", pictures, "--json", "--sheet", "sheet.png").out)
    assert found["images"] == 12 and found["sizes"] == {"64x64": 12} and Path("sheet.png").exists()
    assert_refused(run("data", "inspect", pictures, "--sheet", "sheet.png"), "sheet.png", "--force")
    shown = run("data", "inspect", pictures, "shapes:val,length=3").out
    assert "images           15" in shown and "duplicates       3" in shown


def test_inspect_damaged_data(run: Run, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(run("data", "inspect", "empty"), "no images")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    assert_refused(run("data", "inspect", "broken.tar"), "broken.tar")
    with tarfile.open("whole.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    whole = Path("whole.tar").read_bytes()
    Path("cut.tar").write_bytes(whole[: len(whole) // 3])
    found = json.loads(run("data", "inspect", "cut.tar", "--json").out)
    assert found["broken"] == {"cut tar": 1} and 0 < found["images"] < 12


def test_train(run: Run, recipe: Path, pictures: Path) -> None:
    assert run("train", recipe, "--stage", "text-tokenizer").code == 0
    assert Path("runs/tiny/text_tokenizer.json").exists()

    result = run("train", recipe, "--data", pictures, "--out", "run", "--set", "prior.n_layer=2")
    assert result.code == 0 and result.out == "" and "bundle written to run/bundle" in result.err
    assert run("draw", PROMPT, "--model", "run/bundle", "-n", 1).code == 0
    assert_refused(run("train", recipe, "--out", "run"), "--resume")
    assert_refused(run("train", recipe, "--out", "run", "--resume"), "another recipe")

    flags = ("--init", "run/bundle", "--out", "tuned", "--stage", "image-tokenizer")
    assert run("train", recipe, *flags).code == 0
    assert json.loads(Path("tuned/recipe.json").read_text())["prior"]["n_layer"] == 2


def test_train_offers_the_stages_that_a_run_has(run: Run, recipe: Path) -> None:
    from armchair.train.run import STAGES

    refused = run("train", recipe, "--stage", "sculpture")
    assert refused.code == 2 and ", ".join((*STAGES, "all")) in refused.err.replace("'", "")


def test_train_a_ranker_and_draw_with_it(run: Run, recipe: Path, pictures: Path) -> None:
    assert_refused(run("train", recipe, "--out", "run", "--stage", "ranker"), "recipe tiny has no ranker")
    fields = yaml.safe_load(recipe.read_text())
    fields |= {"ranker": to_dict(tiny.clip_config()), "ranker_training": {"steps": 2, "batch_size": 4, "lr": 1e-3}}
    without, recipe = recipe, recipe.with_name("ranked.yaml")
    recipe.write_text(yaml.safe_dump(fields))
    assert_refused(run("train", recipe, "--data", pictures, "--out", "ranked"), "two held-out pictures", "val_fraction")
    # A run that is finished takes a ranker afterwards, and keeps what it has.
    flags = ("--data", pictures, "--out", "ranked", "--set", "data.val_fraction=0.3")
    assert run("train", without, *flags).code == 0
    drawn = run("draw", PROMPT, "--model", "ranked/bundle", "-n", 1, "--out", "plain", "--json")
    assert json.loads(drawn.out)["images"][0]["score"] is None
    prior = Path("ranked/bundle/prior.safetensors").read_bytes()
    assert_refused(run("train", recipe, *flags, "--resume", "--set", "prior_training.steps=5"), "prior_training differ")
    result = run("train", recipe, *flags, "--resume", "--set", "drawing.temperature=0.5")
    assert result.code == 0 and "ranker: done" in result.err and "prior 1/" not in result.err
    assert Path("ranked/bundle/prior.safetensors").read_bytes() == prior
    assert_refused(run("train", without, *flags, "--resume"), "ranker, ranker_training differ")

    result = run("draw", PROMPT, "--model", "ranked/bundle", "-n", 5, "--keep", 3, "--json")
    images = json.loads(result.out)["images"]
    scores = [image["score"] for image in images]
    assert len(images) == 3 and scores == sorted(scores, reverse=True)
    assert f"scores {scores[0]:.3f} to {scores[-1]:.3f}" in result.err
    card = run("info", "ranked/bundle").out
    assert "| ranker | recall_1 |" in card

    # Tuning keeps the ranker's sizes, and starts from its weights.
    flags = ("--data", pictures, "--init", "ranked/bundle", "--out", "tuned", "--stage", "ranker")
    sets = ("--set", "ranker.embed_dim=7", "--set", "data.val_fraction=0.3")
    assert run("train", recipe, *flags, *sets).code == 0
    assert json.loads(Path("tuned/recipe.json").read_text())["ranker"]["embed_dim"] == 12


def test_train_stops_at_ctrl_c_and_resumes(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Report.step

    def interrupted(self: Report, done: int, metrics: Any) -> None:
        step(self, done, metrics)
        signal.raise_signal(signal.SIGINT)

    flags = ("train", recipe, "--out", "run", "--stage", "image-tokenizer")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as in a shell's background
    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", interrupted)
        result = run(*flags)
    assert result.code == 130 and "go on with --resume" in result.err and "after step 1" in result.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    result = run(*flags, "--resume")
    assert result.code == 0 and "going on from step 1" in result.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "prior.n_layers=2"], ["'prior.n_layers'", "'n_layer'"]),
        (["--set", "prior.n_layer"], ["NAME=VALUE"]),
        (["--set", "prior.n_layer=["], ["not a YAML value"]),
        (["--set", "prior.n_layer=four"], ["prior.n_layer", "expected int"]),
        (["--data", "nowhere"], ["nowhere", "no such file or folder"]),
        (["--set", "data.train=[]"], ["--data"]),
        (["--init", "nowhere"], ["'nowhere'"]),
        (["--device", "tpu"], ["'tpu'"]),
    ],
)
def test_wrong_training_requests(run: Run, recipe: Path, flags: list[str], words: list[str]) -> None:
    assert_refused(run("train", recipe, *flags), *words)
    assert not Path("runs").exists()


def test_recipes_that_are_wrong(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text("name: [")
    assert_refused(run("train", recipe), "not YAML")
    recipe.write_text(yaml.safe_dump({**tiny_recipe_dict(), "priors": {}}))
    assert_refused(run("train", recipe), "'priors'", "'prior'")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert_refused(run("train", recipe), "pip install 'armchair[train]'")


def test_unexpected_errors(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("armchair.bundle.find_bundle", fail)
    monkeypatch.delenv("ARMCHAIR_TRACEBACK", raising=False)
    error: BaseException = KeyError("two\nlines")
    assert_refused(run("info"), "unexpected KeyError", "--traceback", code=1)
    assert "Traceback" in run("info", "--traceback").err
    monkeypatch.setenv("ARMCHAIR_TRACEBACK", "1")
    assert "Traceback" in run("info").err
    monkeypatch.delenv("ARMCHAIR_TRACEBACK")
    error = OSError(28, "No space left on device", "x.png")
    assert_refused(run("info"), "No space left on device: x.png", code=1)
    error = KeyboardInterrupt()
    assert run("info").code == 130


def test_as_a_program(tiny_bundle: Path) -> None:
    """A closed pipe is no error, and an exit code reaches the shell."""
    code = "import sys; from armchair.cli import main; sys.exit(main(['info', sys.argv[1], '--json']))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code, tiny_bundle], stdout=closed, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run([sys.executable, "-m", "armchair", "drw"], capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
