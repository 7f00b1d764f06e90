"""The prior: a decoder-only transformer over text and image tokens as one stream (paper, section 2.2).

Legend: B batch (rows), T text length, N image tokens, L = T + N, V text vocabulary, K codebook, D width,
H heads, E = D / H.

Initialisation and step size (`parameter_groups` in `armchair.train.optim` reads `is_hidden_matrix`):

    embeddings                    normal, std 0.1          step size as the recipe says
    hidden matrices               normal, std 1/sqrt(fan_in)   step size x 256 / D
    projections back to the stream, heads    zero          x 256 / D (heads too)
    gains one, biases zero                                 as the recipe says
    vectors of codes, with `code_features`                 x 0.1
    one table of codes, with `tied`      normal, std 0.02  as the recipe says; as a head it counts 256 / D times

where 256 in a step size is the recipe's `lr_width`;

so that at every width the first logits are zero (with `tied`, small), every block starts as the identity, and one
update moves each activation by about the same amount: a step size found at 2 M parameters holds at 200 M (Yang et al.,
"Tensor Programs V", 2022).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armchair.attention import attend, attention_shares
from armchair.config import check_name
from armchair.errors import RequestError
from armchair.prior.attention import (
    ImageKeys,
    check_pattern,
    quicker_blocks,
    rotary_angles,
    stream_mask,
    turn,
)
from armchair.prior.sequence import Head, StreamShape, text_input_ids

BASE_WIDTH = 256  # the width at which a recipe's step size is stated, where it says no other
NORM_EPSILON = 1e-5  # of every norm, as PyTorch's LayerNorm has it
NORMS = ("layer", "rms")


def swiglu(x: Tensor) -> Tensor:
    """(..., 2H) -> (..., H): the second half, let through as the first says (Shazeer, "GLU Variants", 2020)."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


MLPS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "swiglu": swiglu}


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Sizes and parts of the transformer; the defaults are the 12-billion-parameter model of the paper."""

    kind: str = "transformer"
    d_model: int = 3968
    n_layer: int = 64
    n_head: int = 62
    attention: tuple[str, ...] = ("row", "column", "row", "row")  # repeated over the layers
    last_attention: str | None = "convolutional"  # the last layer's pattern, where it differs
    code_features: int = 0  # hidden units of `CodeVectors`; 0: a code has only the vectors it learns for itself (paper)
    text_conv: int = 0  # words that a word has in its own vector, itself among them (`with_words_before`); paper: none
    rotary: bool = False  # whether queries and keys turn by row and column; paper: no
    rotary_share: float = 1.0  # of a head that turns
    norm: str = "layer"  # or "rms": by the root mean square alone, nothing subtracted and no bias
    mlp: str = "gelu"  # or "swiglu": hidden units gated by others, as many of both as make the parameters the same
    qk_norm: bool = False  # whether the queries and the keys of a head are normalised; paper: no
    tied: bool = False  # whether codes come in and go out by one table; paper: not stated

    def __post_init__(self) -> None:
        for name, valid in (("kind", ("transformer",)), ("norm", NORMS), ("mlp", MLPS)):
            check_name(name, getattr(self, name), valid)
        for name, least in (("d_model", 1), ("n_layer", 1), ("n_head", 1), ("code_features", 0), ("text_conv", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.text_conv == 1:
            raise RequestError("text_conv: 1 is the word alone; take 0 for none, or at least 2")
        if self.d_model % self.n_head:
            raise RequestError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if self.rotary and self.d_model // self.n_head % 4:
            size = self.d_model // self.n_head
            raise RequestError(f"rotary: heads of {size} (d_model / n_head) cannot be shared by two axes; take 4, 8, …")
        if self.tied and self.code_features:
            raise RequestError("tied: code_features makes vectors for codes that come in and others for those that go "
                               "out; take one of the two")  # fmt: skip
        if not 0 < self.rotary_share <= 1:
            raise RequestError(f"rotary_share: expected more than 0 and at most 1, got {self.rotary_share}")
        if not self.attention:
            raise RequestError("attention: expected at least one pattern")
        for pattern in self.patterns:
            check_pattern(pattern)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The attention pattern of each layer. Layer i = 1.. is column where (i - 2) mod 4 = 0 by default."""
        p = [self.attention[i % len(self.attention)] for i in range(self.n_layer)]
        if self.last_attention is not None:
            p[-1] = self.last_attention
        return tuple(p)

    @property
    def full(self) -> bool:
        """Whether every layer sees all codes before it, so that some can be left out (`armchair.prior.thinning`)."""
        return set(self.patterns) == {"full"}

    def folded(self) -> "PriorConfig":
        """That of the model with its codes' vectors written out (`Prior.folded`)."""
        return replace(self, code_features=0, tied=False)

    @property
    def hidden(self) -> int:
        """Units that a block's second half has between its matrices: 4 D; with three matrices 8/3 D, by eights."""
        return 4 * self.d_model if self.mlp == "gelu" else 8 * max(1, round(self.d_model / 3))

    @property
    def hidden_inputs(self) -> int:
        """What the first of those matrices gives: the units, and with `swiglu` their gates before them."""
        return self.hidden if self.mlp == "gelu" else 2 * self.hidden


