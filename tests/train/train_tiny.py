"""Train a tiny recipe on drawn shapes, in a process of its own. A run that was begun goes on."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from armchair.config import from_dict
from armchair.train.recipe import Recipe
from armchair.train.run import Run, start_run

STEPS = 150
FIT = {
    "steps": STEPS, "batch_size": 4, "accumulate": 2, "lr": 2e-3, "warmup": 5,
    "log_every": 1, "validate_every": 20, "sheet_every": 50, "save_every": 3,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": ["shapes:train,length=40"], "val": ["shapes:val,length=8"], "weights": {"red": 2.0}},
    "text_tokenizer": {"vocab_size": 300, "length": 12},
    "image_tokenizer": {
        "resolution": 64, "patch": 8, "n_groups": 2, "n_blocks": 1,
        "n_hid": 8, "n_init": 8, "codebook_size": 32,
    },
    "prior": {"d_model": 16, "n_layer": 2, "n_head": 2, "attention": ["row", "column"], "code_features": 8,
              "rotary": True, "norm": "rms", "mlp": "swiglu", "qk_norm": True},
    "autoencoder_training": {**FIT, "images": 40, "matrix_lr": 0.01, "at_once": 2},
    "image_tokenizer_training": {
        **FIT, "lr": 2e-6, "tau_steps": 100, "kl_weight": 0.1, "kl_steps": 50,
        "min_psnr": -99.0, "min_usage": 0.0,
    },
    "prior_training": {
        **FIT, "views": 2, "accuracy_prompts": 2, "schedule": "plateau", "plateau_patience": 1, "matrix_lr": 0.01,
        "dropout": 0.1, "code_dropout": 0.1, "code_noise": 0.1, "label_smoothing": 0.1,
    },
    "ranker": {
        "embed_dim": 8,
        "image": {"resolution": 64, "patch": 16, "width": 16, "layers": [1], "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "captioner": {"layers": 1, "heads": 2},
    },
    "ranker_training": {
        **FIT, "accumulate": 1, "matrix_lr": 0.01, "near_misses": [["red", "blue"], ["circle", "square", "star"]],
    },
    "drawing": {"prompts": ["a red circle"]},
}  # fmt: skip


def open_run(folder: Path, data: dict[str, Any] = RECIPE) -> Run:
    return start_run(from_dict(Recipe, data), folder, resume=True, device=torch.device("cpu"))


def main(folder: Path) -> None:
    """All stages; what goes to stderr is added to FOLDER.err."""
    with folder.with_suffix(".err").open("a") as errors:
        os.dup2(errors.fileno(), 2)
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]  # as where it is not installed
    torch.set_num_threads(1)
    run = open_run(folder)
    run.stage("image-tokenizer")
    run.stage("prior")
    run.stage("ranker")
