"""The prior for drawing on a CUDA GPU: a step whose shapes and addresses never change, recorded once and replayed.

Legend: R rows, T text length, N image tokens, D width, H heads, E = D / H, K codebook, M slots of keys a layer.

A step of one token is some hundred small kernels, which a GPU is done with sooner than Python has asked for the next.
So a step reads its tokens and its place from tensors, keeps keys and values in buffers of fixed size by a table of
places, attends to all of a buffer under a mask out of another table, and writes its logits to where they always lie.
That can be recorded as one CUDA graph for each number of rows, which the GPU then runs by itself, token after token,
without anything to wait for or to allocate.

`Prior.decode_step` is the literal version, and tests hold the step to it; they run it as it is, without a graph, on a
CPU too. The blocks are the prior's own: with `bf16` their matrices have 16 bits, and so have keys and values; what
layers add up in, norms and logits have 32, and pictures are not drawn with float16, whose range is too small for that.
"""

import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.config import check_name
from armchair.prior.attention import turned
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior, PromptCache, cell_positions
from armchair.runtime import has_fast_bfloat16
from armchair.sample.engine import Places

log = logging.getLogger(__name__)

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the form of the weights
WARM_UPS = 3  # steps before the one that is recorded, in which libraries set up what they need
ALIGNED = 16  # slots come by so many: attention reads a mask of such a length without making a copy of it
RECORDING = threading.Lock()  # PyTorch allows one recording at a time in a process, whatever engine it is of

Step = Callable[[], None]


def default_cuda_weights(device: torch.device) -> str:
    """`bf16` on a GPU that has it, else `fp32`."""
    return "bf16" if has_fast_bfloat16(device) else "fp32"


