"""The card of a bundle: what it draws, what it learned from, how well, and what it cannot do."""

from typing import Any

NO_FIGURES = ("command", "protocol", "measured")  # what else stands beside the figures of a stage


def render_card(info: dict[str, Any]) -> str:
    """Markdown from a bundle's info, as `armchair.train.run` writes it.

    `metrics` is stage -> figures, each a number, or {"value": number, "interval": [low, high]}; beside them stand
    `command`, what made them, and where there is more to say `protocol`, how.
    """
    recipe = info["recipe"]
    lines = [f"# {info['name']}", "", recipe["description"], ""]
    data = info["data"]
    lines += ["## Learned from", "", f"{data['images']} captioned images. Licence: {data['licence']}", ""]
    lines += ["## How well", "", "| stage | figure | value |", "|---|---|---|"]
    made: dict[str, list[str]] = {}
    protocols: dict[str, str] = {}
    for stage, figures in info["metrics"].items():
        lines += [f"| {stage} | {k} | {_shown(v)} |" for k, v in figures.items() if k not in NO_FIGURES]
        if "command" in figures:
            made.setdefault(str(figures["command"]), []).append(stage)
            protocols.setdefault(str(figures["command"]), str(figures.get("protocol", "")))
    lines += ["", "Made by:", ""] if made else []
    for command, stages in made.items():
        of_training = " (held-out images, averaged weights)" if command.startswith("armchair train") else ""
        lines.append(f"- {', '.join(stages)}: `{command}`{of_training}. {protocols[command]}".rstrip())
    lines += ["", "## Limits", "", recipe["limits"] or "Not stated.", ""]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    low, high = value["interval"]
    return f"{value['value']:.3f} [{low:.3f}, {high:.3f}]"
