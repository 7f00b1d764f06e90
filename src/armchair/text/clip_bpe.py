"""The text tokenizer of the released CLIP models, read from their list of merges (Radford et al., 2021, section 2.4).

It differs from `armchair.text.bpe` in all that can differ: words end in a mark of their own, spaces are not kept, texts
are repaired first, and rows have a start and an end.
"""

import gzip
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from armchair.errors import BundleError, RequestError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MERGES = 49152 - 256 - 2  # that the released models use of the list
# The marks themselves, English clitics, runs of letters, single digits, runs of anything else; no spaces.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Bytes that are printable in Latin-1 stand for themselves in the vocabulary and come first, in order; then the others.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


class ClipTextTokenizer:
    """Texts to rows of ids: a start, the words, an end, zeros."""

    def __init__(self, hf: Tokenizer):
        self._hf = hf
        self.vocab_size: int = hf.get_vocab_size()
        start, end = hf.token_to_id(START), hf.token_to_id(END)
        if start is None or end != self.vocab_size - 1:
            raise BundleError("text tokenizer: expected that of a released CLIP, whose last entry is the end of a text")
        self.start_id: int = start
        self.end_id: int = end

    @classmethod
    def from_merges(cls, path: Path) -> "ClipTextTokenizer":
        """Read the list that comes with the released models: `bpe_simple_vocab_16e6.txt.gz`, or `merges.txt`.

        Raises RequestError for a file that is not such a list.
        """
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, OSError) as error:
            raise RequestError(f"{path}: not a list of merges: {error}") from None
        lines = text.split("\n")[1 : MERGES + 1]  # the first line says what it is
        merges = [tuple(line.split()) for line in lines if line]
        if len(merges) < 2 or any(len(merge) != 2 for merge in merges):
            raise RequestError(f"{path}: not a list of merges: expected two pieces a line, after one line")
        byte_of = _byte_letters()
        letters = [byte_of[b] for b in (*_PRINTABLE, *(b for b in range(256) if b not in _PRINTABLE))]
        entries = [*letters, *(c + WORD_END for c in letters), *("".join(m) for m in merges), START, END]
        vocab = {entry: i for i, entry in enumerate(entries)}
        if len(vocab) != len(entries):
            raise RequestError(f"{path}: not a list of merges: some are there twice")
        try:
            hf = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END))  # type: ignore[arg-type]
        except Exception as error:  # the crate raises bare Exception: a merge of pieces that there are not
            raise RequestError(f"{path}: not a list of merges: {error}") from None
        hf.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return cls(hf)

    @classmethod
    def from_json(cls, text: str) -> "ClipTextTokenizer":
        """Read what `to_json` wrote. Raises BundleError for anything else."""
        try:
            suffix = json.loads(text)["model"]["end_of_word_suffix"]
            hf = Tokenizer.from_str(text)
        except Exception as error:  # the crate raises bare Exception
            raise BundleError(f"text tokenizer: not in the Hugging Face tokenizers format: {error}") from None
        if suffix != WORD_END:
            raise BundleError("text tokenizer: expected that of a released CLIP, with a mark at the end of words")
        return cls(hf)

    def to_json(self) -> str:
        """The tokenizer in the Hugging Face `tokenizers` format."""
        return self._hf.to_str()

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Ids, int64 (B, length): start, text, end, zeros; a text that is too long is cut and keeps its end.

        Raises RequestError where the package that repairs texts is missing.
        """
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            words = self._hf.pre_tokenizer.pre_tokenize_str(_repaired(text))
            ids = [self.start_id, *(i for word, _ in words for i in self._word(word)), self.end_id]
            row[: len(ids)] = ids[:length]
            if len(ids) > length:
                row[-1] = self.end_id
        return rows

    def _word(self, word: str) -> list[int]:
        """A mark in a text is the mark, as in the original, where it stands by itself."""
        if word in (START, END):
            return [self.start_id if word == START else self.end_id]
        return [token.id for token in self._hf.model.tokenize(word)]


def _repaired(text: str) -> str:
    """As the released models were fed: broken encodings mended, HTML entities resolved, one space between words."""
    try:
        import ftfy
    except ImportError:
        raise RequestError(
            "a released CLIP reads text through one more package: pip install 'armchair[evaluate]'"
        ) from None
    text = ftfy.fix_text(text.encode("utf-8", "replace").decode())
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte: itself in Latin-1 where printable, else one from 256 on."""
    rest = (b for b in range(256) if b not in _PRINTABLE)
    return {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(rest)}
