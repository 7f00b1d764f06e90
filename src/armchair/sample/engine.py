"""The prior packed for drawing: weights in the form that is read fastest, and nothing computed that is not needed.

Legend: R rows, T text length, N image tokens, D width, H heads, E = D / H, K codebook, M keys seen.

One token needs each weight once and little else, so drawing a few pictures is bound by how fast weights are read.
`Prior.decode_step` is the literal version, and tests hold this to it. What differs:

- Weights are packed once, as `weights` says (`pack`): `fp32`, `bf16`, or `int8`, eight bits a weight with a step for
  each output, which are a quarter of the bytes. What they are multiplied with then has eight bits too, as have the keys
  and values that are kept; what layers add up in, attention and the logits stay in 32 bits.
- Which keys a token sees is looked up, and a layer's keys lie in a buffer that attention reads in place.
- Where the machine's products give each row the same bits whoever is beside it (`independent_rows`, which is tried out
  when an engine is made), rows need not come in batches of one size: one picture costs one row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.config import check_name
from armchair.errors import RequestError
from armchair.prior.attention import ImageKeys, turn
from armchair.prior.sequence import StreamShape, text_input_ids
from armchair.prior.transformer import Prior, PromptCache, cell_positions, stream_angles
from armchair.sample.weights import INT8_MOST, DrawingWeights, drawing_weights, in_eight_bits

WEIGHTS = ("fp32", "bf16", "int8")
ATTENTION_ROWS = 8  # whose keys and values are written out in 32 bits together

Product = Callable[[Tensor], Tensor]  # (R, in) -> (R, out), float32


@functools.cache
def exact_products() -> bool:
    """Whether `torch._int_mm` adds up exactly here, tried at the ends of the range.

    Processors from before VNNI take one factor without a sign, and may add pairs of products in 16 bits, which do not
    hold them.
    """
    ends = torch.tensor([-INT8_MOST, INT8_MOST], dtype=torch.int8)
    g = torch.Generator().manual_seed(0)
    x, w = (ends[torch.randint(2, (rows, 256), generator=g)] for rows in (8, 64))
    x[0], w[0], w[1] = INT8_MOST, INT8_MOST, -INT8_MOST
    exact = x.long() @ w.long().T
    ways = (torch._int_mm(x, w.T), torch._int_mm(x, w.T.contiguous()), torch._int_mm(x[:1], w.T).expand(8, -1))
    return all(torch.equal(way[:1].long(), exact[:1]) for way in ways) and torch.equal(ways[1].long(), exact)


def default_weights() -> str:
    """`int8` where its products are exact, else `fp32`."""
    return "int8" if exact_products() else "fp32"


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
        self.step, self.bias = step, bias
        self.turned = self.codes.T  # (in, out), as it lies: the quickest for one row
        self.columns: Tensor | None = None  # the same laid anew, which is read once for several rows

    def __call__(self, x: Tensor) -> Tensor:
        small, step = in_eight_bits(x)
        if self.narrow:
            small = F.pad(small, (0, 1))
        if len(x) == 1:
            sums = torch._int_mm(small, self.turned)
        else:
            if self.columns is None:
                self.columns = self.codes.T.contiguous()
            sums = torch._int_mm(small, self.columns)
        return torch.addcmul(self.bias, sums * step, self.step)


class Layer(NamedTuple):
    """One block, packed. Norms are (gain, bias)."""

    attention_norm: tuple[Tensor, Tensor]
    qkv: Product
    out: Product
    mlp_norm: tuple[Tensor, Tensor]
    mlp_in: Product
    mlp_out: Product


class Engine:
    """A prior ready to draw on a CPU, from one in 32 bits or from weights that may have eight.

    Raises RequestError for `weights` that are none of WEIGHTS, and for `int8` where a processor cannot do it.
    """

    def __init__(self, prior: Prior | DrawingWeights, weights: str = "fp32"):
        check_name("weights", weights, WEIGHTS)
        if weights == "int8" and not exact_products():
            raise RequestError("weights 'int8': this processor does not add up eight-bit products exactly; take fp32")
        source = drawing_weights(prior) if isinstance(prior, Prior) else prior
        tensors = source.tensors
        self.shape: StreamShape = source.shape
        self.config, self.weights = source.config, weights

        def packed(name: str) -> Product:
            return pack(tensors[f"{name}.weight"], tensors[f"{name}.bias"], weights, tensors.get(f"{name}.step"))

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()

        self.layers = [
            Layer(
                norm(f"blocks.{i}.attention_norm"),
                packed(f"blocks.{i}.attention.qkv"),
                packed(f"blocks.{i}.attention.out"),
                norm(f"blocks.{i}.mlp_norm"),
                packed(f"blocks.{i}.mlp_in"),
                packed(f"blocks.{i}.mlp_out"),
            )
            for i in range(self.config.n_layer)
        ]
        self.norm, self.head = norm("norm"), packed("image_head")
        # Tables may have 16 bits, and lie in a mapped file: of what is looked up, the sum with its position has 32.
        self.text_embedding, self.code_embedding = tensors["text_embedding.weight"], tensors["image_embedding.weight"]
        self.text_position = tensors["text_position.weight"].float()
        rows, columns = (tensors[f"{name}_embedding.weight"].float() for name in ("row", "column"))
        self.positions = cell_positions(rows, columns)  # (N, D)
        self.query_angles: Tensor | None = None
        self.key_angles: Tensor | None = None
        if self.config.rotary:
            size = self.config.d_model // self.config.n_head
            self.query_angles, self.key_angles = stream_angles(self.shape, size)
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
            q, k, v = self._heads(layer, x).view(rows, length, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
            keys.append(k)
            values.append(v)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)  # (B, H, T+1, E)
            x = self._after_attention(layer, x, a.transpose(1, 2).reshape(rows * length, width))
        return PromptCache(keys, values, self._logits(x.view(rows, length, width)[:, -1]))

    def start(self, prompts: PromptCache) -> "Cache":
        """A cache for drawing the rows of `prompts` together."""
        return Cache(prompts, self.stores, eight_bits=self.weights == "int8")

    def decode_step(self, tokens: Tensor, j: int, cache: "Cache") -> Tensor:
        """Image token j of each row, (R,) -> logits of token j+1, (R, K) float32. 0 <= j < N-1."""
        x = F.embedding(tokens, self.code_embedding) + self.positions[j]
        place = self.shape.text_length + 1 + j
        for i, (layer, pattern, store) in enumerate(zip(self.layers, self.config.patterns, self.stores, strict=True)):
            heads = self._heads(layer, x)
            q, kept = heads[:, 0], heads[:, 1:]
            if self.query_angles is not None and self.key_angles is not None:
                q = turn(q[:, :, None], self.query_angles[place, None])[:, :, 0]
                k = turn(kept[:, 0, :, None], self.key_angles[place, None])[:, :, 0]
                kept = torch.stack([k, kept[:, 1]], 1)
            cache.put(i, store.slot(j), kept)
            x = self._after_attention(layer, x, cache.attend(i, q, self.seen[pattern][j]))
        return self._logits(x)

    # The parts of a block, on rows (R, D).

    def _heads(self, layer: Layer, x: Tensor) -> Tensor:
        """Queries (scaled), keys and values, (R, 3, H, E)."""
        h = F.layer_norm(x, x.shape[1:], *layer.attention_norm)
        return layer.qkv(h).view(len(x), 3, self.config.n_head, -1)

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.out(attended)
        h = F.layer_norm(x, x.shape[1:], *layer.mlp_norm)
        return x + layer.mlp_out(F.gelu(layer.mlp_in(h)))

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(x, x.shape[1:], *self.norm))

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
    """Keys and values of text and image tokens, a buffer a layer: (2, R, H, T+1+size, E), text first.

    In eight bits each key and value of a head has a step of its own, (2, R, H, T+1+size).
    """

    def __init__(self, prompts: PromptCache, stores: list[ImageKeys], eight_bits: bool):
        rows, heads, self.text_slots, size = prompts.keys[0].shape
        self.kept: list[Tensor] = []
        self.steps: list[Tensor] = []
        for k, v, store in zip(prompts.keys, prompts.values, stores, strict=True):
            text = torch.stack([k, v])
            if eight_bits:
                text, step = in_eight_bits(text)
                self.steps.append(F.pad(step[..., 0], (0, store.size)))
            self.kept.append(F.pad(text, (0, 0, 0, store.size)))
        # The same memory by rows and heads together, as the products have it.
        self.flat_kept = [kept.flatten(1, 2) for kept in self.kept]
        self.flat_steps = [step.flatten(1, 2)[:, :, None] for step in self.steps]
        most = self.text_slots + max(store.size for store in stores)
        block = min(rows, ATTENTION_ROWS) * heads
        self.scratch = torch.empty(block * most * size if eight_bits else 0)

    def put(self, layer: int, slot: int, kept: Tensor) -> None:
        """Keep a key and a value of each row, (R, 2, H, E), in an image slot."""
        slot += self.text_slots
        if self.steps:
            kept, step = in_eight_bits(kept)
            self.steps[layer][..., slot] = step[..., 0].transpose(0, 1)
        self.kept[layer][..., slot, :] = kept.transpose(0, 1)

    def attend(self, layer: int, q: Tensor, visible: int | Tensor) -> Tensor:
        """One scaled query a row, (R, H, E), over so many slots from the first on, or those given -> (R, H E).

        By blocks of rows whose keys and values, written out in 32 bits, stay in the processor's cache.
        """
        rows, heads, size = q.shape
        seen = slice(visible) if isinstance(visible, int) else visible
        q = q.reshape(rows * heads, 1, size)
        out = []
        for start in range(0, len(q), ATTENTION_ROWS * heads):
            block = slice(start, start + ATTENTION_ROWS * heads)
            keys, values = self.flat_kept[layer][:, block, seen].unbind()
            scores = torch.bmm(q[block], self._written_out(keys).transpose(1, 2))  # (R H, 1, M)
            if self.steps:
                key_steps, value_steps = self.flat_steps[layer][:, block, :, seen].unbind()
                shares = scores.mul_(key_steps).softmax(-1).mul_(value_steps)
            else:
                shares = scores.softmax(-1)
            out.append(torch.bmm(shares, self._written_out(values)))
        return (out[0] if len(out) == 1 else torch.cat(out)).view(rows, heads * size)

    def _written_out(self, kept: Tensor) -> Tensor:
        """Keys or values of a block, (R H, M, E), in 32 bits, until the next are written out."""
        return self.scratch[: kept.numel()].view(kept.shape).copy_(kept) if self.steps else kept


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
