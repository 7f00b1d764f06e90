"""The prior packed for drawing: weights in the form that is read fastest, and nothing computed that is not needed.

Legend: R rows, T text length, N image tokens, D width, H heads, E = D / H, K codebook, M keys seen.

One token needs each weight once and little else, so drawing a few pictures is bound by how fast weights are read.
`Prior.decode_step` is the literal version, and tests hold this to it. What differs:

- Weights are packed once, as `weights` says (`pack`): `fp32`, `bf16`, or `int8`, eight bits a weight with a step for
  each output, which are a quarter of the bytes. What they are multiplied with then has eight bits too; what layers add
  up in and the logits stay in 32 bits.
- Which keys a token sees is looked up, and a layer's keys lie in a buffer that attention reads in place. With eight-bit
  weights they have eight bits too, or sixteen where attention is quicker over those (`fused_attention`).
- Where the machine's products give each row the same bits whoever is beside it (`independent_rows`, which is tried out
  when an engine is made), rows need not come in batches of one size: one picture costs one row.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.config import check_name
from armchair.errors import RequestError
from armchair.prior.attention import ImageKeys, turned
from armchair.prior.sequence import StreamShape, text_input_ids
from armchair.prior.transformer import (
    MLPS,
    NORM_EPSILON,
    Prior,
    PriorConfig,
    PromptCache,
    cell_positions,
    stream_angles,
    with_words_before,
)
from armchair.sample import native
from armchair.sample.native import NativeStep
from armchair.sample.weights import INT8_MOST, DrawingWeights, drawing_weights, in_eight_bits, whole_numbers

WEIGHTS = ("fp32", "bf16", "int8")
BLOCKED_FROM = 2**20  # weights of a matrix
TRIED_BYTES = 2**23  # of matrices of a size when it is timed, more than a core's own cache holds
TRIES = 3
ZERO = 128  # of eight bits without a sign
NO_SHIFT = torch.zeros(1, dtype=torch.int64)  # eight bits with a sign have their zero at 0
ATTENTION_ROWS = 8  # whose keys and values are written out in 32 bits together
SHARED_OUT = 2**15  # numbers from which PyTorch's threads each take a part of one operation

Product = Callable[[Tensor], Tensor]  # (R, in) -> (R, out), float32
Rows = Callable[[Tensor], Tensor]  # of rows each by itself, (R, in) -> (R, in), or (R, 2 in) -> (R, in)


@functools.cache
def exact_products() -> bool:
    """Whether `torch._int_mm` adds up exactly here, tried at the ends of the range.

    Processors from before VNNI take one factor without a sign, and may add pairs of products in 16 bits, which do not
    hold them. Or they are exact and slow: compiled code takes their place there, for captions as well (`Engine`).
    """
    x, w, exact = _ends_of_the_range()
    return torch.equal(torch._int_mm(x, w.T).long(), exact) and torch.equal(torch._int_mm(x[:1], w.T).long(), exact[:1])


@functools.cache
def blocked_products() -> bool:
    """Whether PyTorch has the operators of `blocked_product` here, and they add up exactly."""
    x, w, exact = _ends_of_the_range()
    try:
        found = blocked_product(x.float().add(ZERO).to(torch.uint8), blocked(w), torch.ones(len(w)))
    except (AttributeError, NotImplementedError, RuntimeError):  # not built in, or not for this processor
        return False
    return torch.equal(found, exact.float())


@functools.cache
def blocked_when_alone(outputs: int, inputs: int) -> bool:
    """Whether `blocked_product` is the quicker one for a single row, too, timed once for each size of a matrix.

    It is on some processors and not on others. The bits are the same either way.
    """
    if not blocked_products():
        return False
    many = [torch.zeros(outputs, inputs, dtype=torch.int8) for _ in range(max(1, TRIED_BYTES // (outputs * inputs)))]
    laid_out = [blocked(codes) for codes in many]
    signed, step = torch.zeros(1, inputs, dtype=torch.int8), torch.ones(outputs)
    unsigned = signed.to(torch.uint8)

    def plain() -> None:  # one matrix after the other, as a picture needs them, so that none waits in the cache
        for codes in many:
            torch._int_mm(signed, codes.T) * step

    def by_blocks() -> None:
        for blocks in laid_out:
            blocked_product(unsigned, blocks, step)

    return min(map(_seconds, [by_blocks] * TRIES)) < min(map(_seconds, [plain] * TRIES))


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@functools.cache
def fused_attention() -> bool:
    """Whether PyTorch's fused attention over bfloat16 keys and values is quicker than products over eight-bit ones.

    It is where a processor has AMX, and was not on an AMD EPYC with bfloat16 (docs/speed.md). This is a rule and not
    timed, because the two give other bits: a machine has to keep to one.
    """
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _ends_of_the_range() -> tuple[Tensor, Tensor, Tensor]:
    """int8 (8, 256) and (64, 256) of -127 and 127, and the product of the first with the second turned, (8, 64)."""
    ends = torch.tensor([-INT8_MOST, INT8_MOST], dtype=torch.int8)
    g = torch.Generator().manual_seed(0)
    x, w = (ends[torch.randint(2, (rows, 256), generator=g)] for rows in (8, 64))
    x[0], w[0], w[1] = INT8_MOST, INT8_MOST, -INT8_MOST
    return x, w, x.long() @ w.long().T


def default_weights(config: PriorConfig | None = None) -> str:
    """`int8` where its products are exact, else `fp32`; for such sizes as compiled code computes with, or a prior's."""
    compiled = native.library() is not None and (config is None or native.fits(config))
    return "int8" if compiled or exact_products() else "fp32"