def rms_norm(size: int) -> nn.Module:
    """Numbers over their root mean square, times a gain (Zhang and Sennrich, 2019)."""
    return nn.RMSNorm(size, eps=NORM_EPSILON)


def stream_norm(config: PriorConfig) -> nn.Module:
    """What a block does to the stream before it looks at it."""
    return nn.LayerNorm(config.d_model, eps=NORM_EPSILON) if config.norm == "layer" else rms_norm(config.d_model)


class Attention(nn.Module):
    def __init__(self, config: PriorConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm:  # a gain is shared by the heads
            self.query_norm, self.key_norm = (rms_norm(config.d_model // config.n_head) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries, keys, values, each (B, H, T, E)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            # In 32 bits, as all norms are; what they are multiplied with may have 16.
            q, k = self.query_norm(q.float()).to(v.dtype), self.key_norm(k.float()).to(v.dtype)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))  # (B, H, T, E) -> (B, T, D)


class Block(nn.Module):
    """Pre-norm residual block; attention itself is called from the model, which knows the masks and the cache."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.attention_norm = stream_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = stream_norm(config)
        self.mlp_in = nn.Linear(config.d_model, config.hidden_inputs)
        self.activation = MLPS[config.mlp]
        self.mlp_out = nn.Linear(config.hidden, config.d_model)

    def mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x))))


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """What training leaves out or blurs, drawn from `generator`; the paper has none, its pictures being 250 million.

    features: share of what a block adds to the stream, the rest being scaled up (Srivastava et al., 2014).
    codes: share of codes that the others do not get to see (their positions they do), so that more is left to be said
    by the caption (word dropout; Bowman et al., "Generating Sentences from a Continuous Space", 2016).
    noise: share of codes that the others see as another that looks like it, drawn from `lookalikes` (K, n), so that a
    picture may go on from codes that are nearly right, as drawn ones are (for tokens what conditioning augmentation is
    for pixels; Ho et al., "Cascaded Diffusion Models", 2021).
    """

    features: float
    codes: float
    generator: torch.Generator
    noise: float = 0.0
    lookalikes: Tensor | None = None

    def of_tokens(self, codes: Tensor) -> Tensor:
        """codes: (B, N) as the others see them."""
        if not self.noise or self.lookalikes is None:
            return codes
        options = {"generator": self.generator, "device": codes.device}
        blurred = torch.rand(codes.shape, **options) < self.noise  # type: ignore[call-overload]
        which = torch.randint(self.lookalikes.shape[1], codes.shape, **options)  # type: ignore[call-overload]
        return torch.where(blurred, self.lookalikes[codes, which], codes)

    def of_features(self, x: Tensor) -> Tensor:
        if not self.features:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.features, generator=self.generator)
        return x * keep / (1 - self.features)

    def of_codes(self, x: Tensor) -> Tensor:
        """x: (B, N, D), a code a position."""
        if not self.codes:
            return x
        seen = torch.rand(x.shape[:2], generator=self.generator, device=x.device) >= self.codes
        return x * seen[..., None]


def lookalikes(codebook: Tensor, count: int) -> Tensor:
    """(K, C), the image tokenizer's vectors of its codes -> (K, count): the codes whose vectors are nearest."""
    vectors = codebook.detach().float()
    distances = torch.cdist(vectors, vectors).fill_diagonal_(torch.inf)
    return distances.topk(min(count, len(vectors) - 1), largest=False).indices


class CodeVectors(nn.Module):
    """Vectors for the codes, (K, D), computed from those that the image tokenizer has for them, (K, C).

    Codes that look alike get vectors that are alike, so what is learned of one holds for its neighbours: a code that
    was never seen after these words is likely where one that looks like it would be. Vectors that each code learns for
    itself alone start out knowing nothing of that.
    """

    def __init__(self, codebook: Tensor, hidden: int, width: int):
        super().__init__()
        centred = codebook.detach().float() - codebook.detach().float().mean(0)
        self.register_buffer("codebook", centred / (centred.std() + 1e-8), persistent=False)
        self.hidden = nn.Linear(codebook.shape[1], hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        return self.out(F.gelu(self.hidden(self.codebook)))


def stream_angles(shape: StreamShape, config: PriorConfig) -> tuple[Tensor, Tensor]:
    """How far heads turn at each position: queries and keys, (L, E / 2) each.

    A query stands where the code that it helps to predict will be, a key where its own code is; in the text, and at the
    first code, nothing turns. Position T + j predicts code j and holds code j - 1.
    """
    angles = rotary_angles(shape.grid, config.d_model // config.n_head, config.rotary_share)
    t = shape.text_length
    return F.pad(angles, (0, 0, t, 0)), F.pad(angles[:-1], (0, 0, t + 1, 0))


def with_words_before(x: Tensor, gains: Tensor) -> Tensor:
    """Captions' vectors, (B, T+1, D), each plus those of the words before it times gains (W-1, D), the nearest's first.

    A causal depthwise convolution whose tap at the word itself is one. Which words belong together stands side by side
    in a caption; with this, attention can ask for "what follows red" in one layer, where it otherwise takes two that
    have to find each other (as keys with some of the key before do: Olsson et al., "In-context Learning and Induction
    Heads", 2022, "smeared keys"; in every layer: So et al., "Primer", 2021).
    """
    found = x.clone()
    for back, gain in enumerate(gains, 1):
        found[:, back:] += gain * x[:, :-back]
    return found


def cell_positions(rows: Tensor, columns: Tensor) -> Tensor:
    """The embeddings of rows and of columns, (S, D) each -> those of the codes, (N, D)."""
    return (rows[:, None] + columns[None]).flatten(0, 1)


class PromptCache:
    """What the layers remember of captions, (B, H, T+1, E) keys and values a layer, and the logits after them."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], logits: Tensor):
        self.keys, self.values, self.logits = keys, values, logits

    def rows(self, index: Tensor) -> "PromptCache":
        """The same for rows picked by index: one caption's state is shared by all of its candidates."""
        return PromptCache([k[index] for k in self.keys], [v[index] for v in self.values], self.logits[index])


class DrawingCache:
    """Keys and values of the text and of the image tokens drawn so far, for rows that are drawn together."""

    def __init__(self, prompts: PromptCache, stores: list[ImageKeys]):
        self.stores = stores
        self.text_slots = prompts.keys[0].shape[2]
        self.keys, self.values = [], []
        for store, k, v in zip(stores, prompts.keys, prompts.values, strict=True):
            room = (0, 0, 0, store.size)  # one buffer a layer: text first, then the image slots
            self.keys.append(F.pad(k, room))
            self.values.append(F.pad(v, room))

    def append(self, layer: int, j: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store image token j's key and value (B, H, 1, E); give back all that it sees, (B, H, M, E)."""
        store, t = self.stores[layer], self.text_slots
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, t + store.slot(j)] = k[:, :, 0]
        values[:, :, t + store.slot(j)] = v[:, :, 0]
        visible = store.visible(j)
        if isinstance(visible, slice) and visible.start == 0:
            return keys[:, :, : t + visible.stop], values[:, :, : t + visible.stop]
        if isinstance(visible, slice):
            visible = torch.arange(visible.start, visible.stop)
        seen = torch.cat([torch.arange(t), t + visible]).to(keys.device)
        return keys[:, :, seen], values[:, :, seen]


class Prior(nn.Module):
    """codebook: (K, C), the image tokenizer's `code_vectors`; needed where the config asks for `code_features`."""

    def __init__(self, config: PriorConfig, shape: StreamShape, codebook: Tensor | None = None):
        super().__init__()
        self.config, self.shape = config, shape
        d = config.d_model
        self.text_embedding = nn.Embedding(shape.text_vocab_size + shape.text_length + 1, d)
        self.text_position = nn.Embedding(shape.text_length + 1, d)
        self.image_embedding = nn.Embedding(shape.codebook_size, d)
        self.row_embedding = nn.Embedding(shape.grid, d)
        self.column_embedding = nn.Embedding(shape.grid, d)
        layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.blocks: Sequence[Block] = layers  # type: ignore[assignment]
        self.norm = stream_norm(config)
        self.text_head = nn.Linear(d, shape.text_vocab_size + 1)
        self.image_head = nn.Linear(d, shape.codebook_size)
        self.code_inputs: CodeVectors | None = None
        self.code_outputs: CodeVectors | None = None
        if config.code_features:
            if codebook is None or len(codebook) != shape.codebook_size:
                raise RequestError("code_features: the image tokenizer has no vector for each of its codes")
            self.code_inputs = CodeVectors(codebook, config.code_features, d)
            self.code_outputs = CodeVectors(codebook, config.code_features, d)
        if config.text_conv:
            self.text_conv = nn.Parameter(torch.empty(config.text_conv - 1, d))
        self.query_angles: Tensor
        self.key_angles: Tensor
        if config.rotary:
            query_angles, key_angles = stream_angles(shape, config)
            self.register_buffer("query_angles", query_angles, persistent=False)
            self.register_buffer("key_angles", key_angles, persistent=False)
        for pattern in set(config.patterns):
            mask = stream_mask(pattern, shape.text_length, shape.grid)
            self.register_buffer(f"mask_{pattern}", mask, persistent=False)
        # For training on a CPU alone, so no buffers: they stay there.
        self.sparse = {p: quicker_blocks(p, shape.text_length, shape.grid) for p in set(config.patterns)}
        self._initialise()
        if config.tied:
            self.image_head.weight = None  # type: ignore[assignment]  # see `_output_table`

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp_out.weight)
        nn.init.zeros_(self.text_head.weight)
        nn.init.zeros_(self.image_head.weight)
        if self.config.text_conv:
            nn.init.normal_(self.text_conv, std=0.5)  # by channel, so that which word came when is told from the first
        if self.config.tied:
            nn.init.normal_(self.image_embedding.weight, std=0.02)  # as a head it should say little at first
        if self.code_inputs is None or self.code_outputs is None:
            return
        nn.init.normal_(self.image_embedding.weight, std=0.02)  # what a code has for itself starts small
        for vectors, std in ((self.code_inputs, 0.15), (self.code_outputs, 0.0)):
            # Hidden units that bend at different places, each over a part of the codes.
            nn.init.normal_(vectors.hidden.weight, std=1.5 / math.sqrt(vectors.hidden.in_features))
            nn.init.uniform_(vectors.hidden.bias, -1.0, 1.0)
            nn.init.normal_(vectors.out.weight, std=std / math.sqrt(vectors.out.in_features))

    def is_hidden_matrix(self, name: str) -> bool:
        """Whether the named parameter's step size shrinks with the width, and whether weight decay applies."""
        return name.endswith("weight") and "norm" not in name and "embedding" not in name and "position" not in name

    def matrices_in(self, name: str) -> int:
        """How many matrices the named weight of a block is, one above the other: each does something else."""
        stacked = {"qkv.weight": 3, "mlp_in.weight": 1 if self.config.mlp == "gelu" else 2}
        return next((count for end, count in stacked.items() if name.endswith(end)), 1)

    # Training: the whole stream at once.

    def forward(
        self,
        text_tokens: Tensor,
        codes: Tensor,
        dropout: Dropout | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """text_tokens (B, T) with pads, codes (B, N) -> text logits (B, T, V+1), image logits (B, N, K).

        `watch` is told, layer after layer, how much each position attends to which: shares (B, H, L, L) that sum to 1
        over the last, zero where nothing is seen. Position T + j predicts code j.
        """
        t, x = self.shape.text_length, self.states(text_tokens, codes, dropout, watch)
        text, image = self.heads()
        return F.linear(x[:, :t], *text), F.linear(x[:, t:], *image)

    def heads(self) -> tuple[Head, Head]:
        """What makes logits of `states`: of the first T positions, and of the others."""
        text = Head(self.text_head.weight, self.text_head.bias)
        return text, Head(self._output_table(), self.image_head.bias)

    def states(
        self,
        text_tokens: Tensor,
        codes: Tensor,
        dropout: Dropout | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """What the heads are given, (B, L, D), as in `forward`. A loss of them need not hold all logits at once.

        places: (B, M) ascending, the image tokens to predict, where that is not all of them: (B, T + M, D). Of the
        codes those before these are seen, by layers of full attention.
        """
        seen = codes[:, :-1]
        tokens = seen if dropout is None else dropout.of_tokens(seen)
        image = F.embedding(tokens, self._input_table())
        if dropout is not None:
            image = dropout.of_codes(image)
        image = image + self._positions()[: codes.shape[1] - 1]
        x = torch.cat([self._embed_text(text_tokens), image], dim=1)  # (B, L, D)
        angles = (self.query_angles, self.key_angles) if self.config.rotary else None
        if places is not None:
            if not self.config.full:
                raise RequestError("places: some codes can be left out where all layers have full attention alone")
            t = self.shape.text_length
            kept = torch.cat([torch.arange(t, device=x.device).expand(len(x), t), t + places], 1)  # (B, T + M)
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
            angles = None if angles is None else (angles[0][kept][:, None], angles[1][kept][:, None])
        for layer, (block, pattern) in enumerate(zip(self.blocks, self.config.patterns, strict=True)):
            # A part of the stream sees what the same number of positions at its start do, where attention is full.
            mask = getattr(self, f"mask_{pattern}")[: x.shape[1], : x.shape[1]]
            q, k, v = block.attention.heads(block.attention_norm(x))
            if angles is not None:
                q, k = (turn(heads, by) for heads, by in zip((q, k), angles, strict=True))
            if watch is not None:
                watch(layer, attention_shares(q, k, mask))
            a = block.attention.merge(attend(q, k, v, mask, sparse=self.sparse[pattern]))
            x = x + (a if dropout is None else dropout.of_features(a))
            m = block.mlp(x)
            x = x + (m if dropout is None else dropout.of_features(m))
        return self.norm(x)

    def _input_table(self) -> Tensor:
        """The vectors that image tokens come in as, (K, D)."""
        inputs = self.image_embedding.weight
        return inputs if self.code_inputs is None else inputs + self.code_inputs()

    def _output_table(self) -> Tensor:
        """The vectors that the logits of image tokens are products with, (K, D)."""
        if self.config.tied:  # the scale makes an update move the logits alike at every width
            return self.image_embedding.weight * (BASE_WIDTH / self.config.d_model)
        outputs = self.image_head.weight
        return outputs if self.code_outputs is None else outputs + self.code_outputs()

    def folded(self) -> "Prior":
        """The same model with its codes' vectors written out, in and out, which is what draws; itself where they are.

        It has the other weights in common with this one.
        """
        if not (self.config.code_features or self.config.tied):
            return self
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.parameters()}
        plain = copy.deepcopy(self, {**shared, **{id(b): b for b in self.buffers()}})
        with torch.no_grad():
            inputs, outputs = self._input_table(), self._output_table()
        plain.image_embedding.weight = nn.Parameter(inputs, requires_grad=False)
        plain.image_head.weight = nn.Parameter(outputs, requires_grad=False)
        plain.code_inputs = plain.code_outputs = None
        plain.config = self.config.folded()
        return plain

    # Drawing: the caption once, then token by token.

    independent_rows = False  # products of 32-bit weights are done otherwise for one row than for several
    independent_threads = False

    @property
    def device(self) -> torch.device:
        return self.image_embedding.weight.device

    def prefill(self, text_tokens: Tensor) -> PromptCache:
        """Read captions (B, T); `logits` (B, K) are those of the first image token. Needs a `folded` model."""
        assert self.config == self.config.folded()
        x = self._embed_text(text_tokens)
        keys, values = [], []
        for block in self.blocks:
            q, k, v = block.attention.heads(block.attention_norm(x))
            keys.append(k)
            values.append(v)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attention.merge(a)
            x = x + block.mlp(x)
        return PromptCache(keys, values, self.image_head(self.norm(x[:, -1])).float())

    def start(self, prompts: PromptCache, ahead: bool = False) -> DrawingCache:
        """A cache for drawing the rows of `prompts` together; with `ahead` it can be gone back in (`decode_steps`)."""
        return DrawingCache(prompts, [ImageKeys(p, self.shape.grid, everything=ahead) for p in self.config.patterns])

    def decode_step(self, tokens: Tensor, j: int, cache: DrawingCache) -> Tensor:
        """Image token j of each row, (B,) -> logits of token j+1, (B, K) float32. 0 <= j < N-1."""
        row, column = divmod(j, self.shape.grid)
        x = self.image_embedding(tokens) + self.row_embedding.weight[row] + self.column_embedding.weight[column]
        x = x[:, None]  # (B, 1, D)
        for layer, block in enumerate(self.blocks):
            q, k, v = block.attention.heads(block.attention_norm(x))
            if self.config.rotary:
                t = self.shape.text_length + 1 + j
                q, k = turn(q, self.query_angles[t, None]), turn(k, self.key_angles[t, None])
            k, v = cache.append(layer, j, k, v)
            x = x + block.attention.merge(F.scaled_dot_product_attention(q, k, v))
            x = x + block.mlp(x)
        return self.image_head(self.norm(x[:, 0])).float()

    def decode_steps(self, tokens: Tensor, j: int, cache: DrawingCache) -> Tensor:
        """Image tokens j to j+C-1 of each row, (B, C) -> logits of tokens j+1 to j+C, (B, C, K) float32.

        For C > 1 the cache is one to go back in: tokens may be given again, others than before.
        """
        return torch.stack([self.decode_step(column, j + c, cache) for c, column in enumerate(tokens.T)], 1)

    def decode_together(self, steps: Sequence[tuple[Tensor, int, DrawingCache]]) -> list[Tensor]:
        """`decode_steps` of several caches, one after the other, as the products of one would differ beside others."""
        return [self.decode_steps(*step) for step in steps]

    def _embed_text(self, text_tokens: Tensor) -> Tensor:
        words = self.text_embedding(text_input_ids(text_tokens, self.shape)) + self.text_position.weight
        return with_words_before(words, self.text_conv) if self.config.text_conv else words

    def _positions(self) -> Tensor:
        """(N, D)"""
        return cell_positions(self.row_embedding.weight, self.column_embedding.weight)
