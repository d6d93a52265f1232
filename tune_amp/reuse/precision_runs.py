"""Measures a chosen configuration in every precision, with the same seeds, data order and initial weights for all.

Runs have the device to themselves, one after the other. Their order is shuffled within each seed, so that drifts of the
machine affect all precisions. The test set is not read: choices see validation only.
"""

import collections
import contextlib
import dataclasses
import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tune_amp.reuse.precision_verdicts import BASELINE, LEAST_SEEDS, ComparedRun, MapCell
from tune_amp.training.cuda_graph import WARM_UP_STEPS
from tune_amp.training.data import Dataset, Split
from tune_amp.training.memory import is_out_of_memory, release_memory
from tune_amp.training.run import TrainingRun, estimate_epoch_seconds
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import SCALER_DEFAULTS, EpochMetrics, TrialConfig, TrialStatus
from tune_amp.trial.text import describe_error

BUDGET_SECONDS = 420.0
"""Seconds for all runs if the number of epochs is chosen here: 10 minutes with everything else."""
LEAST_EPOCHS = 2
"""Fewest epochs of a run. The first is not timed: it allocates memory, and on a GPU captures a graph."""
WARM_UP_BATCHES = 20
WARM_UP_EPOCHS = 4
ESTIMATES = 3
WARM_UP_IMAGES = 2048
"""Most validation images in a warm-up."""
LONGEST_WARM_UP_SECONDS = 10.0

TURNS = 6
"""Turns of each precision in a cell of the map. All six agree by chance with a probability of 3 % (the sign test)."""
TURN_SECONDS = 0.3
"""Seconds of a turn, unless a step takes longer."""
PILOT_EPOCHS = 2
LONGEST_CELL_SECONDS = 30.0
"""Most seconds of a precision in a cell. One that would need more is left out, such as fp16 convolutions on a CPU
without fp16 units."""
ENDLESS_EPOCHS = 1_000_000
"""Number of epochs of warm-ups and timed runs: a graph is captured only if enough steps are left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """The planned runs of a comparison."""

    arms: Mapping[str, TrialConfig]
    """The configuration in each precision, fp32 first; seed and epochs are still those of the search."""
    left_out: Mapping[str, str]
    """Precisions that would take too long, each with its reason."""
    seeds: tuple[int, ...]
    epochs: int
    seconds: float
    """Seconds that all runs will take, estimated by a warm-up."""

    @property
    def runs(self) -> list[tuple[int, str]]:
        """Seed and precision: seed by seed, so that an early end leaves pairs; shuffled within each seed."""
        names = [*self.arms]
        orders = {seed: random.Random(seed).sample(names, len(names)) for seed in self.seeds}  # noqa: S311 - no secret
        return [(seed, precision) for seed, order in orders.items() for precision in order]


# ---- what is compared ----


def choose_arms(config: TrialConfig, precisions: Sequence[str], device: torch.device) -> dict[str, TrialConfig]:
    """Return the configuration in fp32, which is first, and in each of ``precisions``.

    Scaler settings are the configuration's own if it is fp16, else GradScaler's defaults. On the CPU tf32 is left out,
    since its arithmetic is that of strict fp32.
    """
    same = (BASELINE, "tf32") if device.type == "cpu" else (BASELINE,)
    others = [precision for precision in precisions if precision not in same]
    return {precision: in_precision(config, precision) for precision in (BASELINE, *others)}


def in_precision(config: TrialConfig, precision: str) -> TrialConfig:
    """Return ``config`` with another precision, all else the same."""
    keeps_scaler = precision == config.precision == "fp16"
    scaler = {} if keeps_scaler else dict.fromkeys(SCALER_DEFAULTS)
    return dataclasses.replace(config, precision=precision, **scaler)  # type: ignore[arg-type]


def with_model(config: TrialConfig, model: str) -> TrialConfig:
    """Return ``config`` with ``model``; its own parameters belong to its own model."""
    return dataclasses.replace(config, model=model, own=config.own if model == config.model else {})


def fresh_seeds(config: TrialConfig, count: int) -> tuple[int, ...]:
    """Return seeds after the trial's own. That one selected this configuration, and so would favour its precision."""
    assert count >= LEAST_SEEDS
    return tuple((config.seed + number) % 2**63 for number in range(1, count + 1))


