"""Drawing codes: captions read once, then token by token, many rows at a time.

Legend: B rows, N image tokens, T text length, M rows drawn together.

Candidate c's token is a function of (weights, caption, settings, its own uniforms) and nothing else: not of how many
are drawn, nor of who shares the batch. A matrix product can differ in its last bits with its number of rows, so what
has no independent rows runs at exactly MICRO_BATCH of them (twice as many with guidance), filled up where there are
fewer; the rows of an `Engine` are independent on most machines, and come as they are, AT_ONCE at most, and one that
comes alone is drawn by several tokens a step (`ahead`). Each caption is read alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from armchair.prior.sequence import StreamShape, null_text
from armchair.prior.transformer import Prior, PromptCache
from armchair.runtime import generator
from armchair.sample.next_token import Settings, guide, pick, plausible, probabilities

MICRO_BATCH = 8
AT_ONCE = 16  # candidates; twice as many rows under guidance. More cost about as much a row, and memory
AHEAD = 8  # codes that a picture which is drawn alone is given at once, all but the first of them guesses
FREE = -1  # in `forced`: a token to draw


class Decoder(Protocol):
    """What gives logits, token after token: a `Prior`, literally, or an `armchair.sample.engine.Engine`, fast."""

    shape: StreamShape

    @property
    def device(self) -> torch.device: ...

    @property
    def independent_rows(self) -> bool:
        """Whether a row's logits are the same bits whatever other rows there are."""

    def prefill(self, text_tokens: Tensor) -> PromptCache: ...

    def start(self, prompts: PromptCache, ahead: bool = False) -> Any: ...

    def decode_step(self, tokens: Tensor, j: int, cache: Any) -> Tensor: ...

    def decode_steps(self, tokens: Tensor, j: int, cache: Any) -> Tensor: ...


def candidate_uniforms(seed: int, candidates: Sequence[int], length: int) -> Tensor:
    """(len(candidates), length) float64 in [0, 1): each candidate's own stream, from (seed, candidate)."""
    rows = [
        torch.rand(length, dtype=torch.float64, generator=generator(seed, "candidate", c)) for c in candidates
    ]
    return torch.stack(rows)


@torch.inference_mode()
def read_prompts(decoder: Decoder, text_tokens: Tensor) -> PromptCache:
    """Read captions (P, T) one at a time, so that a caption's state does not depend on its neighbours."""
    states = [decoder.prefill(row[None]) for row in text_tokens]
    layers = range(len(states[0].keys))
    return PromptCache(
        [torch.cat([s.keys[i] for s in states]) for i in layers],
        [torch.cat([s.values[i] for s in states]) for i in layers],
        torch.cat([s.logits for s in states]),
    )


