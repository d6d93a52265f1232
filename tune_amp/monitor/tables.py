"""Shows the confirmation of the best configurations on fresh seeds: a table, and the conclusions it supports or not.

It needs only the content of a run's Parquet files, so a run can be shown again at any time.
"""

import re
from collections.abc import Iterator, Sequence

from rich.table import Table

from tune_amp.results.confirmed import Confirmation
from tune_amp.results.gain import show_difference
from tune_amp.results.records import BestRow, Provenance
from tune_amp.trial.config import TrialConfig, format_scale
from tune_amp.trial.text import join_names


def render_confirmed(rows: Sequence[BestRow], provenance: Provenance) -> Table:
    """Render settings, then means over the seeds with half their 95 % intervals. The table fits 80 columns.

    ``optimism`` is the search's own number minus the mean, in points of accuracy or in nats.
    """
    objective = provenance.objectives[0]
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    validation = "val loss" if objective == "val_loss" else "validation %"
    for name in ("#", "lr", "batch", "prec", "scale", "interval", validation, "test %", "optimism"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.confirmation is not None:
            cells = _confirmed_cells(row.confirmation, objective)
            style = "green" if row.rank == 1 else "dim" if row.is_default else None
            table.add_row(re.sub(r"rank |[()]", "", row.name), *settings_cells(row.trial.config), *cells, style=style)
    return table


def settings_cells(config: TrialConfig) -> tuple[str, ...]:
    """Return learning rate, batch size, precision, loss scale and growth interval, as the tables of a run show them."""
    interval = "" if config.growth_interval is None else str(config.growth_interval)
    return (f"{config.lr:.2e}", str(config.batch_size), config.precision, format_scale(config.init_scale), interval)


def describe_confirmed(rows: Sequence[BestRow], provenance: Provenance) -> Iterator[str]:
    """Yield one sentence each on how the table was made, on ties, on failures, and on the gain of the search."""
    confirmed = [row for row in rows if row.confirmation is not None]
    chosen = "validation ranks" if len(provenance.objectives) == 1 else "ranks are the search's"
    seeds = _count_seeds(confirmed)
    yield f"Means over {seeds}, each with its 95 % interval; {chosen}, the test set was read once a run."
    yield from _describe_ties(confirmed)
    for row in confirmed:
        assert row.confirmation is not None
        if row.confirmation.confirm_failures:
            yield f"{row.name.capitalize()} has no mean: {'; '.join(row.confirmation.confirm_failures)}."
    if any(row.trial.last and row.trial.last.epoch < row.trial.config.max_epochs for row in confirmed):
        yield "Optimism of those that ended early in the search compares with the epoch they had reached."
    for row in confirmed:
        assert row.confirmation is not None
        if row.confirmation.verdict:
            yield f"verdict  {row.confirmation.verdict}"


def _describe_ties(confirmed: Sequence[BestRow]) -> Iterator[str]:
    judged = [row for row in confirmed if row.may_be_best is not None]
    behind = [row.name for row in judged if not row.may_be_best]
    possible = [row.name for row in judged if row.may_be_best]
    method = "(paired t tests, corrected for their number, 95 %)"
    if len(judged) > 1 and len(possible) > 1:
        yield f"Any of {join_names(possible)} may be the best: none is shown to be worse than another {method}."
    if len(judged) > 1 and behind:
        yield (
            f"Shown to be worse than another: {join_names(behind)} {'' if len(possible) > 1 else method}".rstrip() + "."
        )


def _confirmed_cells(confirmation: Confirmation, objective: str) -> tuple[str, str, str]:
    if confirmation.confirm_failures:
        failed = len(confirmation.confirm_failures)
        return f"{failed} of {len(confirmation.confirm_seeds)} failed", "", ""
    optimism = "" if confirmation.optimism is None else show_difference(confirmation.optimism, objective)
    return _show_mean(confirmation, objective), _show_mean(confirmation, "test_accuracy"), optimism


def _show_mean(confirmation: Confirmation, name: str) -> str:
    mean, high = getattr(confirmation, f"{name}_mean"), getattr(confirmation, f"{name}_high")
    if name == "val_loss":
        return f"{mean:.4f} ±{high - mean:.4f}"
    return f"{100 * mean:.2f} ±{100 * (high - mean):.2f}"


def _count_seeds(confirmed: Sequence[BestRow]) -> str:
    counts = sorted({len(row.confirmation.confirm_seeds) for row in confirmed if row.confirmation})
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} fresh seeds"
