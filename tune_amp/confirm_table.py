"""Shows what fresh seeds said of the best configurations: a table, and what can and cannot be told from it.

Needs what a run's Parquet files hold and nothing else, so that a run can be shown again at any time.
"""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from tune_amp.config import MORE_IS_BETTER, TrialConfig, format_scale
from tune_amp.confirmed import DEFAULT_ID, Confirmation, ConfirmedRun
from tune_amp.console import say
from tune_amp.ranking import Gain, find_pair, measure_gain, without_seed
from tune_amp.results import BestRow, Provenance

_OBJECTIVE_NAMES = {"val_accuracy": "validation accuracy", "val_loss": "validation loss"}


def print_confirmed(
    console: Console, rows: Sequence[BestRow], provenance: Provenance, runs: Sequence[ConfirmedRun] = ()
) -> None:
    """Print the table of the confirmed configurations and the sentences below it.

    Args:
        console: where to.
        rows: of ``best.parquet``, those without confirmation included.
        provenance: of the run.
        runs: of ``confirm.parquet``, from which the interval of the gain is computed; without them it is left out.
    """
    console.print(render_confirmed(rows, provenance))
    for sentence in describe_confirmed(rows, provenance, runs):
        say(console, sentence)


def render_confirmed(rows: Sequence[BestRow], provenance: Provenance) -> Table:
    """Settings, then means over the seeds with half their 95 % intervals. Narrow enough for 80 columns.

    ``optimism`` is the search's own number minus the mean, in points of accuracy or in nats; ``tie`` says whether a
    configuration cannot be told from number 1.
    """
    objective = provenance.objectives[0]
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    validation = "val loss" if objective == "val_loss" else "validation %"
    for name in ("#", "lr", "batch", "prec", "scale", "interval", validation, "test %", "optimism", "tie"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.confirmation is not None:
            cells = _confirmed_cells(row.confirmation, objective)
            style = "green" if row.rank == 1 else "dim" if row.rank is None else None
            tie = "" if row.rank == 1 else {True: "yes", False: "no", None: ""}[row.confirmation.tied_with_best]
            table.add_row(_name(row), *settings_cells(row.trial.config), *cells, tie, style=style)
    return table


def settings_cells(config: TrialConfig) -> tuple[str, ...]:
    """Learning rate, batch size, precision, loss scale and growth interval, as the tables of a run show them."""
    interval = "" if config.growth_interval is None else str(config.growth_interval)
    return (f"{config.lr:.2e}", str(config.batch_size), config.precision, format_scale(config.init_scale), interval)


def describe_confirmed(
    rows: Sequence[BestRow], provenance: Provenance, runs: Sequence[ConfirmedRun] = ()
) -> Iterator[str]:
    """How the table came about, what is tied, what failed, and what searching gained: a sentence each."""
    confirmed = [row for row in rows if row.confirmation is not None]
    seeds = _count_seeds(confirmed)
    chosen = "validation ranks" if len(provenance.objectives) == 1 else "ranks are the search's"
    yield f"Means over {seeds} fresh seeds, each with its 95 % interval; {chosen}, the test set was read once a run."
    yield from _describe_ties(confirmed)
    for row in confirmed:
        assert row.confirmation is not None
        if row.confirmation.confirm_failures:
            yield f"{_title(row)} has no mean: {'; '.join(row.confirmation.confirm_failures)}."
    if any(row.trial.last and row.trial.last.epoch < row.trial.config.max_epochs for row in confirmed):
        yield "Optimism of those that ended early in the search compares with the epoch they had reached."
    gain = describe_gain(rows, provenance, runs)
    if gain:
        yield gain


def describe_gain(rows: Sequence[BestRow], provenance: Provenance, runs: Sequence[ConfirmedRun] = ()) -> str:
    """What searching gained over the tutorial's defaults, in one line; empty where these were not trained."""
    objective = provenance.objectives[0]
    winner, default = find_pair(rows)
    if winner is None or winner.confirmation is None or default is None or default.confirmation is None:
        return ""
    if without_seed(winner.trial.config) == without_seed(default.trial.config):
        return "gain     none: number 1 is the default configuration"
    means = [getattr(row.confirmation, f"{objective}_mean") for row in (winner, default)]
    if None in means:
        whose = "number 1" if means[0] is None else "the defaults"
        return f"gain     no number: {whose} did not complete on every seed"
    difference = means[0] - means[1]
    gain = measure_gain(rows, runs, objective)
    interval = "" if gain is None else f" (95 % interval {_show_interval(gain, objective)})"
    told = default.confirmation.tied_with_best is False if gain is None else gain.is_told_apart
    better = (difference > 0) == (objective in MORE_IS_BETTER)
    verdict = f"{'better' if better else 'worse'} than the defaults" if told else "not told from the defaults"
    unit = f" points of {_OBJECTIVE_NAMES[objective]}" if objective in MORE_IS_BETTER else " nats of validation loss"
    return f"gain     number 1 minus the defaults: {_show(difference, objective)}{unit}{interval}: {verdict}"


def _describe_ties(confirmed: Sequence[BestRow]) -> Iterator[str]:
    others = [
        row for row in confirmed if row.rank != 1 and row.confirmation and row.confirmation.tied_with_best is not None
    ]
    tied = [row for row in others if row.confirmation and row.confirmation.tied_with_best]
    method = "(Tukey's honestly significant difference, 95 %)"
    if tied:
        names = ["the default configuration" if row.rank is None else str(row.rank) for row in tied]
        yield f"Number 1 cannot be told from {_join(names)} {method}."
    elif others:
        whom = "the other" if len(others) == 1 else "all others"
        which = "" if 1 + len(others) == len(confirmed) else " that completed on every seed"
        yield f"Number 1 is told from {whom}{which} {method}."


def _confirmed_cells(confirmation: Confirmation, objective: str) -> tuple[str, str, str]:
    if confirmation.confirm_failures:
        failed = len(confirmation.confirm_failures)
        return f"{failed} of {len(confirmation.confirm_seeds)} failed", "", ""
    optimism = "" if confirmation.optimism is None else _show(confirmation.optimism, objective)
    return _show_mean(confirmation, objective), _show_mean(confirmation, "test_accuracy"), optimism


def _show_mean(confirmation: Confirmation, name: str) -> str:
    mean, high = getattr(confirmation, f"{name}_mean"), getattr(confirmation, f"{name}_high")
    if name == "val_loss":
        return f"{mean:.4f} ±{high - mean:.4f}"
    return f"{100 * mean:.2f} ±{100 * (high - mean):.2f}"


def _show(difference: float, objective: str) -> str:
    return f"{100 * difference:+.2f}" if objective in MORE_IS_BETTER else f"{difference:+.4f}"


def _show_interval(gain: Gain, objective: str) -> str:
    return f"{_show(gain.low, objective)} to {_show(gain.high, objective)}"


def _name(row: BestRow) -> str:
    return DEFAULT_ID if row.rank is None else str(row.rank)


def _title(row: BestRow) -> str:
    return "The default configuration" if row.rank is None else f"Number {row.rank}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _count_seeds(confirmed: Sequence[BestRow]) -> int:
    return max((len(row.confirmation.confirm_seeds) for row in confirmed if row.confirmation), default=0)