def pack(weight: Tensor, bias: Tensor, weights: str, step: Tensor | None = None) -> Product:
    """The product x -> x W^T + b with the weight (out, in) in the form that `weights` names.

    With a `step`, (out,), the weight is whole numbers, in eight bits as `in_eight_bits` has them.
    """
    weight, bias = weight.detach(), bias.detach().float()
    if weights == "int8":
        if step is None:
            weight, steps = in_eight_bits(weight.float())
            step = steps[:, 0]
        return Int8Product(weight, step, bias)
    weight = weight.float() if step is None else weight * step[:, None]
    if weights == "bf16":
        w, b = weight.bfloat16(), bias.bfloat16()
        return lambda x: F.linear(x.bfloat16(), w, b).float()
    columns = weight.T.contiguous()
    return lambda x: torch.addmm(bias, x, columns)


class Int8Product:
    """x W^T + b with both factors in eight bits: x with a scale a row, found as it comes, W with a scale an output.

    W comes as whole numbers, (out, in), with their step, (out,), and stays where it lies, in a mapped file say. The
    sums are of whole numbers, so they are exact, in whatever order and beside whatever other rows they are made.
    """

    def __init__(self, codes: Tensor, step: Tensor, bias: Tensor):
        self.narrow = codes.shape[1] == 1  # of one column PyTorch 2.13 takes the layout wrong, and adds other numbers
        self.codes = F.pad(codes, (0, 1)) if self.narrow else codes
        self.columns = self.codes.T
        self.step, self.bias = step, bias
        self.laid_out: Tensor | None = None  # the same as `blocked_product` has it, where that is quicker

    def __call__(self, x: Tensor) -> Tensor:
        whole, step = whole_numbers(x)
        if self.narrow:
            whole = F.pad(whole, (0, 1))
        if self._by_blocks(len(x)):
            if self.laid_out is None:
                self.laid_out = blocked(self.codes)
            product = blocked_product(whole.add_(ZERO).to(torch.uint8), self.laid_out, self.step)
        else:
            product = torch._int_mm(whole.to(torch.int8), self.columns) * self.step
        return torch.addcmul(self.bias, product, step)

    def _by_blocks(self, rows: int) -> bool:
        """A small matrix takes longer by blocks, as they have more to prepare; of a large one it is a gain with several
        rows."""
        if self.codes.numel() < BLOCKED_FROM:
            return False
        return blocked_products() if rows > 1 else blocked_when_alone(*self.codes.shape)


