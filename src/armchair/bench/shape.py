"""What is timed: a model of given sizes with random weights. Imports nothing, so that peers' environments can."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement. The defaults are those of the figures in the README."""

    system: str  # a name of SYSTEMS or PEERS
    what: str = "sampling"  # or "training"
    text: int = 64  # tokens
    grid: int = 16  # its square are the image tokens
    text_vocab: int = 16384
    codebook: int = 8192
    width: int = 512
    depth: int = 12
    heads: int = 8
    pattern: str = "full"  # attention pattern of every layer; peers know only full
    batch: int = 1  # pictures drawn together, or in an update
    threads: int = 1
    precision: str = "bf16"  # of training: bf16 (autocast) or fp32
    steps: int = 4  # updates timed in training, after one that is not

    @property
    def image(self) -> int:
        return self.grid**2


# `plain` is `Prior.decode_step`, the literal one; `armchair` trains.
SYSTEMS = ("armchair-int8", "armchair-bf16", "armchair-fp32", "plain", "armchair")
PEERS = ("dalle-pytorch", "dalle-pytorch-cached", "gpt2", "min-dalle")
