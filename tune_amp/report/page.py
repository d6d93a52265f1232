"""The page of a report: one HTML file that needs no network, and the plain values that fill its template.

``templates/report.html`` escapes every text.
"""

import base64
import functools
import gzip
import hashlib
import shlex
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go  # type: ignore[import-untyped]
from plotly.io.json import to_json_plotly  # type: ignore[import-untyped]
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from tune_amp.report.style import PALETTE
from tune_amp.trial.text import printable

MARK = '<meta name="generator" content="tune_amp report">'
"""Tag in the head of each report; a new report replaces only a file that has it."""

TEMPLATES = Path(__file__).parent / "templates"


class Table(NamedTuple):
    """A table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    winner: int | None = None
    """Index of the highlighted column."""
    long: str | None = None
    """Column whose texts are wrapped."""
    heading: str = ""
    summary: str = ""
    """Line that opens the table, which is collapsed at first."""
    note: str = ""
    """Paragraph below the table."""


class LineKey(NamedTuple):
    """The key of a figure's lines, with which a reader shows or hides them."""

    groups: Sequence[tuple[str, str]]
    """Colour (also the traces' ``legendgroup``) and name of each group of lines."""
    winner: bool
    """Whether a thick line marks the winner."""
    marks: str | None = None
    """Name of the marks on the lines."""


class Figure(NamedTuple):
    """One or several plots, with a caption below on how to read them."""

    caption: str
    plots: Mapping[str, tuple[str, go.Figure]]
    """Unique id -> alternative text and plot."""
    layout: str = ""
    """CSS class of the grid of several plots."""
    key: LineKey | None = None


class Section(NamedTuple):
    """A part of the page: paragraphs, then figures, then tables."""

    texts: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


class Finding(NamedTuple):
    """A sentence on the first screen."""

    text: str
    is_warning: bool = False


class Summary(NamedTuple):
    """The first screen: what was searched, and the result."""

    searched: Sequence[tuple[str, str]]
    statuses: Sequence[tuple[str, str]]
    """Number of trials of each status, and its colour."""
    verdict: str
    """Headline of the verdict, in large type."""
    measured: str = ""
    """Rest of the verdict: what was measured."""
    settings: Mapping[str, str] = types.MappingProxyType({})
    """Name -> settings, of rank 1 and of the defaults."""
    findings: Sequence[Finding] = ()
    reuse: Sequence[str] = ()
    """Words of the command that trains rank 1."""
    unranked: str = ""
    """Reason why there is no such command."""


def quote_words(words: Iterable[str]) -> list[str]:
    """Return a command line's words, quoted for a shell, without characters that hide or reverse a part of it."""
    return [printable(shlex.quote(word)) for word in words]


def is_page(path: Path) -> bool:
    """Return whether ``path`` is a file that ``render_page`` made, and not a link."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(1_000)


def render_page(*, sections: Mapping[str, tuple[str, str, Section]], **values: Any) -> str:
    """Fill ``templates/report.html``. Its policy lets a browser run only plotly.js and the page's own script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [figure for _, _, section in sections.values() for figure in section.figures]
    plots = {name: plot for figure in figures for name, (_, plot) in figure.plots.items()}
    drawing = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    library, library_source = _pack_library()
    policy = (
        f"default-src 'none'; script-src {library_source} {_hash_source(drawing)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("report.html").render(
        values,
        sections=sections,
        library=library,
        # plotly writes null for a number that JSON lacks. A search writes none into plotted columns, but a file may.
        plots=pack(to_json_plotly(plots)),
        drawing=drawing,
        mark=MARK,
        policy=policy,
        palette=PALETTE,
        dark_colours={colour.light: colour.dark for colour in PALETTE.values()},
    )


@functools.cache
def _pack_library() -> tuple[str, str]:
    """Return plotly.js packed, 1.8 MB for 4.8 MB, and its source in a policy."""
    library = get_plotlyjs()
    return pack(library), _hash_source(library)


def pack(text: str) -> str:
    """Return a text compressed by gzip, in base 85, which takes 6% less than base 64.

    Without ``<``, which a comma replaces, nothing in it can end or open an element of the page.
    """
    return base64.b85encode(gzip.compress(text.encode(errors="replace"), mtime=0)).decode().replace("<", ",")


def _hash_source(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
