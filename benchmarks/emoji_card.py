"""Measured figures into a bundle's card, with the commands that made them.

    armchair evaluate BUNDLE --data emoji:val emoji:heldout --train emoji \\
        --suite memorising --pictures 600 --train-pictures 20000 --report memorising
    python benchmarks/emoji_labels.py BUNDLE --json labels.json
    python benchmarks/emoji_card.py BUNDLE --report memorising --labels labels.json

The figures go into the metrics of bundle.json, and the card is rendered anew; the weights stay byte for byte. Only what
was measured on this very bundle is taken, and what is there of the same kind is replaced. A bundle's fingerprint covers
its card and its metrics, so it is another one afterwards, and `armchair redraw` no longer finds the bundle of pictures
that were drawn before: measure, write the card, then publish. The fingerprint of what was measured stays beside the
figures, so that figures can be added one report after the other.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from armchair.bundle import Bundle, find_bundle, read_bundle, write_bundle
from armchair.card import render_card
from armchair.errors import RequestError
from armchair.eval.memorising import NEAR
from armchair.eval.report import DATA
from armchair.sample.weights import exported

SHORT = 16  # hex digits of a fingerprint in a report


def of_memorising(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage -> figures of a report's section on memorising: near-copies by pixels and by codes."""
    sections = [s for s in report["sections"] if s["key"] == "memorising" and not s["skipped"]]
    if not sections:
        raise RequestError("the report has nothing on memorising: armchair evaluate … --suite memorising --train …")
    (table,) = (t for t in sections[0]["tables"] if t["title"] == NEAR)
    about = report["about"]
    made = {
        "command": about["made by"],
        "protocol": f"Shares of pictures. {sections[0]['protocol']}",
        "measured": about["bundle"].rpartition(", ")[2],
    }
    stages = {}
    for by in ("by pixels", "by codes"):
        column = table["columns"].index(by)
        cells = {f"{row[0]} ({row[1]})": row[column] for row in table["rows"]}
        figures = {name: _figure(cell["value"], cell["interval"]) for name, cell in cells.items()}
        stages[f"near-copies {by}"] = {**figures, **made}
    return stages


def of_labels(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of what emoji_labels.py wrote: shares whose nearest picture bears the label, the style."""
    names = {"best": f"best of {found['settings']['candidates']}", "first": "first", "round trip": "round trip"}
    made = {
        "command": found["command"],
        "protocol": (
            "The share of prompts whose drawing is nearest, by the cosine of features of "
            f"{found['features']}, to a picture of the data that bears the label, or the style, that was asked for."
        ),
        "measured": found["bundle"]["fingerprint"][:SHORT],
    }
    stages = {}
    for asked in ("label", "style"):
        figures = {}
        for group, table in found["groups"].items():
            for kind, name in names.items():
                cell = table[kind][asked]
                figures[f"{group} ({cell['prompts']}), {name}"] = _figure(cell["share"], cell["interval"])
        stages[f"right in {asked}"] = {**figures, **made}
    return stages


def _figure(value: float, interval: list[float]) -> dict[str, Any]:
    return {"value": round(value, 5), "interval": [round(x, 5) for x in interval]}


def write_card(bundle: Bundle, stages: dict[str, dict[str, Any]]) -> None:
    """Put figures into a bundle and render its card. Raises RequestError for those of another bundle."""
    if exported(bundle) is not None:
        raise RequestError(f"{bundle.path} was exported: write the card of the bundle that it came from")
    metrics = bundle.info["metrics"]
    known = {bundle.fingerprint[:SHORT], *(figures.get("measured") for figures in metrics.values())}
    for stage, figures in stages.items():
        if figures["measured"] not in known:
            raise RequestError(
                f"{stage}: measured on a bundle {figures['measured']}, this one is {bundle.fingerprint[:SHORT]}"
            )
    info = {**bundle.info, "metrics": {**metrics, **stages}}
    info = json.loads(json.dumps(info, sort_keys=True))  # in the order in which bundle.json has it
    weights = {part: bundle.weights(part) for part in bundle.parts}
    write_bundle(
        bundle.path, info=info, card=render_card(info), text_tokenizer=bundle.text_tokenizer, weights=weights
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--report", type=Path, metavar="DIR", help="of armchair evaluate, with memorising")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="of emoji_labels.py")
    args = parser.parse_args()
    stages: dict[str, dict[str, Any]] = {}
    if args.report:
        stages |= of_memorising(json.loads((args.report / DATA).read_text(encoding="utf-8")))
    if args.labels:
        stages |= of_labels(json.loads(args.labels.read_text(encoding="utf-8")))
    if not stages:
        parser.error("give --report or --labels")
    path = find_bundle(args.bundle)
    try:
        write_card(read_bundle(path), stages)
    except RequestError as error:
        parser.error(str(error))
    print(read_bundle(path).card)


if __name__ == "__main__":
    sys.exit(main())
