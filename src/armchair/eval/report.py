"""A report: an HTML page with its pictures beside it, and the same figures as JSON. Nothing comes from elsewhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from armchair.errors import RequestError
from armchair.eval.figures import Cell, Figure, Section

PAGE, DATA = "index.html", "report.json"

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { margin-bottom: 0; } h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2.5rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: right; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
small, .protocol, .skipped { color: var(--soft); }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
nav a { margin-right: 1rem; } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="protocol">{{ subtitle }}</p>
<nav>{% for s in sections %}<a href="#{{ s.key }}">{{ s.title }}</a>{% endfor %}</nav>
<dl>{% for name, value in about %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for s in sections %}
<section id="{{ s.key }}">
<h2>{{ s.title }}</h2>
{% if s.skipped %}<p class="skipped">Not measured: {{ s.skipped }}</p>{% else %}
{% for t in s.tables %}
<div class="table" tabindex="0" role="region" aria-label="{{ t.title }}"><table>
<caption>{{ t.title }}{% if t.features %} <small>over {{ t.features }}</small>{% endif %}</caption>
<thead><tr>{% for c in t.columns %}<th scope="col">{{ c }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in t.rows %}<tr>{% for c in row %}<td>{{ cell(c) }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
{% endfor %}
{% for p in s.pictures %}<figure><img src="{{ p.name }}.png" alt="{{ p.alt }}" loading="lazy">
<figcaption><small>{{ p.alt }}</small></figcaption></figure>{% endfor %}
{% endif %}
<p class="protocol">{{ s.protocol }}
{% if not s.skipped %}<small>({{ "%.0f"|format(s.seconds) }} s)</small>{% endif %}</p>
</section>
{% endfor %}
</body>
</html>
"""


def write_report(folder: Path, title: str, about: Mapping[str, str], sections: Sequence[Section]) -> Path:
    """The page's path. The pictures and the JSON are written before it."""
    try:
        from jinja2 import Environment
    except ImportError:
        raise RequestError("evaluation needs more packages: pip install 'armchair[evaluate]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
    (folder / DATA).write_text(json.dumps(to_json(title, about, sections), indent=1) + "\n", encoding="utf-8")
    template = Environment(autoescape=True).from_string(TEMPLATE)
    subtitle = "In brackets: 95 % intervals. How each figure was made is said under it."
    page = template.render(title=title, subtitle=subtitle, about=about.items(), sections=sections, cell=shown)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def to_json(title: str, about: Mapping[str, str], sections: Sequence[Section]) -> dict[str, Any]:
    """Everything of the report that is not a picture."""

    def plain(cell: Cell) -> Any:
        return cell.to_json() if isinstance(cell, Figure) else cell

    return {
        "title": title,
        "about": dict(about),
        "sections": [
            {
                "key": s.key,
                "title": s.title,
                "protocol": s.protocol,
                "skipped": s.skipped,
                "seconds": s.seconds,
                "tables": [
                    {
                        "title": t.title,
                        "features": t.features,
                        "columns": list(t.columns),
                        "rows": [[plain(c) for c in row] for row in t.rows],
                    }
                    for t in s.tables
                ],
                "pictures": [f"{p.name}.png" for p in s.pictures],
            }
            for s in sections
        ],
    }


def shown(cell: Cell) -> str:
    """A cell as people read it."""
    if not isinstance(cell, Figure):
        return str(cell)
    value = _number(cell.value)
    return value if cell.interval is None else f"{value} [{_number(cell.interval[0])}, {_number(cell.interval[1])}]"


def _number(x: float) -> str:
    return f"{x:.4g}" if abs(x) >= 1 else f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"
