"""Times armchair on a Job, in a process of its own: `python -m armchair.bench.own '{"system": "armchair-int8", …}'`."""

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from armchair import environment
from armchair.bench.peer import timed_drawing, timed_training
from armchair.bench.shape import Job
from armchair.prior.sequence import StreamShape, stream_loss_of_states
from armchair.prior.transformer import Prior, PriorConfig
from armchair.runtime import autocast
from armchair.sample.engine import Engine
from armchair.sample.generate import FREE, Decoder, MicroBatch, candidate_uniforms, draw_micro_batch, read_prompts
from armchair.sample.native import PARTS
from armchair.sample.next_token import Settings


def prior(job: Job) -> Prior:
    """A prior of the job's sizes; weights that start at zero are random too."""
    shape = StreamShape(
        text_vocab_size=job.text_vocab, text_length=job.text, codebook_size=job.codebook, grid=job.grid
    )
    config = PriorConfig(
        d_model=job.width, n_layer=job.depth, n_head=job.heads, attention=(job.pattern,), last_attention=None
    )
    torch.manual_seed(0)
    model = Prior(config, shape)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def decoder(job: Job, model: Prior) -> Decoder:
    return model if job.system == "plain" else Engine(model, job.system.removeprefix("armchair-"))


def draw(job: Job, draws: Decoder) -> Callable[[], int]:
    """The caption is read, and all codes of the batch's pictures are drawn from the whole distribution."""
    text = torch.randint(job.text_vocab, (1, job.text), generator=torch.Generator().manual_seed(1))
    uniforms = candidate_uniforms(0, range(job.batch), job.image)
    forced = torch.full((job.batch, job.image), FREE)
    rows = torch.zeros(job.batch, dtype=torch.int64)

    def run() -> int:
        prompts = read_prompts(draws, text)
        batch = MicroBatch(draws, prompts.rows(rows), prompts, uniforms, Settings(), forced)
        for _ in draw_micro_batch(draws, batch):
            pass
        return job.image

    return run


def steps(job: Job, draws: Decoder, first: int, count: int) -> Callable[[], float]:
    """Some tokens of the batch's pictures, without picking them: what these steps of the decoder take, in seconds.

    They are gone through once untimed, as weights are packed for the batch at hand when it first comes.
    """
    rows = torch.zeros(job.batch, dtype=torch.int64)
    cache = draws.start(read_prompts(draws, torch.zeros(1, job.text, dtype=torch.int64)).rows(rows))

    def run() -> float:
        began = time.perf_counter()
        for j in range(first, first + count):
            draws.decode_step(rows, j, cache)
        return time.perf_counter() - began

    run()
    return run


def training(job: Job) -> Callable[[], None]:
    model = prior(job).train()
    text = torch.randint(job.text_vocab, (job.batch, job.text))
    codes = torch.randint(job.codebook, (job.batch, job.image))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        with autocast(torch.device("cpu"), job.precision):
            loss = stream_loss_of_states(model.states(text, codes), model.heads(), text, codes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def parts(job: Job, draws: Engine) -> dict[str, float]:
    """Seconds a token by what they are spent on, and `all`; what no part has is norms, embeddings and Python."""
    import armchair.sample.generate as generate

    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    draws.layers = [
        layer._replace(
            qkv=timed("products", layer.qkv),
            out=timed("products", layer.out),
            mlp_in=timed("products", layer.mlp_in),
            mlp_out=timed("products", layer.mlp_out),
        )
        for layer in draws.layers
    ]
    draws.head = timed("head", draws.head)
    start = draws.start

    def watched(*args: Any) -> Any:
        cache = start(*args)
        cache.attend = timed("attention", cache.attend)  # type: ignore[method-assign]
        cache.put = timed("keeping keys", cache.put)  # type: ignore[method-assign]
        return cache

    draws.start = watched  # type: ignore[method-assign, assignment]
    names = {name: getattr(generate, name) for name in ("probabilities", "pick", "plausible")}
    try:
        for name, function in names.items():
            setattr(generate, name, timed("sampling", function))
        run = draw(job, draws)
        spent.clear()
        if draws.native is not None:
            draws.native.spent = torch.zeros(len(PARTS), dtype=torch.float64)
        began = time.perf_counter()
        tokens = run()
        whole = time.perf_counter() - began
        if draws.native is not None and draws.native.spent is not None:
            spent |= dict(zip(PARTS, draws.native.spent.tolist(), strict=True))
    finally:
        for name, function in names.items():
            setattr(generate, name, function)
    each = {name: seconds / tokens for name, seconds in sorted(spent.items())}
    each["the rest"] = whole / tokens - sum(each.values())
    each["all"] = whole / tokens
    return each


def ratios(job: Job, rounds: int = 5) -> dict[str, float]:
    """How many times as fast as the literal decoder the engine draws, and how a step's time grows with the grid.

    Medians over rounds that alternate, in one process: what a check for regressions can rely on.
    """

    def last(one: Job, draws: Decoder) -> Callable[[], float]:
        return steps(one, draws, one.image - 17, 16)

    def over(one: Callable[[], float], other: Callable[[], float]) -> float:
        return sorted(one() / other() for _ in range(rounds))[rounds // 2]

    model = prior(job).eval()
    engine, found = Engine(model, "int8"), {}
    for one in (replace(job, batch=1), replace(job, batch=8)):
        found[f"batch {one.batch}"] = over(last(one, model), last(one, engine))
    for pattern in ("full", "row", "column", "convolutional"):
        large, small = (replace(job, pattern=pattern, batch=8, grid=side) for side in (24, 8))
        runs = [last(one, Engine(prior(one).eval(), "int8")) for one in (large, small)]
        found[f"grid 24 over 8, {pattern}"] = over(*runs)
    return found


def weight_count(model: Prior) -> int:
    """Weights that a token is multiplied with: all matrices of the blocks, and the image head."""
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2)
    return blocks + model.image_head.weight.numel()


def bounds(megabytes: int = 512) -> dict[str, float]:
    """What this machine can do in this process: bytes read a second from memory, and products a second of matrices."""

    def best(function: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    data = torch.ones(megabytes * 2**17, dtype=torch.int64)
    other = torch.empty_like(data)

    def product(kind: torch.dtype) -> float:
        """Of matrices as large as can be without taking long, as bfloat16 does where a processor lacks it."""
        n = 256
        while True:
            a: Tensor = torch.randn(n, n).to(kind)
            seconds = best(functools.partial(torch.matmul, a, a))
            if n == 2048 or seconds > 0.1:
                return 2 * n**3 / seconds
            n *= 2

    return {
        "read_bytes": data.nbytes / best(lambda: data.sum()),
        "copied_bytes": data.nbytes / best(lambda: other.copy_(data)),
        "flops_fp32": product(torch.float32),
        "flops_bf16": product(torch.bfloat16),
    }


def main() -> None:
    wanted = json.loads(sys.argv[1])
    extra = wanted.pop("extra", None)
    job = Job(**wanted)
    torch.set_num_threads(job.threads)
    result: dict[str, Any]
    if extra == "bounds":
        result = {**bounds(), "weights": weight_count(prior(job))}
    elif extra == "ratios":
        with torch.inference_mode():
            result = ratios(job)
    elif job.what == "training":
        environment.for_training()  # as `armchair train` does
        result = timed_training(training(job), job)
    else:
        with torch.inference_mode():
            draws = decoder(job, prior(job).eval())
            steps(job, draws, 0, 1)
            if extra == "parts":
                assert isinstance(draws, Engine)
                result = {"parts": parts(job, draws)}
            else:
                result = timed_drawing(draw(job, draws), job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
