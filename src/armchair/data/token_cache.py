"""Images encoded once: memory-mapped shards of codes with their captions, which stage 2 trains on.

    FOLDER/codes-00000.npy    uint16 (images, views, N), memory-mapped
           captions.jsonl     a line an image: what its caption is drawn from, a list of lists of texts
           weights.npy        how often each image is visited (float64; all 1 where nothing is weighed)
           cache.json         fingerprint of tokenizer weights, data and settings; counts

A cache is used only if its fingerprint is the one that the run computes, so a stale one never is.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armchair.data.loader import Skips, caption_choices, load_item, sample_weights
from armchair.data.sources import DataConfig, Source
from armchair.errors import DataError
from armchair.image.pixels import BrokenSample, square, stack

logger = logging.getLogger(__name__)

SHARD = 65_536  # images a shard


class TokenCache:
    """Codes by image and view; `captions[i]` is a list of lists, one of which is drawn, then one text of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = json.loads((folder / "cache.json").read_text())
        self.shards = [np.load(p, mmap_mode="r") for p in sorted(folder.glob("codes-*.npy"))]
        self.weights = np.load(folder / "weights.npy")
        with (folder / "captions.jsonl").open(encoding="utf-8") as f:
            self.captions = [json.loads(line) for line in f]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def views(self) -> int:
        return self.shards[0].shape[1]

    def codes(self, images: np.ndarray, views: np.ndarray) -> Tensor:
        """images, views: (B,) integers -> codes (B, N) int64."""
        rows = [self.shards[i // SHARD][i % SHARD, v] for i, v in zip(images, views, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def open_cache(folder: Path, fingerprint: str) -> TokenCache | None:
    """The cache at `folder` if it was made from just this; None where there is none or it is stale."""
    try:
        found = json.loads((folder / "cache.json").read_text())["fingerprint"]
        return TokenCache(folder) if found == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):  # a damaged cache is made again, like a stale one
        return None


def build_cache(
    folder: Path,
    source: Source,
    config: DataConfig,
    encode: Callable[[Tensor], Tensor],
    *,
    fingerprint: str,
    views: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = 64,
) -> TokenCache:
    """Encode every image of `source` and write the cache whole or not at all.

    `encode` maps images (B, 3, R, R) in [0, 1] to codes (B, S, S). View 0 is the centre square, the others are
    crops as in stage 1. Broken images are left out, counted and named. Raises DataError when too many are.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    visits = sample_weights(source, config)
    skips = Skips(len(source))
    kept: list[int] = []
    written = 0
    shard: list[np.ndarray] = []

    def flush_shard() -> None:
        nonlocal written
        if shard:
            np.save(partial / f"codes-{written:05d}.npy", np.concatenate(shard))
            written += 1
            shard.clear()

    with (partial / "captions.jsonl").open("w", encoding="utf-8") as captions:
        pending: list[np.ndarray] = []
        total = len(source)

        def encode_pending() -> None:
            if pending:
                codes = encode(stack(pending)).flatten(1).cpu().numpy().astype(np.uint16)
                shard.append(codes.reshape(-1, views, codes.shape[1]))
                pending.clear()

        for i in range(total):
            try:
                skips.visit()
                sample = source[i]
                texts = caption_choices(source, i, sample, config)
            except BrokenSample as broken:
                skips.add(source.key(i), broken.cause)
                continue
            pending.append(square(sample.image, config.resolution))
            for view in range(1, views):
                pending.append(load_item(source, i, i * views + view, config, seed)[0])
            captions.write(json.dumps(texts, ensure_ascii=False) + "\n")
            kept.append(i)
            if len(pending) >= batch_size * views or len(kept) % SHARD == 0:
                encode_pending()
                progress(i + 1, total)
            if len(kept) % SHARD == 0:
                flush_shard()
        encode_pending()
        flush_shard()
    if not kept:
        raise DataError("no image could be encoded")
    np.save(partial / "weights.npy", np.ones(len(kept)) if visits is None else visits[kept])
    info = {"fingerprint": fingerprint, "images": len(kept), "views": views, "broken": dict(skips.causes)}
    (partial / "cache.json").write_text(json.dumps(info, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return TokenCache(folder)