def blocked(codes: Tensor) -> Tensor:
    """A matrix (out, in), int8, in the layout that `blocked_product` reads."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def blocked_product(x: Tensor, blocks: Tensor, step: Tensor) -> Tensor:
    """x (R, in), uint8, less ZERO, times a `blocked` matrix turned, and each output by its step (out,): (R, out).

    With eight rows and a matrix of 512 x 2048 it takes 0.6 of the time of `torch._int_mm`, which finds the matrix as it
    happens to lie; with a small one it takes longer, as it has more to prepare.
    """
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, ZERO, blocks, step, NO_SHIFT, None, 1.0, 0, torch.float32, "none", [], ""
    )


def norm_of_rows(gain: Tensor, bias: Tensor | None) -> Rows:
    """LayerNorm, or the root mean square's where there is no bias."""
    if bias is None:
        return lambda x: F.rms_norm(x, gain.shape, gain, NORM_EPSILON)
    return lambda x: F.layer_norm(x, gain.shape, gain, bias, NORM_EPSILON)


def gated_rows(x: Tensor) -> Tensor:
    """`swiglu` of rows (R, 2H), by so few at a time that no thread begins within a row.

    The last few numbers of a thread's part are computed otherwise than those before, and can differ in their last bit:
    a row would depend on how many there are. GELU is a kernel of its own, which does not.
    """
    few = max(1, 2 * (SHARED_OUT - 1) // x.shape[1])
    return MLPS["swiglu"](x) if len(x) <= few else torch.cat([MLPS["swiglu"](part) for part in x.split(few)])


ACTIVATIONS = {**MLPS, "swiglu": gated_rows}


class Layer(NamedTuple):
    """One block, packed. head_gains, (2, 1, E): what queries, with their scale, and keys are normalised to, if so."""

    attention_norm: Rows
    qkv: Product
    head_gains: Tensor | None
    out: Product
    mlp_norm: Rows
    mlp_in: Product
    mlp_out: Product


class Engine:
    """A prior ready to draw on a CPU, from one in 32 bits or from weights that may have eight.

    Raises RequestError for `weights` that are none of WEIGHTS, and for `int8` where a processor cannot do it.
    """

    def __init__(self, prior: Prior | DrawingWeights, weights: str = "fp32"):
        check_name("weights", weights, WEIGHTS)
        source = drawing_weights(prior) if isinstance(prior, Prior) else prior
        tensors = source.tensors
        self.shape: StreamShape = source.shape
        self.config, self.weights = source.config, weights
        self.turns: tuple[Tensor, Tensor] | None = None
        if self.config.rotary:
            angles = torch.stack(stream_angles(self.shape, self.config), 1)
            angles = angles[:, None, :, None]  # (L, 1, 2, 1, E / 2)
            self.turns = angles.cos(), angles.sin()
        self.native = self._compiled(tensors)
        if weights == "int8" and self.native is None and not exact_products():
            raise RequestError("weights 'int8': this processor does not add up eight-bit products exactly; take fp32")

        def packed(name: str) -> Product:
            if self.native is not None and self.native.calls.instructions == native.AVX2:  # where PyTorch's is slow
                return self.native.products[name]
            return pack(tensors[f"{name}.weight"], tensors[f"{name}.bias"], weights, tensors.get(f"{name}.step"))

        def norm(name: str) -> Rows:
            bias = tensors.get(f"{name}.bias")
            return norm_of_rows(tensors[f"{name}.weight"].float(), None if bias is None else bias.float())

        def head_gains(name: str) -> Tensor | None:
            if not self.config.qk_norm:
                return None
            return torch.stack([tensors[f"{name}.{kind}_norm.weight"].float() for kind in ("query", "key")])[:, None]

        self.layers = [
            Layer(
                norm(f"blocks.{i}.attention_norm"),
                packed(f"blocks.{i}.attention.qkv"),
                head_gains(f"blocks.{i}.attention"),
                packed(f"blocks.{i}.attention.out"),
                norm(f"blocks.{i}.mlp_norm"),
                packed(f"blocks.{i}.mlp_in"),
                packed(f"blocks.{i}.mlp_out"),
            )
            for i in range(self.config.n_layer)
        ]
        self.norm, self.head = norm("norm"), packed("image_head")
        self.activation: Rows = ACTIVATIONS[self.config.mlp]
        # Tables may have 16 bits, and lie in a mapped file: of what is looked up, the sum with its position has 32.
        self.text_embedding, self.code_embedding = tensors["text_embedding.weight"], tensors["image_embedding.weight"]
        self.text_position = tensors["text_position.weight"].float()
        self.text_conv = tensors["text_conv"].float() if self.config.text_conv else None
        rows, columns = (tensors[f"{name}_embedding.weight"].float() for name in ("row", "column"))
        self.positions = cell_positions(rows, columns)  # (N, D)
        self.places = Places(self.config.patterns, self.shape, everything=False)
        self.independent_rows = self._rows_are_independent()

    def _compiled(self, tensors: Mapping[str, Tensor]) -> NativeStep | None:
        """A step in eight bits as compiled code, where there is that for these sizes."""
        library = native.library() if self.weights == "int8" and native.fits(self.config) else None
        if library is None:
            return None

        def matrix(name: str) -> tuple[Tensor, Tensor, Tensor]:
            weight, step = tensors[f"{name}.weight"], tensors.get(f"{name}.step")
            if step is None:
                weight, steps = in_eight_bits(weight.float())
                step = steps[:, 0]
            return weight, step, tensors[f"{name}.bias"]

        return NativeStep(library, self.config, tensors, matrix, self.turns, self.shape.text_length + 1)

    @functools.cached_property
    def places_ahead(self) -> "Places":
        """`places` of a cache that can be gone back in."""
        return Places(self.config.patterns, self.shape, everything=True)

    # What drawing asks of a decoder, as in `Prior`.

    @property
    def device(self) -> torch.device:
        return self.text_embedding.device

    @property
    def independent_threads(self) -> bool:
        return self.native is not None and self.independent_rows

    def prefill(self, text_tokens: Tensor) -> PromptCache:
        """Read captions (B, T); `logits` (B, K) are those of the first image token."""
        x = F.embedding(text_input_ids(text_tokens, self.shape), self.text_embedding) + self.text_position
        if self.text_conv is not None:
            x = with_words_before(x, self.text_conv)
        rows, length, width = x.shape
        x = x.flatten(0, 1)  # (B (T+1), D)
        keys, values = [], []
        for layer in self.layers:
            q, k, v = self._heads(layer, x).view(rows, length, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
            keys.append(k)
            values.append(v)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)  # (B, H, T+1, E)
            x = self._after_attention(layer, x, a.transpose(1, 2).reshape(rows * length, width))
        return PromptCache(keys, values, self._logits(x.view(rows, length, width)[:, -1]))

    def start(self, prompts: PromptCache, ahead: bool = False) -> "Cache":
        """A cache for drawing the rows of `prompts` together; with `ahead` it can be gone back in (`decode_steps`)."""
        places = self.places_ahead if ahead else self.places
        if self.weights == "int8" and self.native is None and fused_attention():
            return FusedCache(prompts, places)
        return Cache(prompts, places, eight_bits=self.weights == "int8")

    def decode_step(self, tokens: Tensor, j: int, cache: "Cache") -> Tensor:
        """Image token j of each row, (R,) -> logits of token j+1, (R, K) float32. 0 <= j < N-1."""
        return self.decode_steps(tokens[:, None], j, cache)[:, 0]

    def decode_steps(self, tokens: Tensor, j: int, cache: "Cache") -> Tensor:
        """Image tokens j to j+C-1 of each row, (R, C) -> logits of tokens j+1 to j+C, (R, C, K) float32.

        All of them at once, each seeing those before it, with the same bits as one after the other where rows are
        independent. For C > 1 the cache is one to go back in: tokens may be given again, others than before.
        """
        (logits,) = self.decode_together([(tokens, j, cache)])
        return logits

    def decode_together(self, steps: "Sequence[tuple[Tensor, int, Cache]]") -> list[Tensor]:
        """`decode_steps` of several caches in one pass through the weights, each at its own place of the picture.

        With the same bits as each alone: where rows are not independent, they go one after the other.
        """
        if len(steps) > 1 and not self.independent_rows:
            return [self.decode_steps(*step) for step in steps]
        x = _joined([self._embedded(tokens, j) for tokens, j, _ in steps])  # (sum of C R, D)
        sizes = [tokens.numel() for tokens, _, _ in steps]
        logits = self._through(x, sizes, steps) if self.native is None else self.native(x, steps)
        each = zip(logits.split(sizes), steps, strict=True)
        return [own.unflatten(0, tokens.T.shape).transpose(0, 1) for own, (tokens, _, _) in each]

    def _through(self, x: Tensor, sizes: list[int], steps: "Sequence[tuple[Tensor, int, Cache]]") -> Tensor:
        """Blocks and head: (sum of C R, D) -> logits (sum of C R, K)."""
        for i, layer in enumerate(self.layers):
            heads = self._heads(layer, x).split(sizes)
            attended = [self._attended(i, own, *step) for own, step in zip(heads, steps, strict=True)]
            x = self._after_attention(layer, x, _joined(attended))
        return self._logits(x)

    def _embedded(self, tokens: Tensor, j: int) -> Tensor:
        """(R, C) -> (C R, D)"""
        x = F.embedding(tokens, self.code_embedding) + self.positions[j : j + tokens.shape[1]]
        return x.transpose(0, 1).flatten(0, 1)

    def _attended(self, layer: int, heads: Tensor, tokens: Tensor, j: int, cache: "Cache") -> Tensor:
        """Attention of one cache's tokens, whose keys and values are kept: (C R, 3, H, E) -> (C R, H E)."""
        rows, count = tokens.shape
        heads = heads.unflatten(0, (count, rows))
        if self.turns is not None:
            first = self.shape.text_length + 1 + j
            heads[:, :, :2] = turned(heads[:, :, :2], *(turn[first : first + count] for turn in self.turns))
        cache.put(layer, j, heads[:, :, 1:])
        return cache.attend(layer, j, heads[:, :, 0])

    # The parts of a block, on rows (R, D).

    def _heads(self, layer: Layer, x: Tensor) -> Tensor:
        """Queries (scaled), keys and values, (R, 3, H, E)."""
        heads = layer.qkv(layer.attention_norm(x)).view(len(x), 3, self.config.n_head, -1)
        if layer.head_gains is not None:
            normed = F.rms_norm(heads[:, :2], heads.shape[3:], None, NORM_EPSILON)
            heads[:, :2] = normed.mul_(layer.head_gains)
        return heads

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.out(attended)
        return x + layer.mlp_out(self.activation(layer.mlp_in(layer.mlp_norm(x))))

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    @torch.inference_mode()
    def _rows_are_independent(self) -> bool:
        """Whether a row's logits and keys are the same bits alone as beside others, and of steps one by one as at once.

        Tried on a few steps of 1, 3 and 8 rows, and of 2 with three steps at once. Products of 32-bit weights are
        usually done otherwise for one row than for several; those of 8-bit ones row by row. Which it is depends on the
        processor and on PyTorch.
        """
        g = torch.Generator().manual_seed(0)
        text = torch.randint(self.shape.text_vocab_size, (1, self.shape.text_length), generator=g)
        prompt = self.prefill(text)
        last = self.shape.image_length - 2
        steps = sorted({j for j in (0, last - 2, last - 1, last) if 0 <= j <= last})
        codes = torch.randint(self.shape.codebook_size, (8, len(steps)), generator=g)

        def logits(rows: Tensor, ahead: int = 1) -> list[Tensor]:
            """Those of each step, the last `ahead` of them at once; what was skipped counts as zeros."""
            cache = self.start(prompt.rows(torch.zeros_like(rows)), ahead=True)
            singly = len(steps) - (ahead if ahead > 1 else 0)
            found = [self.decode_step(codes[rows, i], steps[i], cache) for i in range(singly)]
            found += self.decode_steps(codes[rows, singly:], steps[singly], cache).unbind(1) if ahead > 1 else []
            return found

        whole = logits(torch.arange(8))
        for start, end, ahead in ((0, 1, 1), (5, 6, 1), (2, 5, 1), (3, 5, min(3, last + 1))):
            few = logits(torch.arange(start, end), ahead)
            if not all(torch.equal(a[start:end], b) for a, b in zip(whole, few, strict=True)):
                return False
        return True


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Cache:
    """Keys and values of text and image tokens, a buffer a layer: (2, R, H, T+1+size, E), text first.

    In eight bits each key and value of a head has a step of its own, (2, R, H, T+1+size).
    """

    def __init__(self, prompts: PromptCache, places: "Places", eight_bits: bool):
        rows, heads, text_slots, size = prompts.keys[0].shape
        self.places = places
        self.kept: list[Tensor] = []
        self.steps: list[Tensor] = []
        for k, v, image_slots in zip(prompts.keys, prompts.values, places.sizes, strict=True):
            text = torch.stack([k, v])
            if eight_bits:
                text, step = in_eight_bits(text)
                self.steps.append(F.pad(step[..., 0], (0, image_slots)))
            self.kept.append(F.pad(text, (0, 0, 0, image_slots)))
        self._flatten()
        most = text_slots + max(places.sizes)
        block = min(rows, ATTENTION_ROWS) * heads
        self.scratch = torch.empty(2, block * most * size if eight_bits else 0)

    def keep(self, rows: Tensor) -> None:
        """Hold these rows alone, in this order."""
        self.kept = [kept[:, rows] for kept in self.kept]
        self.steps = [step[:, rows] for step in self.steps]
        self._flatten()

    def _flatten(self) -> None:
        """The same memory by rows and heads together, as the products have it."""
        self.flat_kept = [kept.flatten(1, 2) for kept in self.kept]
        self.flat_steps = [step.flatten(1, 2)[:, :, None] for step in self.steps]

    def put(self, layer: int, j: int, kept: Tensor) -> None:
        """Keep a key and a value of each row for image tokens j to j+C-1, (C, R, 2, H, E)."""
        kept = kept.transpose(1, 2)  # (C, 2, R, H, E)
        if self.steps:
            kept, steps = in_eight_bits(kept)
        for c, slot in enumerate(self.places.slots[layer][j : j + len(kept)]):
            self.kept[layer][..., slot, :] = kept[c]
            if self.steps:
                self.steps[layer][..., slot] = steps[c, ..., 0]

    def attend(self, layer: int, j: int, q: Tensor) -> Tensor:
        """One scaled query a row for each of image tokens j to j+C-1, (C, R, H, E), over what it sees -> (C R, H E).

        By blocks of rows whose keys and values, written out in 32 bits, stay in the processor's cache. Each query is a
        product of its own, of which several would be done otherwise than one.
        """
        count, rows, heads, size = q.shape
        seen = self.places.seen[layer][j : j + count]
        nested = count > 1 and all(isinstance(v, slice) for v in seen)  # the last sees all that the others see
        q = q.reshape(count, rows * heads, 1, size)
        out = torch.empty_like(q)
        for start in range(0, rows * heads, ATTENTION_ROWS * heads):
            block = slice(start, start + ATTENTION_ROWS * heads)
            if nested:
                kept = self.flat_kept[layer][:, block, seen[-1]]
                all_keys, all_values = self._written_out(kept[0], 0), self._written_out(kept[1], 1)
            for c, visible in enumerate(seen):
                if nested:
                    shares = self._shares(q[c, block], all_keys[:, visible], layer, block, visible)
                    values = all_values[:, visible]
                else:  # values take the place of the keys
                    kept = self.flat_kept[layer][:, block, visible]
                    shares = self._shares(q[c, block], self._written_out(kept[0], 0), layer, block, visible)
                    values = self._written_out(kept[1], 0)
                torch.bmm(shares, values, out=out[c, block])
        return out.view(count * rows, heads * size)

    def _shares(self, q: Tensor, keys: Tensor, layer: int, block: slice, visible: slice | Tensor) -> Tensor:
        """What each value counts for, (R H, 1, M), its step included."""
        scores = torch.bmm(q, keys.transpose(1, 2))
        if not self.steps:
            return scores.softmax(-1)
        key_steps, value_steps = self.flat_steps[layer][:, block, :, visible].unbind()
        return scores.mul_(key_steps).softmax(-1).mul_(value_steps)

    def _written_out(self, kept: Tensor, place: int) -> Tensor:
        """Keys or values of a block, (R H, M, E), in 32 bits, until the next are written out in that place."""
        return self.scratch[place, : kept.numel()].view(kept.shape).copy_(kept) if self.steps else kept


class FusedCache(Cache):
    """A Cache in bfloat16, for attention in one operation that reads keys and values as they are."""

    def __init__(self, prompts: PromptCache, places: "Places"):
        prompts = PromptCache(_halves(prompts.keys), _halves(prompts.values), prompts.logits)
        super().__init__(prompts, places, eight_bits=False)

    def attend(self, layer: int, j: int, q: Tensor) -> Tensor:
        """As in `Cache`; each query by itself, since several together would be added up otherwise than one."""
        keys, values = self.kept[layer]
        seen = self.places.seen[layer][j : j + len(q)]
        out = [
            F.scaled_dot_product_attention(own[:, :, None], keys[:, :, visible], values[:, :, visible], scale=1.0)
            for own, visible in zip(q.to(keys.dtype), seen, strict=True)
        ]  # each (R, H, 1, E)
        return _joined(out).reshape(q.shape[0] * q.shape[1], -1).float()


def _halves(parts: list[Tensor]) -> list[Tensor]:
    return [part.bfloat16() for part in parts]


class Places:
    """Where each layer keeps what image tokens leave, and what they see; slots count from the text's first on."""

    def __init__(self, patterns: Sequence[str], shape: StreamShape, everything: bool):
        text = shape.text_length + 1
        stores = {pattern: ImageKeys(pattern, shape.grid, everything) for pattern in set(patterns)}
        tokens = range(shape.image_length)
        slots = {p: [text + store.slot(j) for j in tokens] for p, store in stores.items()}
        seen = {p: [_after_text(store.visible(j), text) for j in tokens] for p, store in stores.items()}
        self.sizes = [stores[pattern].size for pattern in patterns]  # a layer, slots of image tokens
        self.slots = [slots[pattern] for pattern in patterns]  # a layer and token
        self.seen = [seen[pattern] for pattern in patterns]  # a layer and token; the text's among them


def _after_text(visible: slice | Tensor, text: int) -> slice | Tensor:
    if isinstance(visible, slice) and visible.start == 0:
        return slice(0, text + visible.stop)
    slots = torch.arange(visible.start, visible.stop) if isinstance(visible, slice) else visible
    return torch.cat([torch.arange(text), text + slots])
