"""The command that draws a picture again."""

import shlex
from collections.abc import Mapping

from armchair.sample.next_token import Settings
from armchair.sample.pipeline import Record
from armchair.sample.png import slug

CANDIDATES = 4  # what `armchair draw` draws without being told


def command_of(
    record: Record,
    candidates: int,
    keep: int = 0,
    *,
    defaults: Settings,
    model: str | None = None,
    source: str | None = None,
) -> str:
    """The command line, for a POSIX shell, that draws `record`'s picture among its `candidates`, of which `keep` stay.

    `defaults` are the model's own settings, which are left out, as is everything that goes without saying. `model`:
    what --model is to be, None for the default. `source`: the prompt of the picture that was completed, whose file is
    named by it.
    """
    options: dict[str, object] = {}
    if model is not None:
        options["--model"] = model
    if candidates != CANDIDATES:
        options["-n"] = candidates
    if keep not in (0, candidates):
        options["--keep"] = keep
    if record.seed:
        options["--seed"] = record.seed
    for name, default in vars(defaults).items():
        if (value := getattr(record.settings, name)) != default:
            options[f"--{name.replace('_', '-')}"] = value
    if record.kind == "complete" and record.rectangle is not None:
        options["--redraw"] = ",".join(map(str, record.rectangle))
        return _line("complete", options, [f"{slug(source or record.prompt)}.png", record.prompt])
    return _line("draw", options, [record.prompt])


def _line(command: str, options: Mapping[str, object], words: list[str]) -> str:
    flags = [str(part) for pair in options.items() for part in pair]
    if any(word.startswith("-") for word in words):
        return shlex.join(["armchair", command, *flags, "--", *words])
    return shlex.join(["armchair", command, *words, *flags])
