"""The prior packed for drawing: weights in the form that is read fastest, and nothing computed that is not needed.

Legend: R rows, T text length, N image tokens, D width, H heads, E = D / H, K codebook, M keys seen.

One token needs each weight once and little else, so drawing a few pictures is bound by how fast weights are read.
`Prior.decode_step` is the literal version, and tests hold this to it. What differs:

- Weights are packed once, as `weights` says (`pack`): `fp32`; `bf16`; or `int8`, eight bits a weight with a scale for
  each output, which are a quarter of the bytes. Under the last two what goes into a product is bfloat16 as well, and so
  are the keys and values that are kept; what layers add up in, and the logits, stay in 32 bits.
- Which keys a token sees is looked up, and each layer's keys lie in a buffer that the next product reads in place.
- Where the machine's products give each row the same bits whoever is beside it (`independent_rows`, which is tried out
  when an engine is made), rows need not come in batches of one size: one picture costs one row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.config import check_name
from armchair.prior.attention import ImageKeys, turn
from armchair.prior.sequence import StreamShape, text_input_ids
from armchair.prior.transformer import Prior, PromptCache

WEIGHTS = ("fp32", "bf16", "int8")
INT8_MOST = 127
ATTENTION_ROWS = 8

Product = Callable[[Tensor], Tensor]  # (R, in) -> (R, out), both in the engine's compute type


class Quantised(NamedTuple):
    """A matrix in eight bits, a scale a row: weight is nearly codes * scale[:, None]."""

    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out,) float32


def quantised(weight: Tensor) -> Quantised:
    """(out, in) -> the same in eight bits, symmetric, to the nearest."""
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / INT8_MOST
    return Quantised((weight.float() / scale[:, None]).round().to(torch.int8), scale)


def pack(weight: Tensor, bias: Tensor, weights: str) -> Product:
    """The product x -> x W^T + b with the weight (out, in) in the form that `weights` names."""
    weight, bias = weight.detach().float(), bias.detach().float()
    if weights == "int8":
        return Int8Product(weight, bias)
    if weights == "bf16":
        w, b = weight.bfloat16(), bias.bfloat16()
        return lambda x: F.linear(x.bfloat16(), w, b).float()
    columns = weight.T.contiguous()
    return lambda x: torch.addmm(bias, x, columns)


class Int8Product:
    """x W^T + b with both factors in eight bits: x with a scale a row, found as it comes, W with a scale an output.

    The sums are of whole numbers, so they are exact, in whatever order and beside whatever other rows they are made.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        self.narrow = weight.shape[1] == 1  # of one column PyTorch 2.13 takes the layout wrong, and adds other numbers
        self.codes, scale = quantised(F.pad(weight, (0, int(self.narrow))))
        self.scale, self.bias = scale / INT8_MOST, bias
        self.columns: Tensor | None = None  # (in, out): for several rows a layout that is read once for all of them

    def __call__(self, x: Tensor) -> Tensor:
        most = x.abs().amax(1, keepdim=True).clamp_min_(1e-12)
        small = x.mul(INT8_MOST / most).round_().to(torch.int8)
        if self.narrow:
            small = F.pad(small, (0, 1))
        if len(x) == 1:
            sums = torch._int_mm(small, self.codes.T)
        else:
            if self.columns is None:
                self.columns = self.codes.T.contiguous()
            sums = torch._int_mm(small, self.columns)
        return torch.addcmul(self.bias, sums * most, self.scale)


class Layer(NamedTuple):
    """One block, packed. Norms are (gain, bias)."""

    attention_norm: tuple[Tensor, Tensor]
    qkv: Product
    out: Product
    mlp_norm: tuple[Tensor, Tensor]
    mlp_in: Product
    mlp_out: Product


