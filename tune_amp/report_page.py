"""The HTML of a report: one file that needs no network, and pieces to fill it with. Every text is escaped here."""

import base64
import hashlib
import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from tune_amp.console import printable
from tune_amp.report_style import PALETTE

MARK = '<meta name="generator" content="tune_amp report">'
"""In the head of each report: only a file that has it is replaced by another report."""


class Html(str):
    """A text that is HTML already, and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Html:
    """A text as HTML shows it."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; ``class_`` is the attribute ``class``, an attribute that is None is left out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{told}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("".join(escape(part) for part in parts))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, winner: int | None = None, long: str | None = None
) -> Html:
    """A table that scrolls within itself where it is wider than the page.

    Args:
        columns: the headings.
        rows: as many cells each.
        winner: index of the row that stands out.
        long: the column whose texts are wrapped.
    """
    head = tag("tr", *(tag("th", name, scope="col") for name in columns))
    body = []
    for index, row in enumerate(rows):
        cells = [
            tag("td", cell, class_="long" if name == long else None) for name, cell in zip(columns, row, strict=True)
        ]
        body.append(tag("tr", *cells, class_="winner" if index == winner else None))
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=f"table: {', '.join(columns)}")


def definitions(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and what they are."""
    return tag("dl", *(tag(name, child) for pair in pairs for name, child in zip(("dt", "dd"), pair, strict=True)))


def command(words: Iterable[str]) -> Html:
    """A command line, broken between its words, without characters that hide or reverse a part of it."""
    spans = [tag("span", printable(shlex.quote(word))) for word in words]
    return tag("pre", Html(" ".join(spans)), class_="command", tabindex=0)


def section(anchor: str, title: str, *content: object) -> Html:
    """A part of the page under its heading."""
    return tag(
        "section", tag("h2", title, id=f"{anchor}-title"), *content, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def figure(
    caption: object,
    plots: Mapping[str, tuple[str, go.Figure]],
    *,
    layout: str | None = None,
    key: object = "",
) -> Html:
    """One or several plots, and below how to read them.

    Args:
        caption: how to read it.
        plots: an id that no other has -> what the plot shows, for those who cannot see it, and the plot.
        layout: class of the grid in which several stand.
        key: from ``line_key``.
    """
    places = join(
        tag("div", id=name, class_="plot", role="img", aria_label=label, style=f"height: {plot.layout.height}px")
        for name, (label, plot) in plots.items()
    )
    data = [embed_json(f"{name}-data", plot.to_plotly_json()) for name, (_, plot) in plots.items()]
    inner = places if layout is None else tag("div", places, class_=layout)
    return tag("figure", key, inner, *data, tag("figcaption", caption))


def line_key(groups: Iterable[tuple[str, str]], *, winner: bool, marks: str | None = None) -> Html:
    """What the lines of a figure are, with a box for each group that shows or hides it.

    Args:
        groups: colour, which is also the traces' ``legendgroup``, and name.
        winner: whether a thick line stands out.
        marks: name of the marks on the lines, where there are any.
    """

    def box(group: str, sign: Html, name: str) -> Html:
        return tag("label", Html(f'<input type="checkbox" checked data-group="{escape(group)}">'), sign, name)

    boxes = [
        box(colour, tag("i", class_="line", style=f"background: var(--{colour})"), name) for colour, name in groups
    ]
    if winner:
        boxes.append(tag("span", tag("i", class_="line thick"), "rank 1"))
    if marks:
        boxes.append(box("overflow", tag("i", "\u00d7", class_="cross", aria_hidden="true"), marks))
    return tag("div", *boxes, class_="key")


def embed_json(name: str, value: Any) -> Html:
    """Data for the page's script. ``<`` is written as JSON's own escape, so that no text in it can end the element.

    Numbers that JSON does not know are left out as null: no search writes them where figures look, but a file may.
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return [_finite(item) for item in value]


def is_page(path: Path) -> bool:
    """Whether ``path`` is a file that ``build_page`` made, and no link."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(1_000)


def build_page(title: str, content: Iterable[object]) -> str:
    """The whole file: styles, the library, the content, the script that draws.

    The policy in its head lets a browser run these two scripts and no other, and load nothing: a text that got past
    the escaping could still do nothing.
    """
    here = Path(__file__).parent
    scripts = [get_plotlyjs(), (here / "report.js").read_text(encoding="utf-8")]
    styles = _list_colours() + (here / "report.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash_source, scripts))}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    library, drawing = (f"<script>{text}</script>" for text in scripts)
    dark = {colour.light: colour.dark for colour in PALETTE.values()}
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            MARK,
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{styles}</style>",
            library,
            "</head>",
            "<body>",
            tag("main", *content),
            embed_json("dark-colours", dark),
            drawing,
            "</body>",
            "</html>",
            "",
        ]
    )


def _hash_source(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _list_colours() -> str:
    """The palette as variables of CSS, in both schemes."""

    def listed(scheme: str) -> str:
        return " ".join(f"--{name}: {getattr(colour, scheme)};" for name, colour in PALETTE.items())

    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {listed('dark')} }} }}"
    return f":root {{ color-scheme: light dark; {listed('light')} }}\n{dark}\n"
