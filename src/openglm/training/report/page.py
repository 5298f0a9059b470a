"""One HTML page with everything in it: no script, no other file, no network; light and dark, on a phone, too."""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from openglm.training.report.figures import Theme
from openglm.training.report.reading import RunRecord
from openglm.training.report.summary import summary_rows
from openglm.version import __version__

#: In the head of every page: by it a folder is known to hold a report of ours.
GENERATOR = '<meta name="generator" content="openglm report">'
#: Interventions of a run that the page lists; the file has them all.
_MOST_EVENTS = 300

_CODE = re.compile("`([^`]+)`")

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #222; --soft: #666; --line: #e0e0e0; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #ddd; --soft: #999; --line: #33363c; --bad: #ff6e6e; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 52rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); }
nav a { color: inherit; margin-right: .9rem; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td.number { text-align: right; }
td.number, td.kind { white-space: nowrap; }
td.rollback, td.skip { color: var(--bad); }
figure { margin: 0; }
img { display: block; width: 100%; min-width: 27rem; max-width: 45rem; height: auto; }
footer { margin: 3rem 0 1rem; color: var(--soft); font-size: .85rem; }
code { overflow-wrap: anywhere; }
"""


def make_page(
    runs: Sequence[RunRecord], summaries: Sequence[dict[str, Any]], figures: Sequence[tuple[Theme, bytes, bytes]]
) -> str:
    """The page of one run or several. ``figures``: theme, PNG for light and PNG for dark screens."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    links = [(theme.name, theme.title) for theme, _, _ in figures]
    if any(run.interventions for run in runs):
        links.append(("interventions", "Interventions"))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        GENERATOR,
        f"<title>{escape(title)}: training report</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        "<nav>" + " ".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links) + "</nav>",
        _head_table(runs, summaries),
        *(_figure(theme, light, dark) for theme, light, dark in figures),
    ]
    if any(run.interventions for run in runs):
        parts.append('<h2 id="interventions">Interventions</h2>')
        parts += [_interventions(run, named=len(runs) > 1) for run in runs if run.interventions]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    folders = ", ".join(f"<code>{escape(str(run.folder))}</code>" for run in runs)
    parts.append(f"<footer>Drawn by openglm {__version__} from {folders} on {now}.</footer></body></html>")
    return "\n".join(parts) + "\n"


def _head_table(runs: Sequence[RunRecord], summaries: Sequence[dict[str, Any]]) -> str:
    columns = [dict(summary_rows(values)) for values in summaries]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = ""
    if len(runs) > 1:
        head = "<thead><tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr></thead>"
    rows = [
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(column.get(name, ''))}</td>" for column in columns) + "</tr>"
        for name in names
    ]
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _figure(theme: Theme, light: bytes, dark: bytes) -> str:
    day, night = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (light, dark))
    return (
        f'<h2 id="{theme.name}">{escape(theme.title)}</h2><p>{escape(theme.note)}</p>'
        f'<figure class="wide"><picture><source media="(prefers-color-scheme: dark)" srcset="{night}">'
        f'<img src="{day}" alt="{escape(theme.title)}"></picture></figure>'
    )


def _interventions(run: RunRecord, *, named: bool) -> str:
    shown = run.interventions[-_MOST_EVENTS:]
    rows = [
        f'<tr><td class="number">{one.samples:,}</td><td class="kind {escape(one.kind)}">{escape(one.name)}</td>'
        f"<td>{_with_code(one.text)}</td><td>{escape(one.time[:16].replace('T', ' '))}</td></tr>"
        for one in shown
    ]
    left = len(run.interventions) - len(shown)
    more = f"<p>{left:,} earlier ones are in <code>events.jsonl</code>.</p>" if left else ""
    title = f"<h3>{escape(run.name)}</h3>" if named else ""
    head = "<thead><tr><th>At sample</th><th>What</th><th>Why, and what followed</th><th>Time (UTC)</th></tr></thead>"
    return f'{title}{more}<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _with_code(text: str) -> str:
    """A text of ours as HTML: what stands in backticks becomes code."""
    return _CODE.sub(r"<code>\1</code>", escape(text))