# ---- how long it takes ----


def plan_comparison(
    arms: Mapping[str, TrialConfig],
    dataset: Dataset,
    device: torch.device,
    *,
    seeds: Sequence[int],
    max_epochs: int | None = None,
    budget: float = BUDGET_SECONDS,
) -> ComparisonPlan:
    """Warm up every arm, and choose the number of epochs from the time that takes.

    It is ``max_epochs``, or else the configuration's own, as far as all runs fit into ``budget`` seconds.
    """
    epoch_seconds = dict.fromkeys(arms, 0.0)
    for precision, config in arms.items():
        with contextlib.suppress(Exception):  # out of memory, or a user's model: its runs fail soon, and record why
            epoch_seconds[precision] = warm_up(config, dataset, device)
    epochs, too_slow = max_epochs, list[str]()
    if epochs is None:
        wanted = max(LEAST_EPOCHS, arms[BASELINE].max_epochs)
        epochs, too_slow = fit_epochs(epoch_seconds, seeds=len(seeds), wanted=wanted, budget=budget)
    kept = {precision: config for precision, config in arms.items() if precision not in too_slow}
    return ComparisonPlan(
        arms=kept,
        left_out={name: f"an epoch would take about {epoch_seconds[name]:,.0f} s" for name in too_slow},
        seeds=tuple(seeds),
        epochs=epochs,
        seconds=len(seeds) * epochs * sum(epoch_seconds[precision] for precision in kept),
    )


def fit_epochs(epoch_seconds: Mapping[str, float], *, seeds: int, wanted: int, budget: float) -> tuple[int, list[str]]:
    """Return how many of the ``wanted`` epochs fit into ``budget`` seconds, and the precisions dropped, slowest first.

    No precision is dropped while two epochs of all fit. fp32 and the fastest of the others are never dropped, however
    long they take. ``epoch_seconds`` are those of an epoch in each precision, of which there are ``seeds`` runs each.
    """
    kept, gone = dict(epoch_seconds), list[str]()
    while (affordable := int(budget / max(1e-9, seeds * sum(kept.values())))) < LEAST_EPOCHS and len(kept) > 2:
        gone.append(max((name for name in kept if name != BASELINE), key=epoch_seconds.__getitem__))
        del kept[gone[-1]]
    return min(wanted, max(LEAST_EPOCHS, affordable)), gone


def warm_up(config: TrialConfig, dataset: Dataset, device: torch.device) -> float:
    """Train and validate on a few images as the runs do on all, so that libraries are loaded before any run is timed.

    Returns:
        Seconds that an epoch will take, validation and probe included.
    """
    steps = len(dataset.train) // config.batch_size
    batches = min(WARM_UP_BATCHES, steps)
    plain = _without_data_settings(config)
    estimate = _estimate_epoch(plain, dataset, device)
    if device.type == "cpu" and estimate * WARM_UP_EPOCHS * batches / steps > LONGEST_WARM_UP_SECONDS:
        return estimate
    train, validation = _take(dataset.train, batches * config.batch_size), _take(dataset.validation, WARM_UP_IMAGES)
    run = TrainingRun(plain, TrainingData(train, validation, dataset.num_classes, device))
    spent = [  # so far, scaled to all images
        metrics.train_seconds * steps / batches
        + metrics.val_seconds * len(dataset.validation) / len(validation)
        + metrics.probe_seconds
        for metrics in (run.train_epoch() for _ in range(WARM_UP_EPOCHS))
    ]
    del run
    _release(device)
    return min(later - earlier for earlier, later in itertools.pairwise(spent))  # as in _estimate_epoch


def _estimate_epoch(config: TrialConfig, dataset: Dataset, device: torch.device) -> float:
    """Return the shortest of several estimates, so that a brief load by other programs does not exclude a precision."""
    return min(estimate_epoch_seconds(config, dataset.train, dataset.num_classes, device) for _ in range(ESTIMATES))


