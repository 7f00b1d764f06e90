import json
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from armchair.errors import BundleError, RequestError
from armchair.text.bpe import BYTES, TextTokenizer, cuts_summed_up

THINGS = ["apple", "avocado", "armchair", "baguette", "cube", "snail", "teapot", "사과", "яблоко"]
CAPTIONS = [
    f"{a} {colour} {thing} {where}, in the style of a {other}!"
    for a in ("a", "the", "two")
    for colour in ("red", "green", "dark blue")
    for where in ("on a table", "under the glowing moon")
    for thing in THINGS
    for other in THINGS
]
TOKENIZER = TextTokenizer.train(CAPTIONS, 350)
HF = Tokenizer.from_str(TOKENIZER.to_json())
VOCAB = HF.get_vocab()
TOKENS = {i: token for token, i in VOCAB.items()}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
known_words = st.lists(st.sampled_from(" ".join(CAPTIONS[:500]).split()), max_size=8).map(" ".join)
captions = st.lists(text | known_words, min_size=1, max_size=4)


def unpadded(row: np.ndarray) -> list[int]:
    return [i for i in row.tolist() if i != TOKENIZER.pad_id]


@given(st.text())
def test_any_string_round_trips(caption: str) -> None:
    (row,) = TOKENIZER.encode([caption], 4 * 3 * len(caption) * 18 + 1)  # NFKC makes 18 characters of U+FDFA
    assert TOKENIZER.decode(row) == TOKENIZER.normalize(caption)


@given(captions)
def test_same_ids_as_hugging_face(batch: list[str]) -> None:
    rows = TOKENIZER.encode(batch, 4096)
    assert [unpadded(row) for row in rows] == [HF.encode(caption).ids for caption in batch]