@torch.inference_mode()
def draw_micro_batch(
    decoder: Decoder,
    prompts: PromptCache,
    null: PromptCache,
    uniforms: Tensor,
    settings: Settings,
    forced: Tensor,
    ahead: int = 1,
) -> Iterator[Tensor]:
    """Draw M rows together; yields the codes (M, N) after each finished row of the grid (undrawn ones are 0).

    `prompts` holds the M rows' captions, `null` one empty caption; uniforms (M, N); forced (M, N) holds codes
    that are given, FREE elsewhere. With `ahead` above 1 the decoder, whose rows have to be independent, is given up to
    so many codes at once: the last that is known, and guesses of those after it. Each code is then picked by its own
    uniform; those that are picked after right guesses are what would have been picked one by one, and the picks after
    them are the next guesses (Jacobi decoding; Santilli et al., 2023; Teng et al., 2024, for pictures).
    """
    rows, length = uniforms.shape
    grid = decoder.shape.grid
    guided = settings.guidance != 1
    if guided:
        empty = null.rows(torch.zeros(rows, dtype=torch.int64))
        both = zip(prompts.keys, empty.keys, strict=True), zip(prompts.values, empty.values, strict=True)
        keys, values = ([torch.cat(pair) for pair in pairs] for pairs in both)
        prompts = PromptCache(keys, values, torch.cat([prompts.logits, empty.logits]))
    cache = decoder.start(prompts, ahead > 1)
    codes = torch.zeros(rows, length, dtype=torch.int64, device=prompts.logits.device)
    logits = prompts.logits[:, None]  # (R, C, K): of C tokens from `known` on
    known, guessed, count = 0, 0, 1
    while True:
        places = slice(known, known + count)
        conditional = logits[:rows].flatten(0, 1)
        step = guide(conditional, logits[rows:].flatten(0, 1), settings.guidance) if guided else conditional
        step = plausible(step, conditional, settings.min_p)
        drawn = pick(probabilities(step, settings), uniforms[:, places].flatten()).unflatten(0, (rows, -1))
        drawn = torch.where(forced[:, places] == FREE, drawn, forced[:, places])
        hits = _hits(drawn, codes[:, places]) if ahead > 1 else 0
        codes[:, places] = drawn
        right = min(hits + 1, count)
        for end in range(known + 1, known + right + 1):
            if end % grid == 0:
                yield codes if ahead == 1 else codes.masked_fill(torch.arange(length) >= end, 0)
        known += right
        if known == length:
            return
        # Where guesses prove wrong, fewer are made, down to none; what would have been guessed may prove right.
        count = min(ahead if hits else max(1, count // 2), length - known)
        for j in range(max(known, guessed), known + count):
            codes[:, j] = codes[:, j - grid if j >= grid else j - 1]  # the code above; in the first row the one before
        guessed = max(guessed, known + count)
        tokens = codes[:, known - 1 : known + count - 1]
        logits = decoder.decode_steps(tokens.repeat(2, 1) if guided else tokens, known - 1, cache)


def _hits(drawn: Tensor, guesses: Tensor) -> int:
    """How many of the codes (M, C) were guessed right in every row, from the first on."""
    wrong = (drawn != guesses).any(0).nonzero()
    return int(wrong[0, 0]) if len(wrong) else drawn.shape[1]


@torch.inference_mode()
def draw_codes(
    decoder: Decoder,
    text_tokens: Tensor,
    rows: Sequence[int],
    uniforms: Tensor,
    settings: Settings,
    forced: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one picture's codes a row: text_tokens (P, T), rows: which caption each is for, uniforms (B, N).

    Gives codes (B, S, S) int64. `forced` (B, N) as in `draw_micro_batch`. `progress` is told how many
    rows are done, and of how many.
    """
    if isinstance(decoder, Prior):
        decoder = decoder.folded()
    device = decoder.device
    prompts = read_prompts(decoder, text_tokens.to(device))
    null = read_prompts(decoder, null_text(1, decoder.shape, device))
    given = torch.full_like(uniforms, FREE, dtype=torch.int64) if forced is None else forced
    size = AT_ONCE if decoder.independent_rows else MICRO_BATCH
    done = []
    for start in range(0, len(rows), size):
        end = min(start + size, len(rows)) if decoder.independent_rows else start + size
        pick_rows = torch.arange(start, end).clamp(max=len(rows) - 1)  # filled up with copies of the last row
        caption = torch.tensor(rows)[pick_rows].to(device)
        stream, kept = uniforms[pick_rows].to(device), given[pick_rows].to(device)
        ahead = AHEAD if len(caption) == 1 else 1
        *_, codes = draw_micro_batch(decoder, prompts.rows(caption), null, stream, settings, kept, ahead)
        done.append(codes[: len(rows) - start])
        if progress is not None:
            progress(min(start + size, len(rows)), len(rows))
    return torch.cat(done).unflatten(1, (decoder.shape.grid, decoder.shape.grid))


@torch.inference_mode()
def draw_codes_uncached(
    prior: Prior, text_tokens: Tensor, uniforms: Tensor, settings: Settings
) -> Tensor:
    """The literal version that `draw_codes` is tested against: the whole stream again for every token.

    text_tokens (B, T), uniforms (B, N) -> codes (B, S, S).
    """
    codes = torch.zeros(uniforms.shape, dtype=torch.int64)
    empty = null_text(len(codes), prior.shape)
    for j in range(codes.shape[1]):
        logits = conditional = prior(text_tokens, codes)[1][:, j].float()
        if settings.guidance != 1:
            logits = guide(conditional, prior(empty, codes)[1][:, j].float(), settings.guidance)
        logits = plausible(logits, conditional, settings.min_p)
        codes[:, j] = pick(probabilities(logits, settings), uniforms[:, j])
    return codes.unflatten(1, (prior.shape.grid, prior.shape.grid))
