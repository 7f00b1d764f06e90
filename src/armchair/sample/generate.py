"""Drawing codes: captions read once, then token by token, many rows at a time.

Legend: B rows, N image tokens, T text length, M rows drawn together.

Candidate c's token is a function of (weights, caption, settings, its own uniforms) and nothing else: not of how many
are drawn, nor of who shares the batch. A matrix product can differ in its last bits with its number of rows, so what
has no independent rows runs at exactly MICRO_BATCH of them (twice as many with guidance), filled up where there are
fewer; the rows of an `Engine` are independent on most machines, and come as they are, AT_ONCE at most, and one that
comes alone is drawn by several tokens a step (`ahead`). Where a decoder's bits do not depend on threads either, each
thread draws a batch of its own. Each caption is read alone.
"""

import bisect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from armchair.prior.sequence import StreamShape, null_text
from armchair.prior.transformer import Prior, PromptCache
from armchair.runtime import generator
from armchair.sample.native import sharing
from armchair.sample.next_token import Settings, guide, pick, plausible, probabilities
from armchair.sample.workers import in_order

MICRO_BATCH = 8
AT_ONCE = 16  # candidates; twice as many rows under guidance. More cost about as much a row, and memory
AHEAD = 8  # codes that a picture which is drawn alone is given at once, all but the first of them guesses
TOGETHER = 1024  # rows that one pass has at most, of all tokens that it is given
FREE = -1  # in `forced`: a token to draw


class Decoder(Protocol):
    """What gives logits, token after token: a `Prior`, literally, or fast an engine, on a CPU or on a CUDA GPU
    (`armchair.sample.engine`, `cuda_engine`)."""

    shape: StreamShape

    @property
    def device(self) -> torch.device: ...

    @property
    def independent_rows(self) -> bool:
        """Whether a row's logits are the same bits whatever other rows there are."""

    @property
    def independent_threads(self) -> bool:
        """Whether they are also the same with any number of threads, and several threads may ask for some at once."""

    def prefill(self, text_tokens: Tensor) -> PromptCache: ...

    def start(self, prompts: PromptCache, ahead: bool = False) -> Any: ...

    def decode_step(self, tokens: Tensor, j: int, cache: Any) -> Tensor: ...

    def decode_steps(self, tokens: Tensor, j: int, cache: Any) -> Tensor: ...

    def decode_together(self, steps: "Sequence[Step]") -> list[Tensor]: ...


