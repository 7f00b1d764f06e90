"""Text tokenizer: byte-level BPE (Sennrich et al. 2016) with seeded BPE-dropout (Provilkov et al. 2020)."""

import contextlib
import functools
import hashlib
import heapq
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from armchair.errors import BundleError, RequestError

log = logging.getLogger(__name__)

CUT_WARNING = "%d of %d captions cut to %d tokens; the longest has %d"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


class TextTokenizer:
    """Captions to fixed-length rows of token ids, and back.

    Captions are NFKC-normalised, lower-cased and stripped. Every byte is a token, so that every string has
    a code and `decode(encode(text)) == normalize(text)` unless the row was cut. Ids are `0 … vocab_size - 1`
    and `pad_id`.
    """

    def __init__(self, hf: Tokenizer):
        self._hf = hf
        model = json.loads(hf.to_str())["model"]
        vocab = model["vocab"]
        self.vocab_size: int = len(vocab)
        self.cut_count = 0  # captions cut by `encode` so far
        self._byte_ids = {b: vocab[b] for b in BYTES}
        self._rank = {(vocab[a], vocab[b]): rank for rank, (a, b) in enumerate(model["merges"])}
        self._merged = [vocab[a + b] for a, b in model["merges"]]
        self._whole = functools.lru_cache(maxsize=1 << 16)(lambda word: self._merge(word, math.inf, None)[0])

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learn the merges from `captions`; the same captions in any order give the same tokenizer.

        Few captions give fewer than `vocab_size` entries, as a pair must be seen twice to be merged.
        Raises RequestError for a `vocab_size` below the 256 bytes.
        """
        if vocab_size < len(BYTES):
            raise RequestError(f"vocab_size: expected at least {len(BYTES)}, one per byte, got {vocab_size}")
        hf = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=BYTES, show_progress=False
        )
        hf.train_from_iterator(map(_valid, captions), trainer)
        return cls(hf)

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """Read what `to_json` wrote. Raises BundleError for anything else."""
        try:
            hf = Tokenizer.from_str(text)
        except BaseException as error:  # the crate raises bare Exception, and where it panics what is none
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise BundleError(f"text tokenizer: not in the Hugging Face tokenizers format: {error}") from None
        if _pipeline(hf) != _pipeline(_untrained()):
            raise BundleError("text tokenizer: expected byte-level BPE over NFKC lower case")
        vocab = hf.get_vocab()
        if sorted(vocab.values()) != list(range(len(vocab))) or not vocab.keys() >= set(BYTES):
            raise BundleError("text tokenizer: its vocabulary lacks bytes, or its ids have gaps")
        return cls(hf)

    def to_json(self) -> str:
        """The tokenizer in the Hugging Face `tokenizers` format."""
        return self._hf.to_str()

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer.from_json, (self.to_json(),)

    @property
    def pad_id(self) -> int:
        """One past the vocabulary; the prior has a separate embedding of it for each position."""
        return self.vocab_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of the tokenizer."""
        spec = json.dumps(json.loads(self.to_json()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(spec.encode()).hexdigest()

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it. Lone surrogates, which no UTF-8 text has, become `?`."""
        return self._hf.normalizer.normalize_str(_valid(text))

    def encode(
        self,
        texts: Sequence[str],
        length: int,
        *,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
        warn: bool = True,
    ) -> np.ndarray:
        """Token ids, int64 (B, length), padded with `pad_id`.

        Longer captions are cut and counted; a call that cuts any logs one warning, where `warn`. `dropout` in
        [0, 1] is the probability that a merge is skipped at a step (0.1 in the DALL·E paper, in training only),
        drawn from `rng`.
        Raises RequestError for a length below 1, or a dropout out of range or without `rng`.
        """
        if isinstance(texts, str):
            raise RequestError("encode takes a sequence of captions, got one string")
        if length < 1:
            raise RequestError(f"length: expected at least 1 token, got {length}")
        if not 0 <= dropout <= 1:
            raise RequestError(f"dropout: expected a probability in [0, 1], got {dropout}")
        if not dropout:
            rows = [self._hf.encode(_valid(text)).ids for text in texts]
        elif rng is None:
            raise RequestError("dropout needs rng, a numpy.random.Generator")
        else:
            rows = self._encode_with_dropout(texts, dropout, rng)

        out = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids[:length]
        longest = max(map(len, rows), default=0)
        if longest > length:
            cut = sum(len(ids) > length for ids in rows)
            self.cut_count += cut
            if warn:
                log.warning(CUT_WARNING, cut, len(rows), length, longest)
        return out

    def decode(self, row: Iterable[int]) -> str:
        """The text of one row of ids; padding is left out, a character cut in its bytes becomes U+FFFD."""
        return self._hf.decode([i for i in map(int, row) if 0 <= i < self.vocab_size]).removeprefix(" ")

    def words(self, text: str, length: int) -> list[tuple[str, list[int]]]:
        """The words of a caption, normalised, each with the places (from 0) of its tokens among the first `length`."""
        encoding = self._hf.encode(_valid(text))
        places: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids[:length]):
            places.setdefault(word or 0, []).append(place)
        return [(self.decode(encoding.ids[i] for i in word), word) for word in places.values()]

    def _encode_with_dropout(
        self, texts: Sequence[str], p: float, rng: np.random.Generator
    ) -> list[list[int]]:
        # Whether a step's best merge is skipped is a Bernoulli process that runs on through the words, so we
        # need draw only how many merges go well before the next skip: a word with fewer comes from the cache.
        skips = _Gaps(p, rng)
        keep: float = skips.draw()
        rows = []
        for text in texts:
            row: list[int] = []
            for word, _ in self._hf.pre_tokenizer.pre_tokenize_str(self.normalize(text)):
                ids = self._whole(word)
                if (n_merges := len(word) - len(ids)) <= keep:
                    keep -= n_merges
                else:
                    ids, keep = self._merge(word, keep, skips)
                row += ids
            rows.append(row)
        return rows

    def _merge(self, word: str, keep: float, skips: "_Gaps | None") -> tuple[list[int], float]:
        """Merge a word's bytes, best rank first and then leftmost, with a skip after each `keep` good merges.

        A skipped merge is a candidate again at the next step (Provilkov et al. 2020, algorithm 1). Returns
        the ids and what is left of `keep`. The heap keeps words of thousands of letters at O(n log n).
        """
        ids = [self._byte_ids[b] for b in word]
        n = len(ids)
        after = list(range(1, n + 1))
        before = list(range(-1, n - 1))
        rank_of, merged = self._rank, self._merged
        heap = [(rank, i) for i in range(n - 1) if (rank := rank_of.get((ids[i], ids[i + 1]))) is not None]
        heapq.heapify(heap)
        skipped = []
        while heap:
            rank, i = candidate = heapq.heappop(heap)
            j = after[i]
            if j >= n or rank_of.get((ids[i], ids[j])) != rank:
                continue  # one of the two is part of another token by now
            if not keep and skips is not None:
                skipped.append(candidate)
                keep = skips.draw()
                continue
            keep -= 1
            ids[i], ids[j] = merged[rank], -1
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                if (rank := rank_of.get((ids[i], ids[k]), -1)) >= 0:
                    heapq.heappush(heap, (rank, i))
            h = before[i]
            if h >= 0 and (rank := rank_of.get((ids[h], ids[i]), -1)) >= 0:
                heapq.heappush(heap, (rank, h))
            for candidate in skipped:
                heapq.heappush(heap, candidate)
            skipped.clear()
        return [i for i in ids if i >= 0], keep


@contextlib.contextmanager
def cuts_summed_up() -> Iterator[None]:
    """For work that reads captions many times: one warning a length, at its end, for all that were cut meanwhile."""
    sums: dict[int, tuple[int, int]] = {}

    def keep(record: logging.LogRecord) -> bool:
        if record.msg != CUT_WARNING:
            return True
        cut, _, length, longest = cast(tuple[int, int, int, int], record.args)
        before = sums.get(length, (0, 0))
        sums[length] = (before[0] + cut, max(before[1], longest))
        return False

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
        for length, (cut, longest) in sums.items():
            log.warning("captions were cut to %d tokens %d times; the longest has %d", length, cut, longest)


class _Gaps:
    """Counts of successes between the failures of a Bernoulli process, in blocks as scalar draws are slow."""

    def __init__(self, p: float, rng: np.random.Generator):
        self._p, self._rng = p, rng
        self._block: list[int] = []

    def draw(self) -> int:
        if not self._block:
            self._block = (self._rng.geometric(self._p, 256) - 1).tolist()
        return self._block.pop()


def _untrained() -> Tokenizer:
    hf = Tokenizer(models.BPE())
    hf.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True
    )  # the first word is a word like any other
    hf.decoder = decoders.ByteLevel()
    return hf


def _pipeline(hf: Tokenizer) -> dict[str, Any]:
    """All of the tokenizer but what training learns."""
    spec = json.loads(hf.to_str())
    return {**spec, "model": {**spec["model"], "vocab": None, "merges": None}}


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
