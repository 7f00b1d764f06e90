"""What commands set for the libraries below PyTorch, and whom it must not touch."""

import subprocess
import sys

import pytest

from armchair import environment
from armchair.cli import main

ISA = "ONEDNN_MAX_CPU_ISA"


@pytest.mark.parametrize("rows, said", [(1, "AVX512_CORE_BF16"), (8, "AVX512_CORE_BF16"), (9, None)])
def test_few_rows_are_drawn_without_tiles(rows, said):
    found = {}
    environment.for_drawing(rows, found)
    assert found.get(ISA) == said


def test_what_the_user_has_set_stays():
    found = {ISA: "ALL", "OMP_WAIT_POLICY": "active"}
    environment.for_drawing(1, found)
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
    import os

    monkeypatch.delenv(ISA, raising=False)
    assert main(["draw", "a red apple", "-n", "8", "--out", str(tmp_path), "--model", "no-such-model"]) == 2
    assert ISA not in os.environ
    assert main(["draw", "a red apple", "-n", "4", "--out", str(tmp_path), "--model", "no-such-model"]) == 2
    assert os.environ[ISA] == "AVX512_CORE_BF16"
