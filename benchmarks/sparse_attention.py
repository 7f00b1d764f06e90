"""What a layer's attention takes in training on a CPU, with its mask whole and by blocks, forward and backward.

    python benchmarks/sparse_attention.py
    python benchmarks/sparse_attention.py --queries 32 64 96 --patterns row column --grids 16 32

One table: a line for each grid and pattern, milliseconds (medians over rounds in which everything takes its turn), how
many times as long the mask takes as the blocks, how many of the scores they compute, and what the prior takes by
itself. Sizes are those of the training benchmark: width 512, 8 heads, text 64, 4 pictures, bf16.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from armchair.attention import SparseBlocks, attend, masked_scores
from armchair.prior.attention import PATTERNS, quicker_blocks, stream_blocks, stream_mask

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def step(args: argparse.Namespace, grid: int, pattern: str, sparse: SparseBlocks | None) -> Callable[[], None]:
    """Attention forward and backward, of queries, keys and values that lie as a layer gives them."""
    mask = stream_mask(pattern, args.text, grid)
    sizes = (args.batch, len(mask), 3, args.heads, args.width // args.heads)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(sizes, generator=g).to(DTYPES[args.dtype]).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weight = torch.randn(q.shape, generator=g).to(q.dtype)

    def run() -> None:
        torch.autograd.grad(attend(q, k, v, mask, sparse=sparse), (q, k, v), weight)

    return run


def medians(systems: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """Milliseconds of each, over rounds in which each has its turn; the first of them does not count."""
    seconds: dict[Any, list[float]] = {name: [] for name in systems}
    for _ in range(1 + rounds):
        for name, run in systems.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(each[1:]) for name, each in seconds.items()}


def measure(args: argparse.Namespace, grid: int) -> list[dict[str, Any]]:
    """The lines of one grid."""
    systems: dict[Any, Callable[[], None]] = {}
    for pattern in args.patterns:
        systems[pattern, "mask"] = step(args, grid, pattern, None)
        for queries in () if pattern == "full" else args.queries:
            systems[pattern, queries] = step(args, grid, pattern, stream_blocks(pattern, args.text, grid, queries))
    found, rows = medians(systems, args.rounds), []
    for pattern in args.patterns:
        whole = masked_scores(args.text + grid**2)
        row = {"grid": grid, "pattern": pattern, "mask_ms": found[pattern, "mask"], "blocks": []}
        row["takes"] = "mask" if quicker_blocks(pattern, args.text, grid) is None else "blocks"
        for queries in () if pattern == "full" else args.queries:
            scores = stream_blocks(pattern, args.text, grid, queries).scores
            blocks = {"queries": queries, "ms": found[pattern, queries], "scores": scores / whole}
            row["blocks"].append({**blocks, "ratio": row["mask_ms"] / blocks["ms"]})
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    said = f"{row['grid']:4} {row['pattern']:14}{row['mask_ms']:9.2f}  {row['takes']:6}"
    return said + "".join(
        f"  | {b['queries']:4} {b['ms']:9.2f} {b['ratio']:6.2f} {b['scores']:7.2f}" for b in row["blocks"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--queries", type=int, nargs="+", default=[64], help="of a block, about")
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="by default as many as PyTorch takes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    head = f"{'grid':4} {'pattern':14}{'mask ms':>9}  {'takes':6}"
    print(head + f"  | {'rows':>4} {'blocks ms':>9} {'ratio':>6} {'scores':>7}" * len(args.queries))
    rows = []
    for grid in args.grids:
        for row in measure(args, grid):
            print(line(row), flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
