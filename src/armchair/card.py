"""The card of a bundle: what it draws, what it learned from, how well, and what it cannot do."""

from typing import Any


def render_card(info: dict[str, Any]) -> str:
    """Markdown from a bundle's info, as `armchair.train.run` writes it."""
    recipe = info["recipe"]
    lines = [f"# {info['name']}", "", recipe["description"], ""]
    data = info["data"]
    lines += ["## Learned from", "", f"{data['images']} captioned images. Licence: {data['licence']}", ""]
    lines += ["## How well", "", "| stage | figure | value |", "|---|---|---|"]
    for stage, figures in info["metrics"].items():
        lines += [f"| {stage} | {k} | {v} |" for k, v in figures.items() if k != "command"]
    commands = sorted({str(f["command"]) for f in info["metrics"].values() if "command" in f})
    lines += ["", "Made by: " + ", ".join(f"`{c}`" for c in commands) + " (held-out images, averaged weights).", ""]
    lines += ["## Limits", "", recipe["limits"] or "Not stated.", ""]
    return "\n".join(lines)
