"""A tiny stage of a prior, and a process that trains it together with another.

A module of its own, as a new process imports what it runs by name: pytest's names of test files mean nothing to it.
"""

from pathlib import Path

import numpy as np
import torch

import tiny
from armchair.data.sources import DataConfig
from armchair.image.dvae import DVAEConfig
from armchair.prior.transformer import PriorConfig
from armchair.text.bpe import TextTokenizer
from armchair.train.loop import fit
from armchair.train.prior import PriorStage
from armchair.train.recipe import DVAETraining, PriorTraining, Recipe, TextTokenizerConfig
from armchair.train.report import Report

EVERY = {"log_every": 1, "validate_every": 10, "sheet_every": 15, "save_every": 10}


class Codes:
    """A token cache in memory."""

    def __init__(self, count: int, stream, views: int = 2):
        self.values = torch.randint(
            stream.codebook_size, (count, views, stream.image_length), generator=tiny.seeded()
        )
        self.captions = [[[f"a picture of {i}", f"number {i}"]] for i in range(count)]
        self.weights, self.views = np.ones(count), views

    def __len__(self) -> int:
        return len(self.captions)

    def codes(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        return self.values[images, views]


def prior_stage(accumulate: int = 1, **fields) -> PriorStage:
    stream = tiny.shape(grid=4, text_length=6, vocab=300, codebook=32)
    training = {
        "steps": 6,
        "batch_size": 8,
        "lr": 2e-3,
        "warmup": 2,
        "precision": "fp32",
        "eps": 1e-4,
        **EVERY,
    }
    recipe = Recipe(
        name="tiny",
        data=DataConfig(resolution=16),
        text_tokenizer=TextTokenizerConfig(vocab_size=300, length=6),
        image_tokenizer=DVAEConfig(resolution=16, patch=2, n_groups=2, n_hid=8, codebook_size=32),
        prior=PriorConfig(d_model=16, n_layer=2, n_head=2, attention=("row",)),
        image_tokenizer_training=DVAETraining(steps=1, batch_size=1, lr=1e-3),
        prior_training=PriorTraining(**{**training, "accumulate": accumulate, **fields}),
    )
    codes = Codes(20, stream)
    tokenizer = TextTokenizer.train((c for image in codes.captions for texts in image for c in texts), 300)
    model = tiny.prior(tiny.shape(4, 6, tokenizer.vocab_size, 32), "row", "convolutional")
    return PriorStage(recipe, model, tokenizer, tiny.dvae(), codes, codes)


def one_of_two(rank: int, folder: Path) -> None:
    """A process that trains a prior together with another."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    stage = prior_stage(1, dropout=0.2)
    report = Report(folder / f"rank{rank}", None)
    average = fit(stage, stage.config, folder / "run", report, device=torch.device("cpu"), rank=rank, world=2)
    torch.save(average.state_dict(), folder / f"{rank}.pt")
    report.close()
    torch.distributed.destroy_process_group()
