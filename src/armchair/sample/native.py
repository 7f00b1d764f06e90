"""The engine's step in eight bits as one call of compiled code, `_native*`, where there is that.

A step by PyTorch is some hundred small operations a layer, which for a few rows take longer than reading the weights.
The library is built when armchair is installed, if there is a C compiler; without it, or on a processor that it is not
for, `library` gives None and the engine draws by PyTorch. `ARMCHAIR_NATIVE=0` asks for that too, and
`ARMCHAIR_NATIVE=avx2` for what older processors draw with.

Legend: R rows, D width, H heads, E = D / H, K codebook, N image tokens.
"""

import contextlib
import ctypes
import functools
import importlib.machinery
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.prior.transformer import PriorConfig

if TYPE_CHECKING:
    from armchair.sample.engine import Cache, Places

OUTPUTS = 64  # of a block of a matrix
PARTS = ("norms and rounding", "products", "keeping keys", "attention", "head")  # of a step
AVX2, AVX512 = 1, 2  # kinds of instructions, the latter with VNNI; all that have it have the former
NUMBERS = 16  # of 32 bits in a register: widths are multiples of it

Pointer = ctypes.c_void_p
Number = ctypes.c_int64


class Matrix(ctypes.Structure):
    _fields_ = (("weight", Pointer), ("step", Pointer), ("bias", Pointer), ("outputs", Number), ("inputs", Number))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Pointer) for name in ("attention_gain", "attention_bias", "head_gains", "mlp_gain", "mlp_bias")),
        *((name, Matrix) for name in ("qkv", "out", "mlp_in", "mlp_out")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, Number) for name in ("width", "heads", "layers", "gated")),
        *((name, Pointer) for name in ("gain", "bias", "cosines", "sines")),
        ("first", Number),
        ("layer", ctypes.POINTER(Layer)),
        ("head", Matrix),
    )


class LayerPlaces(ctypes.Structure):
    _fields_ = (("size", Number), ("slot", Pointer), ("count", Pointer), ("begin", Pointer), ("list", Pointer))


class Group(ctypes.Structure):
    _fields_ = (
        *((name, Number) for name in ("rows", "count", "j")),
        *((name, Pointer) for name in ("kept", "steps", "places")),
    )


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    here = Path(__file__).parent
    for ending in importlib.machinery.EXTENSION_SUFFIXES:
        if (file := here / f"_native{ending}").is_file():
            try:
                found = ctypes.CDLL(str(file))
            except OSError:  # for another system
                return None
            found.armchair_pool.restype = Pointer
            found.armchair_pool.argtypes = [ctypes.c_int]
            found.armchair_end.argtypes = [Pointer]
            found.armchair_step.argtypes = [
                ctypes.POINTER(Model), Pointer, ctypes.c_int, Number, ctypes.POINTER(Group), Pointer, Pointer, Pointer
            ]  # fmt: skip
            found.armchair_product.argtypes = [
                ctypes.POINTER(Matrix), Pointer, ctypes.c_int, Number, Number, Pointer, Pointer
            ]  # fmt: skip
            return found if found.armchair_supported() else None
    return None


def library() -> ctypes.CDLL | None:
    """The compiled code, where it was built, is for this processor, and is not switched off."""
    return None if os.environ.get("ARMCHAIR_NATIVE") == "0" else _loaded()


def instructions(library: ctypes.CDLL) -> int:
    """What the compiled code computes with: AVX2 or AVX512."""
    return AVX2 if os.environ.get("ARMCHAIR_NATIVE") == "avx2" else int(library.armchair_supported())


def fits(config: PriorConfig) -> bool:
    """Whether the sizes of a prior are such as the compiled code computes with."""
    return config.d_model % NUMBERS == 0 and config.d_model // config.n_head % NUMBERS == 0


