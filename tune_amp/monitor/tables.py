"""Tables of a run: the ranking of the search and the confirmation on fresh seeds, with the conclusions it supports.

They need only the content of a run's Parquet files, so a run can be shown again at any time.
"""

import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from tune_amp.results.confirmed import Confirmation
from tune_amp.results.gain import OBJECTIVE_NAMES, show_difference, without_seed
from tune_amp.results.provenance import Provenance
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.trial.config import COST_OBJECTIVES, RANKING_OBJECTIVES, read_setting
from tune_amp.trial.objectives import metric_of
from tune_amp.trial.text import format_number, format_setting, join_names, printable

ACCURACIES = ("val_accuracy", "test_accuracy")
"""Metrics shown in percent. The unit of a user's own metric is unknown."""
_TITLES = {
    **OBJECTIVE_NAMES,
    "test_accuracy": "test accuracy",
    "train_seconds": "training time",
    "peak_memory_bytes": "peak memory",
}


class WideTable:
    """A table without lines. Columns that do not fit the width follow below, beside the first column again.

    A title is broken between words if its column is narrower. Columns without a value are left out.

    Args:
        titles: titles of the columns; the first column names the rows.
        left: titles of the columns that are left-aligned, because they hold texts.
    """

    def __init__(self, titles: Sequence[str], left: Collection[str] = ()) -> None:
        self._titles, self._left = titles, left
        self._rows: list[tuple[list[Text], str | None]] = []

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        """Add a row; markup in a text has no effect."""
        texts = [cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells]
        assert len(texts) == len(self._titles)
        self._rows.append((texts, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, in as many parts as the width needs."""
        columns = [self._lay_out(place) for place in range(len(self._titles))]
        for number, places in enumerate(self._split([width for _, width in columns], options.max_width)):
            if number:
                yield Text()
            table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
            for place in places:
                justify: JustifyMethod = "left" if self._titles[place] in self._left else "right"
                table.add_column(Text(columns[place][0]), justify=justify, vertical="bottom", no_wrap=True)
            for cells, style in self._rows:
                table.add_row(*(cells[place] for place in places), style=style)
            yield table

    def _lay_out(self, place: int) -> tuple[str, int]:
        """Return the title of a column, broken between words, and the width of the column."""
        title = self._titles[place]
        needed = max((cells[place].cell_len for cells, _ in self._rows), default=0)
        lines = textwrap.wrap(title, max([needed, 1, *map(len, title.split())]), break_on_hyphens=False)
        return "\n".join(lines), max([needed, *map(len, lines)])

    def _split(self, widths: Sequence[int], most: int) -> list[list[int]]:
        """Return the columns of each part."""
        parts, used = [[0]], widths[0]
        for place in range(1, len(widths)):
            if not any(cells[place].plain for cells, _ in self._rows):
                continue
            if used + 1 + widths[place] > most and len(parts[-1]) > 1:
                parts.append([0])
                used = widths[0]
            parts[-1].append(place)
            used += 1 + widths[place]
        return parts


# ---- cells ----


def list_searched(provenance: Provenance) -> list[str]:
    """Return the names of the parameters that the run searched, as columns of its files have them."""
    from tune_amp.space.space import parse_space  # imports Optuna

    return [parameter.name for parameter in parse_space(provenance.space_source, provenance.space_text).parameters]


def list_metrics(objectives: Sequence[str], usual: Sequence[str] = RANKING_OBJECTIVES) -> list[str]:
    """Return the metrics that tables show: the objectives, then the usual ones."""
    return list(dict.fromkeys([*map(metric_of, objectives), *usual]))


def name_setting(name: str) -> str:
    """Return the title of a setting's column."""
    return name if "." in name else name.replace("_", " ")


def name_metric(name: str) -> str:
    """Return the title of a metric's column."""
    return _TITLES.get(name, name)


def format_metric(name: str, value: float | None) -> str:
    """Return a value of a metric: an accuracy in percent, a cost with its unit, others with four digits."""
    if value is None:
        return ""
    if name in ACCURACIES:
        return f"{value:.2%}"
    if name == "peak_memory_bytes":
        return f"{format_number(value / 2**20, 3)}MiB"
    return f"{format_number(value, 3)}s" if name == "train_seconds" else format_number(value, 4)


def format_clock(seconds: float) -> str:
    """Return a duration, such as ``2m05s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_metrics(names: Sequence[str], find_value: Callable[[str], float | None]) -> list[str]:
    """Return each metric that has a value, with its name."""
    return [f"{name} {format_metric(name, value)}" for name in names if (value := find_value(name)) is not None]


# ---- the search's own ranking ----


def render_ranking(ranked: Sequence[TrialRecord], provenance: Provenance) -> WideTable:
    """Render the ranking of a search: the searched settings, then validation metrics and costs."""
    searched, objectives = list_searched(provenance), provenance.objectives
    metrics = list_metrics(objectives)
    by_cost = any(name in COST_OBJECTIVES for name in metrics)
    titles = ["#", *map(name_setting, searched), "epochs", *map(name_metric, metrics), "skipped steps", "time"]
    table = WideTable(titles, left=["#"])
    for rank, trial in enumerate(ranked, start=1):
        last = trial.last
        assert last is not None  # a trial is ranked by its last report
        table.add_row(
            str(rank),
            *(format_setting(name, read_setting(trial.config, name)) for name in searched),
            f"{last.epoch}/{trial.config.max_epochs}",
            *(format_metric(name, last.find_value(name)) for name in metrics),
            str(last.skipped_steps),
            "" if by_cost else format_clock(trial.wall_seconds),
            style="green" if rank == 1 and not by_cost else None,  # a Pareto set has no single winner
        )
    return table


# ---- on fresh seeds ----


def render_confirmed(rows: Sequence[BestRow], provenance: Provenance) -> WideTable:
    """Render the searched settings, then means over the seeds with half their 95 % intervals.

    ``search - confirmed`` is the search's own number minus the mean, in points of accuracy or in the metric's unit.
    """
    objective, searched = provenance.objectives[0], list_searched(provenance)
    metrics = _list_confirmed_metrics(objective)
    table = WideTable(["#", *map(name_setting, searched), *map(name_metric, metrics), "search - confirmed"], left=["#"])
    for row in rows:
        if row.confirmation is not None:
            settings = (format_setting(name, read_setting(row.trial.config, name)) for name in searched)
            cells = _confirmed_cells(row.confirmation, objective, metrics)
            style = "green" if row.rank == 1 else "dim" if row.is_default else None
            table.add_row(re.sub(r"rank |[()]", "", row.name), *settings, *cells, style=style)
    return table


def describe_confirmed(rows: Sequence[BestRow], provenance: Provenance) -> Iterator[str]:
    """Yield one sentence each on how the table was made, on ties, on failures, and on the gain of the search."""
    confirmed = [(row, row.confirmation) for row in rows if row.confirmation is not None]
    chosen = "validation ranks" if len(provenance.objectives) == 1 else "ranks are the search's"
    tested = [name for name in _list_confirmed_metrics(provenance.objectives[0]) if name.startswith("test_")]
    if any(found.find_mean(name) is not None for _, found in confirmed for name in tested):
        chosen += ", the test set was read once a run"
    default = {without_seed(row.trial.config) for row, _ in confirmed if row.is_default}
    copies = [row.name for row, _ in confirmed if not row.is_default and without_seed(row.trial.config) in default]
    counts = sorted({len(found.confirm_seeds) for _, found in confirmed})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    yield f"Means over {seeds} fresh seeds, each with its 95 % interval; {chosen}."
    if copies:
        yield f"The settings of {join_names(copies)} are the default's, which a search tries first."
    yield from _describe_ties([row for row, _ in confirmed])
    for row, found in confirmed:
        if found.confirm_failures:
            yield f"{row.name.capitalize()} has no mean: {'; '.join(found.confirm_failures)}."
    if any(row.trial.last and row.trial.last.epoch < row.trial.config.max_epochs for row, _ in confirmed):
        yield "For trials that ended early, search - confirmed compares with the epoch that they had reached."
    for _, found in confirmed:
        if found.verdict:
            yield f"verdict  {found.verdict}"


def _list_confirmed_metrics(objective: str) -> list[str]:
    """Return the metrics of the confirmed table: on validation, then on the test set."""
    on_validation = list_metrics([objective], ["val_accuracy"])
    on_test = [name.replace("val_", "test_", 1) for name in on_validation if name.startswith("val_")]
    return [*on_validation, *on_test]


def _describe_ties(confirmed: Sequence[BestRow]) -> Iterator[str]:
    possible = [row.name for row in confirmed if row.may_be_best]
    behind = [row.name for row in confirmed if row.may_be_best is False]
    if len(possible) + len(behind) < 2:
        return
    method = " (paired t tests, corrected for their number, 95 %)"
    if len(possible) > 1:
        yield f"Any of {join_names(possible)} may be the best: none is shown to be worse than another{method}."
        method = ""
    if behind:
        yield f"Shown to be worse than another: {join_names(behind)}{method}."


def _confirmed_cells(confirmation: Confirmation, objective: str, metrics: Sequence[str]) -> tuple[str, ...]:
    if confirmation.confirm_failures:
        failed = len(confirmation.confirm_failures)
        return f"{failed} of {len(confirmation.confirm_seeds)} failed", *[""] * len(metrics)
    difference = "" if confirmation.optimism is None else show_difference(confirmation.optimism, objective)
    return *(_show_mean(confirmation, name) for name in metrics), difference


def _show_mean(confirmation: Confirmation, name: str) -> str:
    mean, high = confirmation.find_mean(name), confirmation.find_part(name, "high")
    if mean is None or high is None:
        return ""
    if name in ACCURACIES:
        return f"{mean:.2%} ±{100 * (high - mean):.2f}"
    # Decimals for four significant digits.
    digits = 3 - math.floor(math.log10(abs(mean))) if mean and math.isfinite(mean) else -1
    if 0 <= digits <= 6:
        return f"{mean:.{digits}f} ±{high - mean:.{digits}f}"
    return f"{mean:.4g} ±{high - mean:.2g}"