class Product(nn.Module):
    """A linear map with 16-bit weights: whatever comes in is rounded to bfloat16, and so is what goes out."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in (linear.weight, linear.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias)


def with_products(prior: Prior) -> Prior:
    """The same folded prior with all that drawing multiplies with as a `Product`; the rest it shares."""
    model = copy.deepcopy(prior, {id(tensor): tensor for tensor in (*prior.parameters(), *prior.buffers())})
    places: list[tuple[nn.Module, str]] = [(model, "image_head")]
    for block in model.blocks:
        places += [(block.attention, "qkv"), (block.attention, "out"), (block, "mlp_in"), (block, "mlp_out")]
    for parent, name in places:
        setattr(parent, name, Product(getattr(parent, name)))
    return model


class Tables:
    """By place of the picture, what each pattern's layers do: the slot a key goes to, and the mask of what is seen."""

    def __init__(self, model: Prior, everything: bool, dtype: torch.dtype):
        patterns, device = model.config.patterns, model.device
        places = Places(patterns, model.shape, everything)
        self.room: dict[str, int] = {}  # M, the text's slots among them
        self.slots: dict[str, Tensor] = {}  # (N,)
        self.masks: dict[str, Tensor] = {}  # (N, M), to be added to scores
        for pattern, size, slots, seen in zip(patterns, places.sizes, places.slots, places.seen, strict=True):
            if pattern in self.room:
                continue
            self.room[pattern] = -(-(model.shape.text_length + 1 + size) // ALIGNED) * ALIGNED
            mask = torch.full((len(seen), self.room[pattern]), -torch.inf)
            for j, visible in enumerate(seen):
                mask[j, visible] = 0.0
            self.slots[pattern] = torch.tensor(slots, device=device)
            self.masks[pattern] = mask.to(device, dtype)


@dataclass(eq=False)
class Buffers:
    """All that a step of R rows reads and writes. Made once, then used by one drawing after the other."""

    tables: Tables
    keys: list[Tensor]  # a layer, (R, H, M, E): text first, then image tokens
    values: list[Tensor]
    tokens: Tensor  # (R,) int64
    place: Tensor  # (1,) int64, which image token they are
    logits: Tensor  # (R, K) float32, of the token after it
    run: Step = lambda: None

    def begin(self, prompts: PromptCache) -> None:
        """Hold these captions, and no picture."""
        kept = zip((*self.keys, *self.values), (*prompts.keys, *prompts.values), strict=True)
        for buffer, text in kept:
            # A slot that is masked counts nothing, unless what an earlier picture left there is not finite.
            buffer.zero_()[:, :, : text.shape[2]] = text


class Drawing:
    """What `start` gives: the use of buffers, which are free for the next drawing when this is no more."""

    def __init__(self, buffers: Buffers, free: list[Buffers]):
        self.buffers = buffers
        weakref.finalize(self, free.append, buffers).atexit = False


def recorded(step: Step, device: torch.device) -> Step:
    """What runs a step again with one call, on the same tensors: a CUDA graph of it."""
    with RECORDING, torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        # Other threads, which may serve other models, go on allocating meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay


def as_it_is(step: Step, device: torch.device) -> Step:
    """In the place of `recorded`, where there are no graphs."""
    return step


class CudaEngine:
    """A prior ready to draw where it is: on a CUDA GPU by graphs, elsewhere, for tests, step by step.

    Rows are not independent bit for bit, so drawing brings them in batches of one size (`armchair.sample.generate`).
    Raises RequestError for `weights` that are none of TYPES.
    """

    independent_rows = False
    independent_threads = False

    def __init__(self, prior: Prior, weights: str = "bf16"):
        check_name("weights", weights, TYPES)
        self.weights, self.dtype = weights, TYPES[weights]
        prior = prior.folded()
        self.model = prior if weights == "fp32" else with_products(prior)
        self.shape: StreamShape = prior.shape
        self.positions = cell_positions(prior.row_embedding.weight, prior.column_embedding.weight).detach()  # (N, D)
        self.turns: tuple[Tensor, ...] = ()  # of queries and of keys the cosines and the sines, each (N, E / 2)
        if prior.config.rotary:
            first = self.shape.text_length + 1  # the last place is never an input: N - 1 rows, and one to fill up
            angles = (F.pad(a[first:], (0, 0, 0, 1)) for a in (prior.query_angles, prior.key_angles))
            self.turns = tuple(f.to(self.dtype) for a in angles for f in (a.cos(), a.sin()))
        self.free: dict[tuple[int, bool], list[Buffers]] = {}  # by rows, and whether they can be gone back in
        self.tables: dict[bool, Tables] = {}  # by the latter
        self.record = recorded if self.device.type == "cuda" else as_it_is

    # What drawing asks of a decoder, as in `Prior`.

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def prefill(self, text_tokens: Tensor) -> PromptCache:
        """Read captions (B, T); `logits` (B, K) are those of the first image token."""
        return self.model.prefill(text_tokens)

    @torch.inference_mode()
    def start(self, prompts: PromptCache, ahead: bool = False) -> Drawing:
        """For drawing the rows of `prompts` together; with `ahead` it can be gone back in (`decode_steps`).

        Buffers of that many rows are taken, where some are free, or made and recorded.
        """
        rows = len(prompts.logits)
        free = self.free.setdefault((rows, ahead), [])
        try:
            buffers = free.pop()
        except IndexError:
            buffers = self._buffers(rows, ahead)
        buffers.begin(prompts)
        return Drawing(buffers, free)

    @torch.inference_mode()
    def decode_step(self, tokens: Tensor, j: int, cache: Drawing) -> Tensor:
        """Image token j of each row, (R,) -> logits of token j+1, (R, K) float32. 0 <= j < N-1."""
        buffers = cache.buffers
        buffers.tokens.copy_(tokens)
        buffers.place.fill_(j)
        buffers.run()
        return buffers.logits.clone()  # the next step writes there again

    def decode_steps(self, tokens: Tensor, j: int, cache: Drawing) -> Tensor:
        """Image tokens j to j+C-1 of each row, (R, C) -> logits of tokens j+1 to j+C, (R, C, K) float32.

        One after the other. For C > 1 the cache is one to go back in: tokens may be given again, others than before.
        """
        return torch.stack([self.decode_step(column, j + c, cache) for c, column in enumerate(tokens.T)], 1)

    def decode_together(self, steps: Sequence[tuple[Tensor, int, Drawing]]) -> list[Tensor]:
        """`decode_steps` of several caches, one after the other, as the products of one would differ beside others."""
        return [self.decode_steps(*step) for step in steps]

    # What does not change from token to token.

    def _buffers(self, rows: int, ahead: bool) -> Buffers:
        config, device = self.model.config, self.device
        if ahead not in self.tables:
            self.tables[ahead] = Tables(self.model, ahead, self.dtype)
        tables = self.tables[ahead]

        def layers() -> list[Tensor]:
            sizes = [(rows, config.n_head, tables.room[p], config.d_model // config.n_head) for p in config.patterns]
            return [torch.zeros(size, dtype=self.dtype, device=device) for size in sizes]

        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        logits = torch.zeros(rows, self.shape.codebook_size, device=device)
        buffers = Buffers(tables, layers(), layers(), tokens, torch.zeros_like(tokens[:1]), logits)
        step = functools.partial(self._step, buffers)
        try:
            buffers.run = self.record(step, device)
        except RuntimeError as error:  # a driver or a PyTorch that cannot: slower, and the same codes
            log.warning("steps are not recorded as a CUDA graph, so drawing is slower: %s", str(error).splitlines()[0])
            self.record, buffers.run = as_it_is, step
        return buffers

    def _step(self, buffers: Buffers) -> None:
        """`Prior.decode_step` of `tokens` at `place`, to `logits`."""
        model, tables, place = self.model, buffers.tables, buffers.place
        slots = {pattern: table.index_select(0, place) for pattern, table in tables.slots.items()}
        masks = {pattern: table.index_select(0, place)[:, None, None] for pattern, table in tables.masks.items()}
        turns = [table.index_select(0, place) for table in self.turns]
        x = model.image_embedding(buffers.tokens) + self.positions.index_select(0, place)
        x = x[:, None]  # (R, 1, D)
        for layer, (block, pattern) in enumerate(zip(model.blocks, model.config.patterns, strict=True)):
            q, k, v = block.attention.heads(block.attention_norm(x))  # each (R, H, 1, E)
            if turns:
                q, k = turned(q, *turns[:2]), turned(k, *turns[2:])
            keys = buffers.keys[layer].index_copy_(2, slots[pattern], k)
            values = buffers.values[layer].index_copy_(2, slots[pattern], v)
            a = F.scaled_dot_product_attention(q, keys, values, attn_mask=masks[pattern])
            x = x + block.attention.merge(a)
            x = x + block.mlp(x)
        buffers.logits.copy_(model.image_head(model.norm(x[:, 0])))
