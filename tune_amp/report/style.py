"""The style of a report's figures: colours and symbols by meaning, and the shared layout."""

import dataclasses
import html
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import OWN, TrialStatus
from tune_amp.trial.text import format_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colour:
    """One meaning in both colour schemes."""

    light: str
    dark: str


PALETTE: Mapping[str, Colour] = types.MappingProxyType(
    {
        "ink": Colour(light="#1d232b", dark="#e8eaee"),
        "muted": Colour(light="#56606d", dark="#a4adb9"),
        "grid": Colour(light="#e3e6ea", dark="#2c333d"),
        "surface": Colour(light="#fdfdfc", dark="#14181d"),
        "raised": Colour(light="#f4f5f6", dark="#1c2128"),
        "pale": Colour(light="#c4d9ec", dark="#2b4865"),
        "completed": Colour(light="#1f6fb5", dark="#6db1f2"),
        "stopped": Colour(light="#868d98", dark="#7f8896"),
        "diverged": Colour(light="#c8391f", dark="#ff7f66"),
        "out_of_memory": Colour(light="#9b4585", dark="#dc94c6"),
        "failed": Colour(light="#946300", dark="#e2b343"),
        "interrupted": Colour(light="#087b6b", dark="#4cc2b0"),
    }
)
"""Colour of each meaning; the names of statuses are among the keys. All but grid and pale have a contrast of at least 3
with the background, texts one of 4.5. Symbols distinguish statuses too."""

SYMBOLS: Mapping[TrialStatus, str] = types.MappingProxyType(
    {
        TrialStatus.COMPLETED: "circle",
        TrialStatus.STOPPED: "triangle-down",
        TrialStatus.DIVERGED: "x",
        TrialStatus.OUT_OF_MEMORY: "square",
        TrialStatus.FAILED: "cross",
        TrialStatus.INTERRUPTED: "diamond",
    }
)

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

CLEAR = "rgba(0,0,0,0)"


def colour_of(name: str) -> str:
    """Return the colour in the light scheme, as figures hold it. The page replaces it by the reader's scheme."""
    return PALETTE[name].light


_TEXT = {"family": FONT, "size": 13, "color": colour_of("ink")}
_AXIS = {
    "automargin": True,
    "title": {"standoff": 10, "font": {"color": colour_of("muted"), "size": 13}},
    **dict.fromkeys(("gridcolor", "linecolor", "tickcolor"), colour_of("grid")),
    "showline": True,
    "ticks": "outside",
    "zeroline": False,
}
_LAYOUT = {
    "margin": {"l": 10, "r": 14, "t": 12, "b": 10},
    "paper_bgcolor": CLEAR,
    "plot_bgcolor": CLEAR,
    "font": _TEXT,
    "hovermode": "closest",
    "hoverlabel": {
        "bgcolor": colour_of("surface"),
        "bordercolor": colour_of("muted"),
        "font": _TEXT,
        "align": "left",
    },
    "title": {"x": 0, "xref": "paper", "yref": "paper", "font": {"size": 14}, "automargin": True, "pad": {"b": 8}},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
    "xaxis": _AXIS,
    "yaxis": _AXIS,
}


def build_figure(traces: Iterable[go.Scatter | go.Bar], **layout: Any) -> go.Figure:
    """Return a figure of ``traces`` in the style that all figures share, as wide as its place on the page."""
    return go.Figure(data=[*traces], layout={"template": {"layout": _LAYOUT}, **layout})


def list_statuses(trials: Sequence[TrialRecord]) -> list[TrialStatus]:
    """Return the statuses that occur, in the order of ``TrialStatus``."""
    return [status for status in TrialStatus if any(trial.status is status for trial in trials)]


def format_status(status: TrialStatus) -> str:
    """Return a status in words."""
    return str(status).replace("_", " ")


def style_line(trial: TrialRecord, *, is_winner: bool) -> dict[str, Any]:
    """Return colour and width of a trial's line."""
    return {"color": colour_of("ink" if is_winner else trial.status), "width": 3 if is_winner else 1.3}


def describe_trial(trial: TrialRecord) -> str:
    """Return the hover text of a trial, escaped."""
    lines = [f"<b>{escape_text(trial.trial_name)}</b>", escape_text(_describe_end(trial))]
    config = trial.config
    lines.append(f"lr {config.lr:.3g}, batch {config.batch_size}, {escape_text(config.precision)}")
    if config.init_scale is not None:
        backoff = f", backoff {config.backoff_factor:g}" if config.backoff_factor != 0.5 else ""
        lines.append(f"from {format_scale(config.init_scale)}, interval {config.growth_interval}{backoff}")
    for name, value in config.own.items():
        lines.append(escape_text(f"{OWN}{name} {f'{value:.4g}' if isinstance(value, float) else value}"))
    return "<br>".join(lines)


def _describe_end(trial: TrialRecord) -> str:
    status = format_status(trial.status)
    epochs = f"epoch {trial.last.epoch} of {trial.config.max_epochs}" if trial.last else "before its first report"
    return f"{status}, {epochs}"


def escape_text(text: str) -> str:
    """Return a text of a file without the tags that plotly interprets."""
    return html.escape(text, quote=False)
