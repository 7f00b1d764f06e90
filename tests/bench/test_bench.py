import json
import math
import sys

import pytest
import torch

from armchair import cli
from armchair.bench import run as bench_run
from armchair.bench.own import decoder, draw, parts, prior, weight_count
from armchair.bench.run import Measured, bench, report, run, share_of_bound, table
from armchair.bench.shape import Job
from armchair.errors import RequestError, WorkError
from armchair.sample.engine import exact_products

pytestmark = pytest.mark.skipif(not exact_products(), reason="eight-bit products are not exact on this processor")

SMALL = Job(system="armchair-int8", text=4, grid=3, text_vocab=20, codebook=30, width=16, depth=2, heads=2)
SIZES = {"text": 4, "grid": 3, "text-vocab": 20, "codebook": 30, "width": 16, "depth": 2, "heads": 2, "rounds": 1}
FLAGS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def test_drawing_is_timed_beside_the_literal_decoder(capsys, tmp_path):
    out = tmp_path / "speed.png"
    weights = ["--weights", "int8", "plain"]
    assert cli.main(["bench", "sampling", *FLAGS, "--batch", "2", *weights, "--plot", str(out)]) == 0
    said = capsys.readouterr().out
    assert "plain" in said and "products" in said and "GB/s" in said
    assert out.stat().st_size > 1000


def test_training_is_timed_and_told_as_json(capsys):
    assert cli.main(["bench", "training", *FLAGS, "--precision", "fp32", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["measured"]
    assert row["system"] == "armchair" and row["batch"] == 4 and row["median"] > 0 and row["armchair over it"] == 1


@pytest.mark.parametrize("has", [False, True])
def test_training_is_timed_in_bf16_where_the_processor_has_it(has, capsys, monkeypatch):
    monkeypatch.setattr("armchair.runtime.has_fast_bfloat16", lambda device: has)
    monkeypatch.setattr(bench_run, "run", lambda job, *_, **__: {"count": 1, "seconds": 1.0})  # not how fast
    assert cli.main(["bench", "training", *FLAGS, "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["precision"] for row in json.loads(out)["measured"]] == ["bf16", "fp32"][not has :]
    assert ("this processor has no bf16" in err) == (not has)


def test_parts_add_up_to_the_whole():
    with torch.inference_mode():
        engine = decoder(SMALL, prior(SMALL).eval())
        found = parts(SMALL, engine)
    whole = found.pop("all")
    assert {"products", "attention", "head", "sampling", "the rest"} <= set(found)
    assert math.isclose(sum(found.values()), whole, rel_tol=1e-6) and min(found.values()) > 0


def test_what_is_timed_is_the_whole_picture():
    with torch.inference_mode():
        seen = []
        engine = decoder(SMALL, prior(SMALL).eval())
        steps = engine.decode_steps
        engine.decode_steps = lambda tokens, j, cache: seen.append((*tokens.shape, j)) or steps(tokens, j, cache)
        assert draw(Job(**{**vars(SMALL), "batch": 3}), engine)() == 9
    assert seen == [(3, 1, j) for j in range(8)]


def test_the_bound_counts_the_weights_that_a_token_needs():
    model = prior(SMALL)
    assert weight_count(model) == 2 * 12 * 16**2 + 16 * 30
    measured = Measured(system="armchair-int8", batch=2, precision=None, rates=[200.0, 100.0, 400.0])
    assert share_of_bound(measured, {"read_bytes": 1e6, "weights": 1000}) == pytest.approx(0.1)
    assert share_of_bound(Measured(system="gpt2", batch=2, precision=None, rates=[1.0]), {"weights": 1}) is None


def test_ratios_are_those_of_the_rounds():
    ours = Measured(system="a", batch=1, precision=None, rates=[10.0, 30.0, 20.0])
    theirs = Measured(system="b", batch=1, precision=None, rates=[5.0, 10.0, 1.0])
    assert ours.over(theirs) == 3.0
    data = report(Job(system="a"), [ours, theirs], {}, {})
    assert [row["a over it"] for row in data["measured"]] == [1.0, 3.0]
    assert "3.00" in table(data)


def test_a_peer_that_is_not_installed_is_named(capsys):
    command = ["bench", "sampling", *FLAGS, "--weights", "int8", "--against", "gpt2"]
    if cli.main(command) == 0:
        pytest.skip("transformers is installed here")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "gpt2 needs 'transformers'" in line and "--peer-python" in line


def test_wrong_requests(capsys, tmp_path):
    for flags, said in (
        (["--against", "gtp2"], "gpt2"),
        (["--peer-python", str(tmp_path / "none"), "--against", "gpt2"], "cannot run"),
        (["--width", "30", "--heads", "4"], "multiple"),
        (["--plot", str(tmp_path)], "already"),
    ):
        assert cli.main(["bench", "sampling", *FLAGS, "--weights", "int8", *flags]) == 2
        assert said in capsys.readouterr().err


def test_a_measurement_that_fails_says_why(monkeypatch):
    with pytest.raises(WorkError, match="armchair-int8 failed: .*n_head"):
        run(Job(**{**vars(SMALL), "heads": 3}))
    monkeypatch.setattr(bench_run, "TIME_LIMIT", 0.01)
    with pytest.raises(WorkError, match="longer than"):
        bench(SMALL, ["armchair-int8"], [1], peer_python=sys.executable, rounds=1)


def test_unknown_systems_are_refused_before_anything_is_timed():
    with pytest.raises(RequestError, match="unknown 'gpt3'.*gpt2"):
        bench(SMALL, ["gpt3"], [1], peer_python=sys.executable, rounds=1)
