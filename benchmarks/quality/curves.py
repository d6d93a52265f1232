"""Learning curves of many random configurations, each trained to its full budget whatever becomes of it.

Recorded once, a search can be replayed over them in a second instead of an hour, and what it stopped is known to have
been worth stopping or not: a run past saving is trained on here, as an ordinary loop would.
"""

import dataclasses
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp.results.parquet import build_table, read_file, write_parquet
from tune_amp.results.provenance import list_versions
from tune_amp.results.records import SCHEMAS
from tune_amp.results.run_folder import locate
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset
from tune_amp.trial.config import EpochMetrics, InputError, TrialConfig, field_types

# Curves are of the data as they are, with an imbalance of 1; files recorded before there was one have no such column.
_CONFIG_FIELDS = tuple(
    name for name in field_types(TrialConfig) if name not in ("imbalance", "accumulate", "task", "train")
)
_EPOCH_FIELDS = tuple(
    name for name in field_types(EpochMetrics) if not EpochMetrics.__dataclass_fields__[name].metadata["epoch_only"]
)
_CURVE = pa.field("curve", pa.int64(), nullable=False, metadata={"description": "number of the configuration, from 0"})
SCHEMA = pa.schema(
    [
        _CURVE,
        *(SCHEMAS["trials"].field(name) for name in _CONFIG_FIELDS),
        *(SCHEMAS["epochs"].field(name) for name in _EPOCH_FIELDS),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """Recorded learning curves of one space."""

    configs: tuple[TrialConfig, ...]
    epochs: tuple[tuple[EpochMetrics, ...], ...]
    """Of each configuration, ``max_epochs`` of them, without the trajectory of the loss scale."""
    origin: Mapping[str, Any]
    """Space, data, versions and seed, as recorded."""

    @property
    def max_epochs(self) -> int:
        """Epochs of every curve."""
        return len(self.epochs[0])


def sample_configs(
    space: SearchSpace, count: int, *, seed: int, train_images: int, shared: Mapping[str, Any]
) -> list[TrialConfig]:
    """``count`` random configurations of ``space``."""
    sampled = space.sample(count, seed=seed, train_images=train_images, max_epochs=shared["max_epochs"])
    return [TrialConfig(**{**shared, **settings}) for settings in sampled]


def record_curves(configs: Sequence[TrialConfig], dataset: Dataset, workers: int) -> Iterator[list[EpochMetrics]]:
    """Train every configuration to its full budget, on the CPU, one thread each; in the order given.

    Args:
        configs: with their ``max_epochs``.
        dataset: its test split is not read.
        workers: processes.
    """
    with multiprocessing.get_context("spawn").Pool(workers, _hold_data, (dataset,)) as pool:
        yield from pool.imap(_train_fully, configs)


def write_curves(
    path: Path, configs: Sequence[TrialConfig], curves: Sequence[Sequence[EpochMetrics]], origin: Mapping[str, Any]
) -> None:
    """Write one row a configuration and epoch."""
    rows = [
        {"curve": number, **vars(config), **vars(epoch)}
        for number, (config, epochs) in enumerate(zip(configs, curves, strict=True))
        for epoch in epochs
    ]
    write_parquet(build_table("curves", SCHEMA, rows, origin), path)


def load_curves(path: Path) -> Curves:
    """Read what ``write_curves`` wrote.

    Raises:
        InputError: the file is missing, damaged, or holds no curves.
    """
    path = locate(path, "curves")
    epochs: dict[int, list[EpochMetrics]] = {}
    configs: dict[int, TrialConfig] = {}
    content = read_file(path, "curves", SCHEMA)
    for row in content.rows:
        configs[row["curve"]] = TrialConfig(**{name: row[name] for name in _CONFIG_FIELDS})
        epochs.setdefault(row["curve"], []).append(EpochMetrics(**{name: row[name] for name in _EPOCH_FIELDS}))
    if not configs:
        raise InputError(f"{path}: must hold at least one curve")
    return Curves(configs=tuple(configs.values()), epochs=tuple(map(tuple, epochs.values())), origin=content.origin)


def describe_origin(space: SearchSpace, dataset: Dataset, *, seed: int) -> dict[str, Any]:
    """What the curves were recorded with."""
    return {
        "space_source": space.source,
        "space_text": space.text,
        "dataset": dataset.name,
        "data_hash": dataset.content_hash,
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation),
        "seed": seed,
        "device": "cpu, one thread a run",
        "versions": list_versions("tune_amp", "torch", "optuna", "numpy"),
    }


_data: Any = None  # of a worker process, placed once


def _hold_data(dataset: Dataset) -> None:
    import torch

    from tune_amp.training.training_data import TrainingData

    torch.set_num_threads(1)
    global _data  # noqa: PLW0603 - a pool's initializer has no other way
    _data = TrainingData(dataset.train, dataset.validation, dataset.num_classes, torch.device("cpu"))


def _train_fully(config: TrialConfig) -> list[EpochMetrics]:
    from tune_amp.training.run import TrainingRun

    run = TrainingRun(config, _data)
    epochs = [run.train_epoch() for _ in range(config.max_epochs)]
    return [dataclasses.replace(epoch, loss_scale_steps=(), loss_scale_values=(), val_recalls=()) for epoch in epochs]
