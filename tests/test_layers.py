"""Which part of the package may import which, and that importing has no side effects."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import armchair

ROOT = Path(armchair.__file__).parent
MODULES = {
    ".".join(("armchair", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
BASE = {"errors", "config", "runtime", "attention"}
PIXELS = {"image.pixels", "image.sheet"}
MODELS = BASE | {"text", "image", "prior", "clip"}
DRAWING = MODELS | {"shapes", "bundle", "card", "sample"}
# What each part may import beside itself.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "runtime": {"errors"},
    "attention": set(),
    "environment": set(),
    "text": BASE,
    "image": BASE,
    "prior": BASE,
    "clip": BASE,
    "shapes": BASE,
    "data": BASE | PIXELS | {"shapes"},
    "bundle": BASE,
    "card": BASE,
    "sample": MODELS | {"bundle", "card"},
    "importing": MODELS | {"bundle", "card"},
    "eval": DRAWING | {"data"},
    "train": DRAWING | {"data", "eval"},
    "bench": MODELS | {"environment", "sample"},
    "serve": BASE | {"bundle", "image", "prior", "sample", "eval.ballot", "eval.ballot_page"},
}


def part_of(module: str) -> str | None:
    """`armchair.data.loader` -> `data`; None for the package itself and what stands above all parts."""
    name = module.removeprefix("armchair.").split(".")[0]
    return name if name in MAY_IMPORT else None


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name == "armchair" or name.startswith("armchair.")} - {"armchair"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_is_below_it(module):
    part = part_of(module)
    if part is None:
        return
    allowed = MAY_IMPORT[part] | {part}
    for target in imports(MODULES[module]):
        name = target.removeprefix("armchair.")
        assert name in allowed or name.split(".")[0] in allowed, f"{module} may not import {target}"


def test_the_parts_are_all_named():
    above = {"armchair", "cli", "__main__", "artist", "bundles"}
    found = {module.removeprefix("armchair.").split(".")[0] for module in MODULES}
    assert found - above <= set(MAY_IMPORT), "a new part needs its line in the table"


def fresh(code: str) -> dict:
    """What `code` prints as JSON, run in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return json.loads(done.stdout)


def test_importing_the_package_does_not_import_torch():
    heavy = ["torch", "numpy", "PIL"]
    assert (
        fresh(f"import sys, json, armchair; print(json.dumps([m for m in {heavy} if m in sys.modules]))")
        == []
    )


def test_importing_any_module_leaves_torch_alone():
    code = f"""
import importlib, json, random
import numpy, torch

def state():
    return [
        torch.random.get_rng_state().tolist(), str(numpy.random.get_state()), str(random.getstate()),
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), str(torch.get_default_dtype()), str(torch.get_default_device()),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    ]

before = state()
for name in {sorted(set(MODULES) - {"armchair.__main__"})}:
    importlib.import_module(name)
print(json.dumps([before == state(), len(before)]))
"""
    assert fresh(code) == [True, 11]