@given(captions)
def test_merge_loop_without_skips_equals_hugging_face(batch: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows = TOKENIZER.encode(batch, 4096, dropout=1e-300, rng=rng)
    assert [unpadded(row) for row in rows] == [HF.encode(caption).ids for caption in batch]


@given(captions)
def test_dropout_of_one_gives_bytes(batch: list[str]) -> None:
    rows = TOKENIZER.encode(batch, 4096, dropout=1.0, rng=np.random.default_rng(0))
    byte_ids = {VOCAB[b] for b in BYTES}
    for caption, row in zip(batch, rows, strict=True):
        assert byte_ids.issuperset(unpadded(row))
        assert TOKENIZER.decode(row) == TOKENIZER.normalize(caption)


@given(captions, st.floats(0.01, 1), st.integers(0, 2**32))
def test_dropout_keeps_the_text_and_repeats(batch: list[str], dropout: float, seed: int) -> None:
    rows = TOKENIZER.encode(batch, 4096, dropout=dropout, rng=np.random.default_rng(seed))
    again = TOKENIZER.encode(batch, 4096, dropout=dropout, rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(rows, again)
    assert [TOKENIZER.decode(row) for row in rows] == [TOKENIZER.normalize(caption) for caption in batch]


def reference_dropout(word: str, p: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Provilkov et al. 2020, algorithm 1, as printed: a step drops each candidate with probability p."""
    merges = {
        tuple(pair): rank for rank, pair in enumerate(json.loads(TOKENIZER.to_json())["model"]["merges"])
    }
    tokens = list(word)
    while True:
        candidates = [
            (merges[pair], i)
            for i, pair in enumerate(zip(tokens, tokens[1:], strict=False))
            if pair in merges and rng.random() >= p
        ]
        if not candidates:
            return tuple(VOCAB[token] for token in tokens)
        _, i = min(candidates)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def test_dropout_has_the_distribution_of_the_paper() -> None:
    n, p = 4000, 0.3
    rng = np.random.default_rng(0)
    # The word repeats, so that the draws run on from one to the next.
    (row,) = TOKENIZER.encode([" ".join(["teapot"] * n)], 8 * n, dropout=p, rng=rng)
    got: dict[str, float] = {}
    want: dict[str, float] = {}
    words: list[list[str]] = []
    for token in map(TOKENS.__getitem__, unpadded(row)):
        if token.startswith("Ġ"):
            words.append([])
        words[-1].append(token)
    assert len(words) == n
    for word in words:
        got["|".join(word)] = got.get("|".join(word), 0) + 1 / n
    for _ in range(n):
        key = "|".join(map(TOKENS.__getitem__, reference_dropout("Ġteapot", p, rng)))
        want[key] = want.get(key, 0) + 1 / n
    assert len(want) > 5
    distance = sum(abs(got.get(key, 0) - want.get(key, 0)) for key in got.keys() | want.keys()) / 2
    assert distance < 0.05  # 0.02 between two samples of this size; 0.2 if p were 0.2 or 0.4


def test_training_is_repeatable_and_ignores_order() -> None:
    again = TextTokenizer.train(iter(CAPTIONS[::-1]), 350)
    assert again.to_json() == TOKENIZER.to_json()
    assert again.fingerprint == TOKENIZER.fingerprint != TextTokenizer.train(CAPTIONS, 349).fingerprint
    assert (TOKENIZER.vocab_size, TOKENIZER.pad_id) == (350, 350)
    assert TextTokenizer.train([], 1000).vocab_size == 256
    with pytest.raises(RequestError, match="at least 256"):
        TextTokenizer.train(CAPTIONS, 255)


def test_json_and_pickle_round_trip() -> None:
    for other in (TextTokenizer.from_json(TOKENIZER.to_json()), pickle.loads(pickle.dumps(TOKENIZER))):
        assert other.to_json() == TOKENIZER.to_json()
        assert other.fingerprint == TOKENIZER.fingerprint
        np.testing.assert_array_equal(other.encode(CAPTIONS[:9], 30), TOKENIZER.encode(CAPTIONS[:9], 30))


def test_long_captions_are_cut_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TextTokenizer.from_json(TOKENIZER.to_json())
    rows = tokenizer.encode(["x" * 9, "zq" * 20, "a"], 8)
    assert rows.shape == (3, 8) and rows.dtype == np.int64
    assert rows[2].tolist()[1:] == [tokenizer.pad_id] * 7
    (record,) = caplog.records
    longest = len(HF.encode("zq" * 20).ids)
    assert record.getMessage() == f"2 of 3 captions cut to 8 tokens; the longest has {longest}"
    assert tokenizer.cut_count == 2
    tokenizer.encode(["x" * 9], 8)
    assert tokenizer.cut_count == 3 and len(caplog.records) == 2
    tokenizer.encode(["x" * 9], 8, warn=False)
    assert tokenizer.cut_count == 4 and len(caplog.records) == 2
    assert tokenizer.encode([], 8).shape == (0, 8)


def test_cuts_in_long_work_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TextTokenizer.from_json(TOKENIZER.to_json())
    with pytest.raises(KeyError), cuts_summed_up():
        for text in ("x" * 9, "zq" * 20, "a"):
            tokenizer.encode([text, "b"], 8)
            tokenizer.encode([text], 4)
        assert not caplog.records
        raise KeyError  # what was cut is told all the same
    longest = len(HF.encode("zq" * 20).ids)
    assert [record.getMessage() for record in caplog.records] == [
        f"captions were cut to 8 tokens 2 times; the longest has {longest}",
        f"captions were cut to 4 tokens 2 times; the longest has {longest}",
    ]
    tokenizer.encode(["x" * 9], 8)
    assert len(caplog.records) == 3


def test_wrong_requests() -> None:
    rng = np.random.default_rng(0)
    for call in (
        lambda: TOKENIZER.encode("a caption", 8),
        lambda: TOKENIZER.encode(["a"], 0),
        lambda: TOKENIZER.encode(["a"], 8, dropout=1.5, rng=rng),
        lambda: TOKENIZER.encode(["a"], 8, dropout=float("nan"), rng=rng),
        lambda: TOKENIZER.encode(["a"], 8, dropout=0.1),
    ):
        with pytest.raises(RequestError):
            call()


def spoilt(**changes: object) -> str:
    spec = json.loads(TOKENIZER.to_json())
    spec["model"] |= {k: v for k, v in changes.items() if k in spec["model"]}
    return json.dumps(spec | {k: v for k, v in changes.items() if k not in spec["model"]})


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "{}",
        "[1]",
        "\0",
        TOKENIZER.to_json()[:-1],
        spoilt(normalizer=None),
        spoilt(pre_tokenizer={"type": "Whitespace"}),
        spoilt(dropout=0.1),
        spoilt(vocab={"a": 0}),
        spoilt(vocab={}, merges=[]),
        spoilt(vocab={b: 7 + i for i, b in enumerate(BYTES)}, merges=[]),
        spoilt(merges=[["a", "nowhere"]]),
        spoilt(continuing_subword_prefix="x" * 30),  # the crate panics
    ],
)
def test_malformed_json(malformed: str) -> None:
    with pytest.raises(BundleError, match="text tokenizer") as error:
        TextTokenizer.from_json(malformed)
    assert "\n" not in str(error.value)


@settings(max_examples=100)
@given(st.integers(0, len(TOKENIZER.to_json()) - 1), st.characters(max_codepoint=126, min_codepoint=32))
def test_altered_json_is_refused_or_usable(i: int, c: str) -> None:
    whole = TOKENIZER.to_json()
    try:
        altered = TextTokenizer.from_json(whole[:i] + c + whole[i + 1 :])
    except BundleError:
        return
    rows = altered.encode(CAPTIONS[:3], 64, dropout=0.5, rng=np.random.default_rng(0))
    assert rows.max() <= altered.pad_id


def test_dropout_is_fast() -> None:
    words = [f"{c}{v}{d}{w}n" for c in "bdfgklmprst" for v in "aeiou" for d in "lmnrst" for w in "aeiou"]
    rng = np.random.default_rng(0)
    batches = [[" ".join(rng.choice(words, 8)) for _ in range(64)] for _ in range(20)]
    tokenizer = TextTokenizer.train([caption for batch in batches for caption in batch], 600)
    times = []
    for batch in batches:
        start = time.perf_counter()
        tokenizer.encode(batch, 64, dropout=0.1, rng=rng)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.008


def test_a_word_of_many_letters_is_no_trap() -> None:
    start = time.perf_counter()
    TOKENIZER.encode(["teapot" * 5000], 64, dropout=0.1, rng=np.random.default_rng(0))
    assert time.perf_counter() - start < 3