def _release(device: torch.device) -> None:
    """Release cached memory of a GPU, so that each run finds the device as the first one did.

    A CPU has nothing to release, and looking for it takes a quarter of a second.
    """
    if device.type == "cuda":
        release_memory(device)


def _without_data_settings(config: TrialConfig) -> TrialConfig:
    """Return ``config`` for training on few images, without class weights or curriculum, and with endless epochs.

    Few images may lack a class that needs a weight, and a curriculum or accumulation would leave too few for a step.
    """
    return dataclasses.replace(
        config, class_weighting="none", curriculum="none", accumulate=1, max_epochs=ENDLESS_EPOCHS
    )


def _take(split: Split, count: int) -> Split:
    return split.select(range(min(count, len(split))))


# ---- the runs ----


def compare_runs(
    plan: ComparisonPlan, dataset: Dataset, device: torch.device, on_epoch: Callable[[EpochMetrics], None]
) -> Iterator[ComparedRun]:
    """Train the planned runs, one after the other, on data that stay on the device.

    ``on_epoch`` is called with the metrics of each epoch at its end.
    """
    data = TrainingData(dataset.train, dataset.validation, dataset.num_classes, device)
    for place, (seed, precision) in enumerate(plan.runs, start=1):
        config = dataclasses.replace(plan.arms[precision], seed=seed, max_epochs=plan.epochs)
        yield train_arm(config, data, place=place, on_epoch=on_epoch)
        _release(device)


def train_arm(
    config: TrialConfig,
    data: TrainingData,
    *,
    place: int = 1,
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None,
) -> ComparedRun:
    """Train ``config`` to its end. A failed run is a row with a status, and never stops the comparison."""
    epochs: list[EpochMetrics] = []
    status, error = TrialStatus.COMPLETED, None
    try:
        run = TrainingRun(config, data)
        for metrics in run.epochs():
            epochs.append(metrics)
            on_epoch(metrics)
        if run.hopeless is not None:
            status, error = TrialStatus.DIVERGED, f"{epochs[-1].state}: {run.hopeless}"
    except Exception as caught:  # a user's model may raise anything
        status = TrialStatus.OUT_OF_MEMORY if is_out_of_memory(caught) else TrialStatus.FAILED
        error = describe_error(caught)
    row = ComparedRun(precision=config.precision, seed=config.seed, place=place, status=status, error=error)
    return dataclasses.replace(row, **_summarise_epochs(epochs)) if epochs else row


