"""What commands set for the libraries below PyTorch, and whom it must not touch."""

import os
import platform
import subprocess
import sys

import pytest

from armchair import environment
from armchair.cli import main
from armchair.sample.engine import WEIGHTS, exact_products
from armchair.sample.png import read_record

ISA = "ONEDNN_MAX_CPU_ISA"


@pytest.mark.parametrize(
    "rows, weights, said",
    [(1, None, "AVX512_CORE_BF16"), (8, "int8", "AVX512_CORE_BF16"), (9, None, None), (1, "bf16", None)],
)
def test_few_rows_are_drawn_without_tiles(rows, weights, said):
    found = {}
    environment.for_drawing(rows, weights, found)
    assert found.get(ISA) == said


def test_what_the_user_has_set_stays():
    found = {ISA: "ALL", "OMP_WAIT_POLICY": "active"}
    environment.for_drawing(1, None, found)
    environment.for_serving(found)
    assert found == {ISA: "ALL", "OMP_WAIT_POLICY": "active"}


def test_nothing_is_set_by_importing():
    """Not even of PyTorch: what the module sets has to come before that is used."""
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "import armchair.environment\n"
        "assert 'torch' not in sys.modules and dict(os.environ) == before\n"
        "import armchair.sample.pipeline, armchair.cli\n"
        f"assert {ISA!r} not in os.environ and 'OMP_WAIT_POLICY' not in os.environ"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": ""})


def test_drawing_sets_it_for_its_process(monkeypatch, tmp_path):
    monkeypatch.delenv(ISA, raising=False)
    assert main(["draw", "a red apple", "-n", "8", "--out", str(tmp_path), "--model", "no-such-model"]) == 2
    assert ISA not in os.environ
    assert main(["draw", "a red apple", "-n", "4", "--out", str(tmp_path), "--model", "no-such-model"]) == 2
    assert os.environ[ISA] == "AVX512_CORE_BF16"


@pytest.mark.parametrize("weights", [w for w in WEIGHTS if w != "int8" or exact_products()])
def test_the_first_candidates_are_the_same_among_few_and_many(weights, tmp_path):
    """Few are drawn in another environment than many, which holds for a whole process: so in one process each."""

    def run(*arguments):
        subprocess.run([sys.executable, "-m", "armchair", *map(str, arguments)], check=True, capture_output=True)

    drawn = {}
    for count in (2, 9):
        out = tmp_path / str(count)
        run("draw", "a red apple", "--seed", 3, "-n", count, "--weights", weights, "--out", out)
        records = map(read_record, out.glob("*.png"))
        drawn[count] = {record["candidate"]: record["codes"] for record in records if record["candidate"] < 2}
    assert len(drawn[2]) == 2 and drawn[2] == drawn[9]
    run("redraw", next((tmp_path / "9").glob("*.png")), "--out", tmp_path / "again.png")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_training_keeps_memory_that_is_freed():
    code = (
        "import resource, sys, torch\n"
        "from armchair import environment\n"
        "if sys.argv[1:]: environment.for_training()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def updates(count):\n"
        "    for _ in range(count): blocks = [torch.ones(n << 20) for n in (20, 12, 16, 12)]; del blocks\n"  # 240 MB
        "updates(16); before = faults()\n"
        "updates(4)\n"
        "print(faults() - before)"
    )

    def faults(*flags: str, **more: str) -> int:
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | more
        done = subprocess.run([sys.executable, "-c", code, *flags], env=surroundings, check=True, capture_output=True)
        return int(done.stdout)

    assert faults() > 200_000 and faults("x") < 20_000
    assert faults("x", MALLOC_ARENA_MAX="4") > 200_000  # what the user has set stays
