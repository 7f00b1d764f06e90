"""Drawing codes: captions read once, then token by token, by micro-batches of one fixed shape.

Legend: B rows, N image tokens, T text length, M = MICRO_BATCH.

A matrix product can differ in its last bits with its number of rows, so everything runs at exactly M rows (2M
with guidance), filled up where there are fewer, and each caption is read alone. Candidate c's token is then a
function of (weights, caption, settings, its own uniforms) and nothing else: not of how many are drawn, nor of
who shares the batch.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from armchair.prior.sequence import null_text
from armchair.prior.transformer import Prior, PromptCache
from armchair.runtime import generator
from armchair.sample.next_token import Settings, guide, pick, plausible, probabilities

MICRO_BATCH = 8
FREE = -1  # in `forced`: a token to draw


def candidate_uniforms(seed: int, candidates: Sequence[int], length: int) -> Tensor:
    """(len(candidates), length) float64 in [0, 1): each candidate's own stream, from (seed, candidate)."""
    rows = [
        torch.rand(length, dtype=torch.float64, generator=generator(seed, "candidate", c)) for c in candidates
    ]
    return torch.stack(rows)


@torch.inference_mode()
def read_prompts(prior: Prior, text_tokens: Tensor) -> PromptCache:
    """Read captions (P, T) one at a time, so that a caption's state does not depend on its neighbours."""
    states = [prior.prefill(row[None]) for row in text_tokens]
    layers = range(len(prior.blocks))
    return PromptCache(
        [torch.cat([s.keys[i] for s in states]) for i in layers],
        [torch.cat([s.values[i] for s in states]) for i in layers],
        torch.cat([s.logits for s in states]),
    )


@torch.inference_mode()
def draw_micro_batch(
    prior: Prior, prompts: PromptCache, null: PromptCache, uniforms: Tensor, settings: Settings, forced: Tensor
) -> Iterator[Tensor]:
    """Draw M rows together; yields the codes (M, N) after each finished row of the grid (undrawn ones are 0).

    `prompts` holds the M rows' captions, `null` one empty caption; uniforms (M, N); forced (M, N) holds codes
    that are given, FREE elsewhere.
    """
    rows, length = uniforms.shape
    guided = settings.guidance != 1
    if guided:
        empty = null.rows(torch.zeros(rows, dtype=torch.int64))
        both = zip(prompts.keys, empty.keys, strict=True), zip(prompts.values, empty.values, strict=True)
        keys, values = ([torch.cat(pair) for pair in pairs] for pairs in both)
        prompts = PromptCache(keys, values, torch.cat([prompts.logits, empty.logits]))
    cache = prior.start(prompts)
    codes = torch.zeros(rows, length, dtype=torch.int64, device=prompts.logits.device)
    logits = prompts.logits
    for j in range(length):
        conditional = logits[:rows]
        step = guide(conditional, logits[rows:], settings.guidance) if guided else conditional
        step = plausible(step, conditional, settings.min_p)
        drawn = pick(probabilities(step, settings), uniforms[:, j])
        codes[:, j] = torch.where(forced[:, j] == FREE, drawn, forced[:, j])
        if (j + 1) % prior.shape.grid == 0:
            yield codes
        if j + 1 < length:
            token = codes[:, j].repeat(2) if guided else codes[:, j]
            logits = prior.decode_step(token, j, cache)


@torch.inference_mode()
def draw_codes(
    prior: Prior,
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
    prior = prior.folded()
    device = prior.image_head.weight.device
    prompts = read_prompts(prior, text_tokens.to(device))
    null = read_prompts(prior, null_text(1, prior.shape, device))
    done = []
    for start in range(0, len(rows), MICRO_BATCH):
        # The last micro-batch is filled up with copies of its last row.
        pick_rows = torch.arange(start, start + MICRO_BATCH).clamp(max=len(rows) - 1)
        caption = torch.tensor(rows)[pick_rows].to(device)
        given = torch.full_like(uniforms, FREE, dtype=torch.int64) if forced is None else forced
        stream, kept = uniforms[pick_rows].to(device), given[pick_rows].to(device)
        *_, codes = draw_micro_batch(prior, prompts.rows(caption), null, stream, settings, kept)
        done.append(codes[: len(rows) - start])
        if progress is not None:
            progress(min(start + MICRO_BATCH, len(rows)), len(rows))
    return torch.cat(done).unflatten(1, (prior.shape.grid, prior.shape.grid))


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