def _summarise_epochs(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    seconds = [later.train_seconds - earlier.train_seconds for earlier, later in itertools.pairwise(epochs)]
    rates = tuple(metrics.samples_per_second for metrics in epochs)
    copied = ("val_accuracy", "val_loss", "peak_memory_bytes", "steps", "skipped_steps", "loss_scale", "loop")
    return {
        "epochs": len(epochs),
        "epoch_seconds": statistics.median(seconds) if seconds else None,
        "samples_per_second": statistics.median(rates[1:]) if seconds else None,
        "epoch_rates": rates,
        **{name: getattr(epochs[-1], name) for name in copied},
    }


# ---- the map ----


def measure_map(
    arms: Mapping[str, TrialConfig],
    dataset: Dataset,
    device: torch.device,
    models: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    turn_seconds: float,
) -> Iterator[list[MapCell]]:
    """Time each model at each batch size briefly in every precision, and yield the precisions of one cell at a time.

    All else is as in ``arms``, except that each image is trained on alike. Accuracy is not measured: the learning
    rate was chosen for another batch size.
    """
    plain = [_without_data_settings(config) for config in arms.values()]
    for model, batch_size in itertools.product(models, batch_sizes):
        configs = [dataclasses.replace(with_model(config, model), batch_size=batch_size) for config in plain]
        yield measure_cell(configs, dataset, device, turn_seconds)


def measure_cell(
    configs: Sequence[TrialConfig], dataset: Dataset, device: torch.device, turn_seconds: float
) -> list[MapCell]:
    """Prepare every precision, then time them in turns, each first in rotation. Those that cannot run have a reason."""
    cells = {
        config: MapCell(model=config.model, batch_size=config.batch_size, precision=config.precision)
        for config in configs
    }
    timed: dict[TrialConfig, TimedRun] = {}

    def leave_out(config: TrialConfig, reason: str | Exception) -> None:
        timed.pop(config, None)
        text = reason if isinstance(reason, str) else f"not available: {describe_error(reason)}"
        cells[config] = dataclasses.replace(cells[config], reason=text)

    for config in configs:
        try:
            if reason := explain_too_long(config, dataset, device):
                leave_out(config, reason)
            else:
                timed[config] = TimedRun(config, dataset, device, turn_seconds)
        except Exception as error:  # out of memory, or a user's model: the other precisions still run
            leave_out(config, error)
    for turn in range(TURNS):
        order = collections.deque(timed)
        order.rotate(-turn)
        for config in order:
            try:
                timed[config].take_turn()
            except Exception as error:
                leave_out(config, error)
    for config, run in timed.items():
        memory, loop = run.warm_up.peak_memory_bytes, run.warm_up.loop
        measured = {"turn_rates": tuple(run.rates), "peak_memory_bytes": memory, "loop": loop}
        cells[config] = dataclasses.replace(cells[config], **measured)  # type: ignore[arg-type]
    timed.clear()
    _release(device)  # graphs keep their memory
    return list(cells.values())


def explain_too_long(config: TrialConfig, dataset: Dataset, device: torch.device) -> str:
    """Return why a precision is left out of a cell; empty if its fewest steps are quick enough.

    Only the CPU is checked: a GPU takes hardly longer for a batch than for the few images of the estimate.
    """
    if device.type != "cpu":
        return ""
    steps = PILOT_EPOCHS + 1 + TURNS  # 1 is the warm-up
    seconds = _estimate_epoch(config, dataset, device) * steps * config.batch_size / len(dataset.train)
    return "" if seconds <= LONGEST_CELL_SECONDS else f"skipped: {steps} steps would take about {seconds:,.0f} s"


class TimedRun:
    """A precision of a cell, warmed up and ready to be timed turn by turn.

    It trains on as many of the training images as an epoch of ``turn_seconds`` needs.
    """

    def __init__(self, config: TrialConfig, dataset: Dataset, device: torch.device, turn_seconds: float) -> None:
        share = _choose_share(config, dataset, device, turn_seconds)
        self._run = TrainingRun(config, TrainingData(share, None, dataset.num_classes, device))
        self._images = len(share)
        self._turn_seconds = turn_seconds
        self.rates: list[float] = []
        """Training images a second of each turn."""
        for _ in range(WARM_UP_STEPS + 1):  # of at least one step each: by then a graph is captured, or never will be
            self.warm_up = self._run.train_epoch()
            """Metrics of the warm-up, before the cell's other precisions take memory on the device."""
            if device.type == "cpu" or self.warm_up.loop == "graph":
                break

    def take_turn(self) -> None:
        """Train whole epochs until the turn's seconds are over, even if training diverged: only time is measured."""
        images, seconds = 0, 0.0
        while seconds < self._turn_seconds:
            seconds += self._images / self._run.train_epoch().samples_per_second
            images += self._images
        self.rates.append(images / seconds)


def _choose_share(config: TrialConfig, dataset: Dataset, device: torch.device, turn_seconds: float) -> Split:
    """Return as many training images, in whole batches, as an epoch of about ``turn_seconds`` needs."""
    few = _take(dataset.train, config.batch_size)
    pilot = TrainingRun(config, TrainingData(few, None, dataset.num_classes, device), capture=None)
    rate = [pilot.train_epoch().samples_per_second for _ in range(PILOT_EPOCHS)][-1]
    least = 1 if device.type == "cpu" else WARM_UP_STEPS + 2
    steps = max(least, int(turn_seconds * rate / config.batch_size))
    return _take(dataset.train, min(steps, len(dataset.train) // config.batch_size) * config.batch_size)
