"""Checkpoints of a stage in training: safetensors and JSON only, written beside their place and renamed into it.

    FOLDER/step_00000200/weights.safetensors    the weights
                         average.safetensors    their moving average
                         optimizer.safetensors  the optimiser's moments, by parameter name
                         state.json             step, schedule, digests of the files above
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armchair.errors import WorkError
from armchair.train.optim import Plateau

KEEP = 2  # newest checkpoints that stay


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, plateau: Plateau
) -> None:
    """Write FOLDER/step_N whole or not at all, then drop all but the newest two."""
    place = folder / f"step_{step:08d}"
    partial = folder / f".step_{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {
        "weights.safetensors": _tensors(model),
        "average.safetensors": _tensors(average),
        "optimizer.safetensors": _moments(model, optimizer),
    }
    digests = {}
    for name, tensors in files.items():
        save_file(tensors, partial / name)
        digests[name] = _sync_and_digest(partial / name)
    state = {"step": step, "plateau": plateau.state(), "files": digests}
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    _sync_and_digest(partial / "state.json")
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(p.parent for p in folder.glob("step_*/state.json"))


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    return max((int(place.name.removeprefix("step_")) for place in checkpoints(folder)), default=0)


def load_checkpoint(
    folder: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, plateau: Plateau
) -> int:
    """Load the newest checkpoint in place; the step it was made at, 0 where there is none.

    Raises WorkError when it was altered or fits another model.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    place = found[-1]
    try:
        state = json.loads((place / "state.json").read_text())
        for name, digest in state["files"].items():
            if _digest(place / name) != digest:
                raise WorkError(f"{place / name} was altered or cut short; delete {place} to go on from the one before")
        device = next(model.parameters()).device
        model.load_state_dict(load_file(place / "weights.safetensors", device=str(device)))
        average.load_state_dict(load_file(place / "average.safetensors", device=str(device)))
        _load_moments(model, optimizer, load_file(place / "optimizer.safetensors", device=str(device)))
        plateau.load(state["plateau"])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, WorkError):
            raise
        first = str(error).strip().splitlines()[0]
        raise WorkError(f"cannot go on from {place}: {first}; was the recipe changed since?") from None
    return int(state["step"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().contiguous() for k, v in model.state_dict().items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    by_name = dict(model.named_parameters())
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        p: Any = by_name[name]
        # The moments of a weight lie in memory as it does: the optimiser walks over them together.
        optimizer.state[p][key] = torch.empty_like(p).copy_(value) if value.shape == p.shape else value


def _sync_and_digest(path: Path) -> str:
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
