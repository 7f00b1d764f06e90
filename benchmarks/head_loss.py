"""What the prior's heads and their loss take in training on a CPU: chunk by chunk from states, and with all logits.

    python benchmarks/head_loss.py
    python benchmarks/head_loss.py --rows 512 1024 2048 4096
    python benchmarks/head_loss.py --only logits        # and `--only chunks`: the peak of the process's memory

Forward and backward to the gradients of states, weights and biases; milliseconds, medians over rounds in which all take
their turn. Sizes are those of `armchair bench`, with 16 pictures. With several `--rows`, chunks of so many rows each.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from armchair.prior import sequence
from armchair.prior.sequence import Head, stream_loss, stream_loss_of_states


def systems(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Forward and backward each way, of the same numbers."""
    g, t = torch.Generator().manual_seed(0), args.text
    states = torch.randn(args.batch, t + args.grid**2, args.width, generator=g)
    text = torch.randint(args.vocab, (args.batch, t), generator=g)
    codes = torch.randint(args.codebook, (args.batch, args.grid**2), generator=g)
    sizes = (args.vocab + 1, args.codebook)
    weights = [torch.randn(k, args.width, generator=g) / args.width**0.5 for k in sizes]
    leaves = [states, *(tensor for w in weights for tensor in (w, torch.zeros(len(w))))]
    leaves = [x.requires_grad_() for x in leaves]
    states, heads = leaves[0], (Head(*leaves[1:3]), Head(*leaves[3:]))

    def logits() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            both = F.linear(states[:, :t], *heads[0]), F.linear(states[:, t:], *heads[1])
            loss = stream_loss(*both, text, codes).loss
        torch.autograd.grad(loss, leaves)

    def chunks(rows: int) -> Callable[[], None]:
        def run() -> None:
            with mock.patch.dict(sequence.HEAD_ROWS, cpu=rows):
                with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
                    loss = stream_loss_of_states(states, heads, text, codes).loss
                torch.autograd.grad(loss, leaves)

        return run

    return {"logits": logits, **{f"chunks of {rows}": chunks(rows) for rows in args.rows}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--codebook", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[sequence.HEAD_ROWS["cpu"]])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("logits", "chunks"), help="and tell the peak of memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = {name: run for name, run in systems(args).items() if name.startswith(args.only or "")}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(1 + args.rounds):  # the first does not count
        for name, run in wanted.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    found = {name: 1000 * statistics.median(each[1:]) for name, each in seconds.items()}
    for name, milliseconds in found.items():
        ratio = f"  {found['logits'] / milliseconds:.2f} times as fast" if "logits" in found else ""
        print(f"{name:16}{milliseconds:9.1f} ms{ratio}", flush=True)
    if args.only:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak of memory {peak / 1024:.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