def micro_batches(count: int, most: int, threads: int) -> list[range]:
    """`count` rows as batches of `most` at most, as equal as can be and as many as keep all threads busy.

    None has a single row, if there are more: two together take about as long, and threads that share their steps less.
    """
    batches = math.ceil(count / most)
    batches = min(max(count // 2, 1, batches), math.ceil(batches / threads) * threads)
    return [range(count * i // batches, count * (i + 1) // batches) for i in range(batches)]


def candidate_uniforms(seed: int, candidates: Sequence[int], length: int) -> Tensor:
    """(len(candidates), length) float64 in [0, 1): each candidate's own stream, from (seed, candidate)."""
    rows = [
        torch.rand(length, dtype=torch.float64, generator=generator(seed, "candidate", c)) for c in candidates
    ]
    return torch.stack(rows)


@torch.inference_mode()
def read_prompts(decoder: Decoder, text_tokens: Tensor) -> PromptCache:
    """Read captions (P, T) one at a time, so that a caption's state does not depend on its neighbours."""
    return joined_prompts([decoder.prefill(row[None]) for row in text_tokens])


def joined_prompts(states: Sequence[PromptCache]) -> PromptCache:
    """The rows of several as those of one."""
    layers = range(len(states[0].keys))
    return PromptCache(
        [torch.cat([s.keys[i] for s in states]) for i in layers],
        [torch.cat([s.values[i] for s in states]) for i in layers],
        torch.cat([s.logits for s in states]),
    )


class Step(NamedTuple):
    """What a micro-batch wants put through the decoder: image tokens j to j+C-1 of its R rows, (R, C)."""

    tokens: Tensor
    j: int
    cache: Any


class MicroBatch:
    """Some rows that are drawn together, from pass to pass; whoever holds several can put them through at once.

        while not batch.done:
            batch.take(decoder.decode_steps(*batch.step()))

    `codes` (M, N) are right up to `known`, which is at most `until`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        prompts: PromptCache,
        null: PromptCache,
        uniforms: Tensor,
        settings: Settings,
        forced: Tensor,
        ahead: int = 1,
        until: int | None = None,
    ):
        """`prompts` holds the M rows' captions, `null` one empty caption; uniforms (M, N); forced (M, N) holds codes
        that are given, FREE elsewhere. Drawing ends with `until` codes a row, N by default.

        With `ahead` above 1 the decoder, whose rows have to be independent, is given up to so many codes at once that
        are not known: guesses, after the last that is. Each code is then picked by its own uniform; those that are
        picked after right guesses are what would have been picked one by one, and the picks after them are the next
        guesses (Jacobi decoding; Santilli et al., 2023; Teng et al., 2024, for pictures). Codes that are given in all
        rows are put through together in the same way, without a guess, wherever rows are independent.
        """
        rows, length = uniforms.shape
        self.uniforms, self.settings, self.forced, self.ahead = uniforms, settings, forced, ahead
        self.rows, self.grid, self.until = rows, decoder.shape.grid, length if until is None else until
        self.guided = settings.guidance != 1
        if self.guided:
            empty = null.rows(torch.zeros(rows, dtype=torch.int64))
            both = zip(prompts.keys, empty.keys, strict=True), zip(prompts.values, empty.values, strict=True)
            keys, values = ([torch.cat(pair) for pair in pairs] for pairs in both)
            prompts = PromptCache(keys, values, torch.cat([prompts.logits, empty.logits]))
        given = (forced != FREE).all(0).tolist()
        self.free = [j for j in range(length) if not given[j]]  # where something is to be picked
        self.several = ahead > 1 or (decoder.independent_rows and any(given))  # tokens a pass
        self.cache = decoder.start(prompts, self.several)
        self.codes = torch.where(forced == FREE, 0, forced)
        self.known = self.fed = self.guessed = 0  # codes that are final, in the cache, and begun with
        self.guesses = 0  # in the pass that is on
        if given[0]:
            self._go_on()
        else:
            self._pick(prompts.logits[:, None])

    @property
    def done(self) -> bool:
        return self.known == self.until

    def step(self) -> Step:
        """What is to be put through next."""
        most = max(1, TOGETHER // len(self.codes)) if self.several else 1
        tokens = self.codes[:, self.fed : min(self.known + self.guesses, self.fed + most)]
        return Step(tokens.repeat(2, 1) if self.guided else tokens, self.fed, self.cache)

    @torch.inference_mode()
    def take(self, logits: Tensor) -> None:
        """Go on with what the decoder gave for `step`, (R, C, K)."""
        self.fed += logits.shape[1]
        if self.fed >= self.known:  # else only codes that were given went through
            self._pick(logits[:, self.known - self.fed - 1 :])

    def _pick(self, logits: Tensor) -> None:
        """Pick codes from `known` on, by their logits (R, 1 + guesses, K)."""
        count = logits.shape[1]
        places = slice(self.known, self.known + count)
        conditional = logits[: self.rows].flatten(0, 1)
        step = conditional
        if self.guided:
            step = guide(conditional, logits[self.rows :].flatten(0, 1), self.settings.guidance)
        step = plausible(step, conditional, self.settings.min_p)
        drawn = pick(probabilities(step, self.settings), self.uniforms[:, places].flatten()).unflatten(0, (-1, count))
        forced = self.forced[:, places]
        drawn = torch.where(forced == FREE, drawn, forced)
        hits = _hits(drawn, self.codes[:, places]) if self.ahead > 1 else 0
        self.codes[:, places] = drawn
        self.known += min(hits + 1, count)
        self.fed = self.known - 1
        # Where guesses prove wrong, fewer are made, down to none; what would have been guessed may prove right.
        self.guesses = self.ahead - 1 if hits else max(0, count // 2 - 1)
        self._go_on()

    def _go_on(self) -> None:
        """Pass over codes that are given, and guess what comes after them: one more than goes through, to compare."""
        after = bisect.bisect_left(self.free, self.known)
        self.known = min(self.free[after] if after < len(self.free) else self.until, self.until)
        self.guesses = min(self.guesses, self.until - self.known - 1)
        guessed = min(self.known + self.guesses + 1, self.until) if self.ahead > 1 else 0
        for j in range(max(self.known, self.guessed), guessed):
            above = self.codes[:, j - self.grid if j >= self.grid else j - 1]  # in the first row the one before
            self.codes[:, j] = torch.where(self.forced[:, j] == FREE, above, self.forced[:, j])
        self.guessed = max(self.guessed, guessed)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; others are not wanted any more. Rows have to be independent."""
        index = torch.tensor(rows, device=self.codes.device)
        both = torch.cat([index, index + self.rows]) if self.guided else index
        self.uniforms, self.forced, self.codes = self.uniforms[index], self.forced[index], self.codes[index]
        self.cache.keep(both)
        self.rows = len(rows)

    def shown(self, rows: int) -> Tensor:
        """The codes (M, N) of the first `rows` rows of the grid; 0 elsewhere."""
        places = torch.arange(self.codes.shape[1], device=self.codes.device)
        return self.codes.masked_fill(places >= rows * self.grid, 0)


@torch.inference_mode()
def draw_micro_batch(decoder: Decoder, batch: MicroBatch, threads: int = 1) -> Iterator[Tensor]:
    """Draw a micro-batch to its end; yields `shown` codes (M, N) after each finished row of the grid.

    So many `threads` share each step (`several_threads`).
    """
    shown = 0
    while True:
        while shown < batch.known // batch.grid:
            shown += 1
            yield batch.shown(shown)
        if batch.done:
            return
        with sharing(threads):
            batch.take(decoder.decode_steps(*batch.step()))


def several_threads(decoder: Decoder) -> int:
    """How many threads may draw with a decoder: as many as PyTorch has, where bits do not depend on that."""
    return torch.get_num_threads() if decoder.independent_threads else 1


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
    until: int | None = None,
) -> Tensor:
    """Draw one picture's codes a row: text_tokens (P, T), rows: which caption each is for, uniforms (B, N).

    Gives codes (B, S, S) int64. `forced` (B, N) and `until` as in `MicroBatch`; codes that are not drawn are 0.
    `progress` is told now and then how many rows are done, and of how many.
    """
    if isinstance(decoder, Prior):
        decoder = decoder.folded()
    device = decoder.device
    prompts = read_prompts(decoder, text_tokens.to(device))
    null = read_prompts(decoder, null_text(1, decoder.shape, device))
    given = torch.full_like(uniforms, FREE, dtype=torch.int64) if forced is None else forced
    count, grid = len(rows), decoder.shape.grid
    threads = several_threads(decoder)
    if decoder.independent_rows:
        batches = micro_batches(count, AT_ONCE, threads)
    else:
        batches = [range(start, start + MICRO_BATCH) for start in range(0, count, MICRO_BATCH)]
    shared = threads if len(batches) == 1 else 1  # the steps of a single batch are shared

    @torch.inference_mode()
    def draw(which: range, stop: threading.Event) -> Tensor:
        picked = torch.tensor(which).clamp(max=count - 1)  # filled up with copies of the last row
        caption = torch.tensor(rows)[picked].to(device)
        stream, kept = uniforms[picked].to(device), given[picked].to(device)
        ahead = AHEAD if len(which) == 1 else 1
        batch = MicroBatch(decoder, prompts.rows(caption), null, stream, settings, kept, ahead, until)
        for _ in draw_micro_batch(decoder, batch, shared):
            if stop.is_set():
                raise CancelledError
        return batch.codes[: count - which.start].unflatten(1, (grid, grid))

    done: list[Tensor] = []
    with closing(in_order(draw, batches, 1 if shared > 1 else threads)) as drawn:
        for which, codes in zip(batches, drawn, strict=True):
            done.append(codes)
            if progress is not None:
                progress(min(which.stop, count), count)
    return torch.cat(done)


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
