"""Captions that are nearly right: with two attributes swapped, or one exchanged for another of its kind.

A contrastive model that only ever has to tell a caption from those of other pictures gets by on which words occur, and
not on which belongs to which (Yuksekgonul et al., 2023); a caption that differs in nothing else cannot be told so.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from armchair.errors import RequestError


class NearMisses:
    """Makes false captions from `kinds`, lists of words or phrases that could each stand where another does."""

    def __init__(self, kinds: Sequence[Sequence[str]]):
        self.kind_of: dict[str, int] = {}
        for i, kind in enumerate(kinds):
            if len(set(kind)) < 2:
                raise RequestError(f"near_misses: expected two or more different words of a kind, got {list(kind)}")
            for word in kind:
                if not word.strip() or word.lower() in self.kind_of:
                    raise RequestError(f"near_misses: {word!r} is empty, or there twice")
                self.kind_of[word.lower()] = i
        self.kinds = [tuple(word.lower() for word in kind) for kind in kinds]
        words = sorted(self.kind_of, key=len, reverse=True)  # the longest first: "light blue" before "blue"
        self.pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b") if words else None

    def of(self, caption: str, rng: np.random.Generator) -> str | None:
        """A caption that is false where `caption` is true; None where there is nothing to swap or exchange.

        The kind is drawn first, or a relation would be asked for as seldom as it has few words. Where two different
        words of it occur, half of the time they are swapped; else one is exchanged for another that is not there.
        """
        possible = []
        for kind in sorted({self.kind_of[m[0]] for m in self._words(caption)}):
            swapped, exchanged = self.swaps(caption, kind), self.exchanges(caption, kind)
            if swapped or exchanged:
                possible.append((swapped, exchanged))
        if not possible:
            return None
        swapped, exchanged = possible[int(rng.integers(len(possible)))]
        choices = swapped if swapped and (not exchanged or rng.random() < 0.5) else exchanged
        return choices[int(rng.integers(len(choices)))]

    def swaps(self, caption: str, kind: int | None = None) -> list[str]:
        """Every caption in which two different words of a kind (of kind number `kind`) have changed places."""
        found = self._words(caption, kind)
        pairs = itertools.combinations(found, 2)
        alike = [(a, b) for a, b in pairs if a[0] != b[0] and self.kind_of[a[0]] == self.kind_of[b[0]]]
        return [_with(caption.lower(), {a: b[0], b: a[0]}) for a, b in alike]

    def exchanges(self, caption: str, kind: int | None = None) -> list[str]:
        """Every caption in which one word has become another of its kind that the caption does not have."""
        found = self._words(caption, kind)
        present = {m[0] for m in found}
        choices = [(m, word) for m in found for word in self.kinds[self.kind_of[m[0]]] if word not in present]
        return [_with(caption.lower(), {m: word}) for m, word in choices]

    def _words(self, caption: str, kind: int | None = None) -> list[re.Match[str]]:
        found = self.pattern.finditer(caption.lower()) if self.pattern else []
        return [m for m in found if kind in (None, self.kind_of[m[0]])]


def _with(caption: str, words: dict[re.Match[str], str]) -> str:
    """The caption with other words at some places; an article before one is made to fit, or it would give it away."""
    for m in sorted(words, key=lambda m: -m.start()):  # from behind, so that places stay where they are
        before = caption[: m.start()]
        if article := re.search(r"\ban? $", before):
            before = before[: article.start()] + ("an " if words[m][0] in "aeiou" else "a ")
        caption = before + words[m] + caption[m.end() :]
    return caption
