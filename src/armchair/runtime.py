"""Decisions about the machine, taken once and passed down: device, compute type, random streams."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from armchair.errors import RequestError


def stream_seed(*names: int | str) -> int:
    """A 63-bit seed from names and numbers, e.g. `stream_seed(seed, "candidate", 3)`.

    Hashing, rather than adding, keeps the streams of neighbouring seeds and indices unrelated.
    """
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*names: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for the named stream; nothing in armchair draws from the global one."""
    g = torch.Generator(device=device)
    g.manual_seed(stream_seed(*names))
    return g


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """While inside, models are made without their random start: for weights that are loaded at once, all of them.

    Filling ten million numbers takes longer than reading them. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    fills = frozenset({"normal_", "uniform_", "kaiming_uniform_"})

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.fills:  # the functions of `torch.nn.init` and the methods alike
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises RequestError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device {name!r}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {name!r} was asked for, but this PyTorch finds no CUDA GPU; use cpu")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 matrix products are native, so that autocast saves time rather than costs it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return False


def compute_type(device: torch.device, precision: str) -> torch.dtype:
    """What matrix products are computed in. `precision`: `fp32`, `bf16`, or `auto` (bf16 where it is native)."""
    if precision == "auto":
        precision = "bf16" if has_fast_bfloat16(device) else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of a run; `precision` as for `compute_type`."""
    if compute_type(device, precision) == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