class Engine:
    """A prior ready to draw on a CPU. Raises RequestError for `weights` that are none of WEIGHTS."""

    def __init__(self, prior: Prior, weights: str = "fp32"):
        check_name("weights", weights, WEIGHTS)
        prior = prior.folded()
        self.shape: StreamShape = prior.shape
        self.config, self.weights = prior.config, weights

        def packed(linear: torch.nn.Linear) -> Product:
            return pack(linear.weight.detach(), linear.bias.detach(), weights)

        def norm(layer: torch.nn.LayerNorm) -> tuple[Tensor, Tensor]:
            return layer.weight.detach(), layer.bias.detach()

        self.layers = [
            Layer(
                norm(block.attention_norm),
                packed(block.attention.qkv),
                packed(block.attention.out),
                norm(block.mlp_norm),
                packed(block.mlp_in),
                packed(block.mlp_out),
            )
            for block in prior.blocks
        ]
        self.norm, self.head = norm(prior.norm), packed(prior.image_head)
        self.text_embedding = prior.text_embedding.weight.detach()
        self.text_position = prior.text_position.weight.detach()
        self.code_embedding = prior.image_embedding.weight.detach()
        with torch.no_grad():
            self.positions = prior._positions()  # (N, D)
        self.query_angles = prior.query_angles if self.config.rotary else None
        self.key_angles = prior.key_angles if self.config.rotary else None
        text = torch.arange(self.shape.text_length + 1)
        stores = {pattern: ImageKeys(pattern, self.shape.grid) for pattern in set(self.config.patterns)}
        self.stores = [stores[pattern] for pattern in self.config.patterns]
        self.seen = {pattern: _lookup(store, text, self.shape) for pattern, store in stores.items()}
        self.independent_rows = self._rows_are_independent()

    # What drawing asks of a decoder, as in `Prior`.

    @property
    def device(self) -> torch.device:
        return self.text_embedding.device

    def prefill(self, text_tokens: Tensor) -> PromptCache:
        """Read captions (B, T); `logits` (B, K) are those of the first image token."""
        x = F.embedding(text_input_ids(text_tokens, self.shape), self.text_embedding) + self.text_position
        rows, length, width = x.shape
        x = x.flatten(0, 1)  # (B (T+1), D)
        keys, values = [], []
        for layer in self.layers:
            q, k, v = self._heads(layer, x)  # (B (T+1), H, E)
            q, k, v = (y.unflatten(0, (rows, length)).transpose(1, 2) for y in (q, k, v))
            keys.append(k)
            values.append(v)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T+1, E)
            x = self._after_attention(layer, x, a.transpose(1, 2).reshape(rows * length, width))
        return PromptCache(keys, values, self._logits(x.view(rows, length, width)[:, -1]))

    def start(self, prompts: PromptCache) -> "Cache":
        """A cache for drawing the rows of `prompts` together."""
        return Cache(prompts, self.stores, torch.float32 if self.weights == "fp32" else torch.bfloat16)

    def decode_step(self, tokens: Tensor, j: int, cache: "Cache") -> Tensor:
        """Image token j of each row, (R,) -> logits of token j+1, (R, K) float32. 0 <= j < N-1."""
        x = F.embedding(tokens, self.code_embedding) + self.positions[j]
        place = self.shape.text_length + 1 + j
        for layer, pattern, store, (keys, values) in zip(
            self.layers, self.config.patterns, self.stores, cache.layers, strict=True
        ):
            q, k, v = self._heads(layer, x)
            if self.query_angles is not None and self.key_angles is not None:
                q = turn(q[:, :, None], self.query_angles[place, None])[:, :, 0]
                k = turn(k[:, :, None], self.key_angles[place, None])[:, :, 0]
            slot = cache.text_slots + store.slot(j)
            keys[:, :, slot], values[:, :, slot] = k, v
            visible = self.seen[pattern][j]
            if isinstance(visible, int):
                seen_keys, seen_values = keys[:, :, :visible], values[:, :, :visible]
            else:
                seen_keys, seen_values = keys[:, :, visible], values[:, :, visible]
            x = self._after_attention(layer, x, attend_one(q, seen_keys, seen_values))
        return self._logits(x)

    # The parts of a block, on rows (R, D).

    def _heads(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (R, H, E)."""
        h = F.layer_norm(x, x.shape[1:], *layer.attention_norm)
        q, k, v = layer.qkv(h).unflatten(1, (3, self.config.n_head, -1)).unbind(1)
        return q, k, v

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.out(attended)
        h = F.layer_norm(x, x.shape[1:], *layer.mlp_norm)
        return x + layer.mlp_out(F.gelu(layer.mlp_in(h)))

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(x, x.shape[1:], *self.norm)).float()

    @torch.inference_mode()
    def _rows_are_independent(self) -> bool:
        """Whether a row's logits and keys are the same bits alone as beside others, tried on a few steps of 1, 3 and 8.

        Products of 32-bit weights are usually done otherwise for one row than for several; those of 8-bit ones row by
        row. Which it is depends on the processor and on PyTorch.
        """
        g = torch.Generator().manual_seed(0)
        text = torch.randint(self.shape.text_vocab_size, (1, self.shape.text_length), generator=g)
        prompt = self.prefill(text)
        last = self.shape.image_length - 2
        steps = [j for j in sorted({0, last // 2, last}) if 0 <= j <= last]
        codes = torch.randint(self.shape.codebook_size, (8, len(steps)), generator=g)

        def logits(rows: Tensor) -> list[Tensor]:
            cache = self.start(prompt.rows(torch.zeros_like(rows)))
            return [self.decode_step(codes[rows, i], j, cache) for i, j in enumerate(steps)]

        whole = logits(torch.arange(8))
        for start, end in ((0, 1), (5, 6), (2, 5)):
            few = logits(torch.arange(start, end))
            if not all(torch.equal(a[start:end], b) for a, b in zip(whole, few, strict=True)):
                return False
        return True


class Cache:
    """Keys and values of text and image tokens, two buffers a layer: (R, H, T+1+size, E), text first."""

    def __init__(self, prompts: PromptCache, stores: list[ImageKeys], kind: torch.dtype):
        self.text_slots = prompts.keys[0].shape[2]

        def buffer(text: Tensor, size: int) -> Tensor:
            return F.pad(text.to(kind), (0, 0, 0, size))

        self.layers = [
            (buffer(k, store.size), buffer(v, store.size))
            for k, v, store in zip(prompts.keys, prompts.values, stores, strict=True)
        ]


def attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query a row: q (R, H, E) float32; keys, values (R, H, M, E), float32 or bfloat16 -> (R, H E) float32.

    By blocks of rows whose keys and values, written out in 32 bits, stay in the cache.
    """
    rows, heads, size = q.shape
    q = q[:, :, None] * size**-0.5
    out = []
    for start in range(0, rows, ATTENTION_ROWS):
        block = slice(start, start + ATTENTION_ROWS)
        scores = torch.matmul(q[block], keys[block].float().transpose(2, 3))  # (R, H, 1, M)
        out.append(torch.matmul(scores.softmax(-1), values[block].float()))
    return (out[0] if len(out) == 1 else torch.cat(out)).reshape(rows, heads * size)


def _lookup(store: ImageKeys, text: Tensor, shape: StreamShape) -> list[int | Tensor]:
    """For each image token the slots that it sees, text included: how many from the first on, or which."""
    found: list[int | Tensor] = []
    for j in range(shape.image_length):
        visible = store.visible(j)
        if isinstance(visible, slice) and visible.start == 0:
            found.append(len(text) + visible.stop)
        else:
            slots = torch.arange(visible.start, visible.stop) if isinstance(visible, slice) else visible
            found.append(torch.cat([text, len(text) + slots]))
    return found
