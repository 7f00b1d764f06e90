"""How many image tokens a second a CUDA GPU draws: token by token as `Prior.decode_step` has it, and by recorded steps.

    python benchmarks/gpu_drawing.py
    python benchmarks/gpu_drawing.py --batches 1 16 --pattern row --json gpu.json

Random weights in the sizes of `armchair bench`: text 64, a grid of 16, width 512, 12 layers, 8 heads. A table with a
line for each batch and system: tokens a second of the steps alone, with picking the codes too, and the bound: what
reading the weights once a step would allow at the rate that this GPU copies memory (bytes read and bytes written, both
counted). Keys and values are not in the bound, and at large batches are more to read than the weights. Medians over
rounds in which everything takes its turn; the first of them, in which graphs are recorded, does not count.

Needs a CUDA GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from armchair.bench.own import prior, weight_count
from armchair.bench.shape import Job
from armchair.prior.transformer import Prior
from armchair.runtime import has_fast_bfloat16
from armchair.sample.cuda_engine import CudaEngine
from armchair.sample.generate import FREE, Decoder, MicroBatch, candidate_uniforms, draw_micro_batch, read_prompts
from armchair.sample.next_token import Settings

BYTES = {"plain": 4, "engine fp32": 4, "engine bf16": 2}  # a weight


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """From an idle GPU to an idle GPU."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def copied_bytes(device: torch.device, megabytes: int) -> float:
    """Bytes read and written a second by a copy within the device's memory, the best of ten."""
    data = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(data)
    return 2 * data.nbytes / min(seconds(lambda: other.copy_(data), device) for _ in range(10))


def systems(model: Prior, device: torch.device) -> dict[str, Decoder]:
    made: dict[str, Decoder] = {"plain": model.folded(), "engine fp32": CudaEngine(model, "fp32")}
    if has_fast_bfloat16(device):
        made["engine bf16"] = CudaEngine(model, "bf16")
    return made


def steps(job: Job, draws: Decoder) -> Callable[[], None]:
    """All steps of a batch of pictures, whose codes are zeros."""
    rows = torch.zeros(job.batch, dtype=torch.int64, device=draws.device)
    text = torch.zeros(1, job.text, dtype=torch.int64, device=draws.device)
    prompts = read_prompts(draws, text).rows(rows)

    def run() -> None:
        cache = draws.start(prompts)
        for j in range(job.image - 1):
            draws.decode_step(rows, j, cache)

    return run


def drawing(job: Job, draws: Decoder) -> Callable[[], None]:
    """The same with codes picked from the whole distribution."""
    rows = torch.zeros(job.batch, dtype=torch.int64, device=draws.device)
    text = torch.zeros(1, job.text, dtype=torch.int64, device=draws.device)
    prompts = read_prompts(draws, text)
    uniforms = candidate_uniforms(0, range(job.batch), job.image).to(draws.device)
    forced = torch.full((job.batch, job.image), FREE, device=draws.device)

    def run() -> None:
        batch = MicroBatch(draws, prompts.rows(rows), prompts, uniforms, Settings(), forced)
        for _ in draw_micro_batch(draws, batch):
            pass

    return run


@torch.inference_mode()
def measure(job: Job, device: torch.device, batches: list[int], rounds: int, copied: float) -> list[dict[str, Any]]:
    """The lines of the table; `copied` is what the device copies, in bytes a second."""
    model = prior(job).eval().to(device)
    decoders, lines = systems(model, device), []
    for batch in batches:
        sized = Job(**{**vars(job), "batch": batch})
        works = {(s, w): w(sized, draws) for s, draws in decoders.items() for w in (steps, drawing)}
        taken: dict[Any, list[float]] = {which: [] for which in works}
        for _ in range(1 + rounds):
            for which, work in works.items():
                taken[which].append(seconds(work, device))
        for system in decoders:
            found, picked = (statistics.median(taken[system, w][1:]) for w in (steps, drawing))
            bound = batch * copied / (weight_count(model) * BYTES[system])
            lines.append(
                {
                    "batch": batch,
                    "system": system,
                    "steps_tokens_a_second": batch * (job.image - 1) / found,
                    "drawing_tokens_a_second": batch * job.image / picked,
                    "bound_tokens_a_second": bound,
                    "steps_share_of_bound": batch * (job.image - 1) / found / bound,
                }
            )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    said = [f"{'batch':>5}  {'system':12}{'steps tok/s':>13}{'drawing tok/s':>15}{'bound tok/s':>13}{'share':>8}"]
    for line in lines:
        rates = f"{line['steps_tokens_a_second']:13.0f}{line['drawing_tokens_a_second']:15.0f}"
        bound = f"{line['bound_tokens_a_second']:13.0f}{line['steps_share_of_bound']:8.3f}"
        said.append(f"{line['batch']:5}  {line['system']:12}{rates}{bound}")
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("text", "grid", "width", "depth", "heads", "codebook"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Job, name))
    parser.add_argument("--pattern", default=Job.pattern)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_drawing.py times a CUDA GPU, and this PyTorch finds none: run it where there is one")
    device = torch.device("cuda")
    names = ("text", "grid", "width", "depth", "heads", "codebook", "pattern")
    job = Job(system="gpu", **{name: getattr(args, name) for name in names})
    copied = copied_bytes(device, 1024)
    machine = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(f"{machine['gpu']}, PyTorch {machine['torch']}, copies {copied / 1e9:.0f} GB/s")
    lines = measure(job, device, args.batches, args.rounds, copied)
    print(table(lines))
    if args.json:
        found = {**machine, "copied_bytes_a_second": copied, "job": vars(job), "lines": lines}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