def laid_out(codes: Tensor) -> Tensor:
    """A matrix (out, in), int8, as the compiled code reads it: uint8 (out / 64, in / 4, 64, 4), 128 more, filled up."""
    out, inputs = codes.shape
    filled = F.pad(codes, (0, -inputs % 4, 0, -out % OUTPUTS))
    blocks = filled.view(-1, OUTPUTS, filled.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return blocks.view(torch.uint8).bitwise_xor_(128)


class Threads:
    """Threads of the compiled code's own, which take turns at steps; gone with this. One is the caller itself."""

    def __init__(self, library: ctypes.CDLL, count: int):
        self.pool = library.armchair_pool(count) if count > 1 else None
        self.turn = threading.Lock() if self.pool else contextlib.nullcontext()
        if self.pool:
            weakref.finalize(self, library.armchair_end, self.pool).atexit = False


_of_this_thread = threading.local()


@contextlib.contextmanager
def sharing(threads: int) -> Iterator[None]:
    """For who calls in here: compiled code has so many threads, and PyTorch one. With a single one all is as it is.

    PyTorch's threads go on spinning for a while when their part of an operation is done, on the cores that threads of
    the next step need.
    """
    if threads < 2:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _of_this_thread.shared_by = threads
    try:
        yield
    finally:
        del _of_this_thread.shared_by
        torch.set_num_threads(before)


class Calls:
    """Calls of compiled code, with as many threads as PyTorch has when one is made, or as `sharing` says."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.instructions = instructions(library)
        self.threads: dict[int, Threads] = {}  # by how many

    def __call__(self, name: str, first: ctypes.Structure, *arguments: Any) -> None:
        """Raises MemoryError."""
        count = getattr(_of_this_thread, "shared_by", None) or torch.get_num_threads()
        threads = self.threads.get(count) or self.threads.setdefault(count, Threads(self.library, count))
        with threads.turn:
            failed = getattr(self.library, name)(first, threads.pool, self.instructions, *arguments)
        if failed:
            raise MemoryError(f"no memory for {name}")


class NativeProduct:
    """x (R, in) -> x W^T + b, (R, out): `Int8Product` by compiled code. codes (out, in) int8, step and bias (out,)."""

    def __init__(self, calls: Calls, codes: Tensor, step: Tensor, bias: Tensor):
        self.calls = calls
        self._tensors = [laid_out(codes), step.float().contiguous(), bias.float().contiguous()]
        self.matrix = Matrix(*(tensor.data_ptr() for tensor in self._tensors), *codes.shape)

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[1] % NUMBERS)).contiguous()
        y = torch.empty(len(x), self.matrix.outputs)
        self.calls("armchair_product", self.matrix, *x.shape, x.data_ptr(), y.data_ptr())
        return y


class NativePlaces:
    """`Places` as the compiled code has them: a slot a token, and what it sees as a number of first slots or a list."""

    def __init__(self, places: "Places", text_slots: int):
        self.tensors: list[Tensor] = []
        layers: dict[int, LayerPlaces] = {}  # layers of a pattern share their lists
        every = []
        for size, slots, seen in zip(places.sizes, places.slots, places.seen, strict=True):
            if id(slots) not in layers:
                lists = [None if isinstance(v, slice) else v for v in seen]
                counts = [v.stop if isinstance(v, slice) else len(v) for v in seen]
                begins, end = [], 0
                for one in lists:
                    begins.append(-1 if one is None else end)
                    end += 0 if one is None else len(one)
                whole = torch.cat([torch.zeros(1, dtype=torch.int64), *(one for one in lists if one is not None)])
                layers[id(slots)] = LayerPlaces(
                    text_slots + size,
                    self._kept(torch.tensor(slots, dtype=torch.int32)),
                    self._kept(torch.tensor(counts, dtype=torch.int32)),
                    self._kept(torch.tensor(begins, dtype=torch.int64)),
                    self._kept(whole[1:].int()),
                )
            every.append(layers[id(slots)])
        self.layers = (LayerPlaces * len(every))(*every)

    def _kept(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()


class NativeStep:
    """A prior's blocks and image head, packed. tensors: those of `DrawingWeights`; matrix: codes, step, bias of one."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: PriorConfig,
        tensors: Any,
        matrix: Callable[[str], tuple[Tensor, Tensor, Tensor]],
        turns: tuple[Tensor, Tensor] | None,
        text_slots: int,
    ):
        self.text_slots = text_slots
        self.calls = Calls(library)
        self.products: dict[str, NativeProduct] = {}  # by the name of their matrix
        self._tensors: list[Tensor] = []  # that the compiled code reads, too

        def pointer(tensor: Tensor) -> int:
            self._tensors.append(tensor.contiguous())
            return self._tensors[-1].data_ptr()

        def vector(name: str) -> int | None:
            return pointer(tensors[name].float()) if name in tensors else None

        def packed(name: str) -> Matrix:
            self.products[name] = NativeProduct(self.calls, *matrix(name))
            return self.products[name].matrix

        def gains(name: str) -> int | None:
            if not config.qk_norm:
                return None
            return pointer(torch.stack([tensors[f"{name}.{kind}_norm.weight"].float() for kind in ("query", "key")]))

        layers = [
            Layer(
                vector(f"blocks.{i}.attention_norm.weight"),
                vector(f"blocks.{i}.attention_norm.bias"),
                gains(f"blocks.{i}.attention"),
                vector(f"blocks.{i}.mlp_norm.weight"),
                vector(f"blocks.{i}.mlp_norm.bias"),
                *(packed(f"blocks.{i}.{part}") for part in ("attention.qkv", "attention.out", "mlp_in", "mlp_out")),
            )
            for i in range(config.n_layer)
        ]
        self._layers = (Layer * len(layers))(*layers)
        self.head = packed("image_head")
        self.model = Model(
            config.d_model, config.n_head, len(layers), config.mlp == "swiglu",
            vector("norm.weight"), vector("norm.bias"),
            *((None, None) if turns is None else (pointer(turn.flatten(1)) for turn in turns)),
            text_slots, self._layers, self.head,
        )  # fmt: skip
        self._places: dict[int, tuple[Any, NativePlaces]] = {}
        self.spent: Tensor | None = None  # (PARTS,) float64, to which seconds are added

    def __call__(self, x: Tensor, steps: Sequence[tuple[Tensor, int, "Cache"]]) -> Tensor:
        """Embedded tokens of several caches, (sum of C R, D), as `Engine.decode_together` has them -> logits, (…, K).

        Keys and values are kept in the caches.
        """
        groups = (Group * len(steps))()
        held = []
        for group, (tokens, j, cache) in zip(groups, steps, strict=True):
            pointers = [(Pointer * len(part))(*(t.data_ptr() for t in part)) for part in (cache.kept, cache.steps)]
            held.append(pointers)
            group.rows, group.count, group.j = len(tokens), tokens.shape[1], j
            group.kept, group.steps = (ctypes.addressof(p) for p in pointers)
            group.places = ctypes.addressof(self._places_of(cache.places).layers)
        x = x.contiguous()
        logits = torch.empty(len(x), self.head.outputs)
        self.calls(
            "armchair_step", self.model, len(steps), groups, x.data_ptr(), logits.data_ptr(),
            None if self.spent is None else self.spent.data_ptr(),
        )  # fmt: skip
        return logits

    def _places_of(self, places: "Places") -> NativePlaces:
        if id(places) not in self._places:  # two threads that come at once take the same
            self._places.setdefault(id(places), (places, NativePlaces(places, self.text_slots)))
        return self._places[id(places)][1]
