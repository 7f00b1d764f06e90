"""Words to choose from within a prompt: `a {red|green} {heart|star}` is all of its combinations, as a table."""

import itertools
import math
from dataclasses import dataclass

from armchair.errors import RequestError

MAX_COMBINATIONS = 36  # pictures of a table


@dataclass(frozen=True, kw_only=True)
class PromptGrid:
    """A prompt in parts: `texts` around the `choices`, of which there is one fewer."""

    texts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]

    @property
    def combinations(self) -> int:
        return math.prod(map(len, self.choices))

    def prompts(self) -> list[str]:
        """Every combination, the last choice changing fastest. A choice of nothing leaves no second space behind."""
        return [self._prompt(words) for words in itertools.product(*self.choices)]

    def _prompt(self, words: tuple[str, ...]) -> str:
        prompt = self.texts[0]
        for word, text in zip(words, self.texts[1:], strict=True):
            if not word and (not prompt or prompt.endswith(" ")):
                text = text.removeprefix(" ")
            prompt += word + text
        return prompt


def parse_prompt(prompt: str) -> PromptGrid:
    """Find the `{a|b|c}` of a prompt; one without braces is itself alone.

    Choices do not nest. Spaces around a choice do not count, one may be empty, and those that are there twice are once.
    Raises RequestError for a brace without its other, for one choice alone, and for more than MAX_COMBINATIONS.
    """
    texts, choices, rest = [], [], prompt
    while True:
        text, opened, rest = rest.partition("{")
        if "}" in text:
            raise RequestError('a "}" without its "{": words to choose from are written {red|green}')
        texts.append(text)
        if not opened:
            break
        inside, closed, rest = rest.partition("}")
        if not closed:
            raise RequestError('a "{" without its "}": words to choose from are written {red|green}')
        if "{" in inside:
            raise RequestError("choices cannot stand within choices; write them out: {dark red|light red|blue}")
        words = tuple(dict.fromkeys(word.strip() for word in inside.split("|")))
        if len(words) < 2:
            raise RequestError(f"{{{inside}}} leaves nothing to choose: write at least two, as in {{red|green}}")
        choices.append(words)
    grid = PromptGrid(texts=tuple(texts), choices=tuple(choices))
    if grid.combinations > MAX_COMBINATIONS:
        sizes = " × ".join(str(len(words)) for words in choices)
        raise RequestError(f"{sizes} = {grid.combinations} combinations; a table has at most {MAX_COMBINATIONS}")
    return grid
