"""The released models' text tokenizer against a literal one, on a list of merges made here."""

import gzip
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armchair.errors import BundleError, RequestError
from armchair.text.bpe import TextTokenizer
from armchair.text.clip_bpe import ClipTextTokenizer

MERGES = [
    "t h",
    "th e</w>",
    "r e",
    "re d</w>",
    "a p",
    "ap p",
    "l e</w>",
    "app le</w>",
    "s t",
    "st a",
    "sta r</w>",
    "' s</w>",
]
LETTERS = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    return path


@pytest.fixture(scope="module")
def tokenizer(merges: Path) -> ClipTextTokenizer:
    return ClipTextTokenizer.from_merges(merges)


def literal(text: str) -> list[int]:
    """Ids of ASCII text, pair by pair, best rank first."""
    entries = [*LETTERS, *map(chr, range(256, 256 + 68))]
    entries += [c + "</w>" for c in entries]
    entries += ["".join(m.split()) for m in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    ids = []
    for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while True:
            ranks = {MERGES.index(f"{a} {b}"): (a, b) for a, b in itertools.pairwise(pieces) if f"{a} {b}" in MERGES}
            if not ranks:
                break
            a, b = ranks[min(ranks)]
            i, merged = 0, []
            while i < len(pieces):
                if pieces[i : i + 2] == [a, b]:
                    merged.append(a + b)
                    i += 2
                else:
                    merged.append(pieces[i])
                    i += 1
            pieces = merged
        ids += [entries.index(p) for p in pieces]
    return ids


@given(st.text(st.sampled_from("the red apple's star, 42!'\t\n#-"), max_size=40))
def test_ids_are_those_of_a_literal_tokenizer(tokenizer: ClipTextTokenizer, text: str) -> None:
    row = tokenizer.encode([text], 60)[0]
    ids = literal(text)
    assert row.tolist() == [tokenizer.start_id, *ids, tokenizer.end_id, *[0] * (58 - len(ids))]


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("THE  Red\u00a0apple ", "the red apple"),
        ("the &amp;amp; apple", "the & apple"),  # entities are resolved twice
        ("the appleâ€™s star", "the apple's star"),  # an apostrophe that was read in the wrong encoding
    ],
)
def test_texts_are_repaired_first(tokenizer: ClipTextTokenizer, text: str, same_as: str) -> None:
    assert tokenizer.encode([text], 30).tolist() == tokenizer.encode([same_as], 30).tolist()


@given(st.text(max_size=30))
def test_any_text_has_ids_within_the_vocabulary(tokenizer: ClipTextTokenizer, text: str) -> None:
    row = tokenizer.encode([text], 77)[0]
    assert row[0] == tokenizer.start_id and (row == tokenizer.end_id).any() and row.min() >= 0


def test_a_long_text_is_cut_and_keeps_its_end(tokenizer: ClipTextTokenizer) -> None:
    row = tokenizer.encode(["the " * 50], 9)[0]
    assert row[0] == tokenizer.start_id and row[-1] == tokenizer.end_id and len(set(row[1:-1].tolist())) == 1


def test_start_and_end_marks_in_a_text_are_one_token_each(tokenizer: ClipTextTokenizer) -> None:
    row = tokenizer.encode(["the <|endoftext|> star"], 8)[0].tolist()
    assert row == [tokenizer.start_id, *literal("the"), tokenizer.end_id, *literal("star"), tokenizer.end_id, 0, 0, 0]


def test_it_is_the_same_after_json(tokenizer: ClipTextTokenizer) -> None:
    again = ClipTextTokenizer.from_json(tokenizer.to_json())
    text = "the red apple's star, 42 für Ωmega"
    assert again.encode([text], 40).tolist() == tokenizer.encode([text], 40).tolist()
    assert again.vocab_size == tokenizer.vocab_size == 512 + len(MERGES) + 2


def test_other_files_are_refused(tmp_path: Path, tokenizer: ClipTextTokenizer) -> None:
    for data in (
        b"",
        b"one line only",
        b"#version\na b c\nd e f\n",
        b"\x1f\x8bnot gzip",
        b"#v\nzz yy\nqq ww\n",
        b"#v\na b\na b\n",
    ):
        path = tmp_path / "merges.txt"
        path.write_bytes(data)
        with pytest.raises(RequestError, match="merges.txt: not a list of merges"):
            ClipTextTokenizer.from_merges(path)
    with pytest.raises(BundleError, match="released CLIP"):
        ClipTextTokenizer.from_json(TextTokenizer.train(["a red apple"], 300).to_json())
    with pytest.raises(BundleError, match="tokenizers format"):
        ClipTextTokenizer.from_json("{}")
    with pytest.raises(BundleError, match="expected"):
        TextTokenizer.from_json(tokenizer.to_json())


def test_a_mark_within_other_signs_is_no_mark(tokenizer: ClipTextTokenizer) -> None:
    row = tokenizer.encode(["!<|endoftext|>"], 30)[0].tolist()
    pieces = [*literal("!<|"), *literal("endoftext"), *literal("|>")]
    assert row == [tokenizer.start_id, *pieces, tokenizer.end_id, *[0] * (28 - len(pieces))]
