"""The report's page: a little HTML, one style sheet, no script, nothing from outside. Text is escaped unless it is `Html`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""

    __slots__ = ()


def escape(value: object) -> Html:
    """``value`` as HTML; None as nothing."""
    return value if isinstance(value, Html) else Html("" if value is None else html.escape(str(value)))


def tag(name: str, *children: object, kind: str = "") -> Html:
    """An element with escaped children and an optional class."""
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{attribute}>{''.join(map(escape, children))}</{name}>")


def page(title: str, *sections: Html) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(title: str, *parts: Html | None, note: str = "") -> Html:
    """A titled section; nothing at all when no part has anything to show."""
    shown = [part for part in parts if part]
    if not shown:
        return Html("")
    return tag("section", tag("h2", title), tag("p", note, kind="note") if note else Html(""), *shown)


def cards(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Headline numbers: (what, number, remark) each."""
    return tag(
        "div",
        *(
            tag("div", tag("span", what), tag("b", number), tag("small", remark), kind="card")
            for what, number, remark in entries
        ),
        kind="cards",
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> Html:
    """A table that scrolls sideways where it must; nothing without rows."""
    if not rows:
        return Html("")
    head = tag("thead", tag("tr", *(tag("th", heading) for heading in headings))) if headings else Html("")
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", head, tag("tbody", *body), kind=kind), kind="scroll")


def figure(drawing: str, caption: str, wide: bool = False) -> Html:
    """An inline drawing with its caption."""
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return tag("figure", Html(drawing), tag("figcaption", caption), kind="wide" if wide else "")


def grid(*parts: Html | None) -> Html:
    """Parts side by side as the width allows; nothing without parts."""
    shown = [part for part in parts if part]
    return tag("div", *shown, kind="grid four" if len(shown) == 4 else "grid") if shown else Html("")


def details(title: str, *parts: Html, opened: bool = False) -> Html:
    """A part that opens on a click."""
    shown = [part for part in parts if part]
    if not shown:
        return Html("")
    return Html(f"<details{' open' if opened else ''}>{tag('summary', title)}{''.join(shown)}</details>")


def quote(text: str | None, heading: object, remark: object = "", kind: str = "") -> Html:
    """A text as it is: its lines and spaces kept, scrolling when it is long."""
    body = (
        tag("i", "not in this run")
        if text is None
        else Html(f'<div class="text" dir="auto" tabindex="0">{escape(text)}</div>')
    )
    return tag("div", tag("div", tag("span", heading), tag("small", remark), kind="head"), body, kind=f"quote {kind}")


STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --muted: #667085; --line: #dfe3ea;
  --good: #18794e; --bad: #c02b2b; --warn: #8a5a00; --warn-paper: #fff6e0;
  --c1: #2f6fed; --c2: #e0752d; --c3: #1f9d6b; --c4: #c13a8a; --c5: #7a5ad6; --c6: #12909f; --c7: #a08a12; --c8: #94614a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12151b; --card: #1a1f28; --ink: #e6e9ef; --muted: #97a1b3; --line: #2e3644;
  --good: #5fcf9a; --bad: #ff8080; --warn: #f0c674; --warn-paper: #2b2618;
  --c1: #6ea1ff; --c2: #f2995c; --c3: #55c998; --c4: #ec7bbd; --c5: #a992f2; --c6: #4fc3d1; --c7: #cfba4e; --c8: #c49580; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.5rem; letter-spacing: -0.005em; }
p { margin: 0.4rem 0; max-width: 75ch; }
.note, .lead { color: var(--muted); max-width: 90ch; }
.badge { display: inline-block; padding: 0.1rem 0.6rem; border-radius: 1rem; border: 1px solid; font-size: 0.85rem;
  font-weight: 600; vertical-align: 0.25em; margin-left: 0.6rem; color: var(--warn); }
.badge.finished { color: var(--good); } .badge.failed { color: var(--bad); }
.warnings { background: var(--warn-paper); border-left: 4px solid var(--warn); border-radius: 6px; padding: 0.6rem 1rem;
  margin: 1.25rem 0; list-style: none; } .warnings li { margin: 0.3rem 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 0.75rem; margin: 1.5rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem 1rem; }
.card span { display: block; color: var(--muted); font-size: 0.82rem; }
.card b { display: block; font-size: 1.4rem; font-weight: 650; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.card small { color: var(--muted); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.4rem 0.8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; font-size: 0.82rem; }
th:first-child, td:first-child { text-align: left; }
table.words th, table.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
table.words td:first-child { white-space: nowrap; width: 1%; padding-right: 2rem; }
table.settings td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.82rem; padding: 0.2rem 0.8rem; }
table.settings td:last-child { color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 0.9rem; margin: 0.75rem 0; }
.grid.four { grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; max-height: 460px; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: 0.85rem; margin-top: 0.4rem; }
details { margin: 0.6rem 0; } summary { cursor: pointer; font-weight: 600; padding: 0.25rem 0; }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem; margin: 0.75rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 0.6rem; margin-top: 0.6rem; }
.quote { min-width: 0; border-left: 3px solid var(--line); padding-left: 0.7rem; }
.quote.chosen { border-color: var(--good); } .quote.rejected { border-color: var(--bad); }
.quote .head { display: flex; gap: 0.6rem; justify-content: space-between; font-size: 0.82rem; font-weight: 600; }
.quote .head small { color: var(--muted); font-weight: 400; font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; font-size: 0.9rem; }
.pair > .note { font-size: 0.82rem; font-variant-numeric: tabular-nums; margin: 0.6rem 0 0; max-width: none; }
footer { margin-top: 3rem; color: var(--muted); font-size: 0.85rem; }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #111; --muted: #555; --line: #ccc; --good: #18794e;
    --bad: #c02b2b; --warn: #8a5a00; --warn-paper: #fff; --c1: #2f6fed; --c2: #e0752d; --c3: #1f9d6b; --c4: #c13a8a;
    --c5: #7a5ad6; --c6: #12909f; --c7: #a08a12; --c8: #94614a; }
  main { max-width: none; padding: 0; } body { font-size: 11px; }
  figure, .pair, .card, tr { break-inside: avoid; } h2, h2 + .note { break-after: avoid; }
  .scroll { overflow: visible; } th, td { padding: 0.2rem 0.35rem; } h2 { margin-top: 1.5rem; }
  .grid { grid-template-columns: repeat(3, 1fr); } .text { max-height: none; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
