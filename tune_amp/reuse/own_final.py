"""Trains a configuration of the user's own loop or task again, for use: the user's code decides what is measured."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tune_amp.reuse.final import (
    CARD_FILE,
    METRICS_FILE,
    Training,
    encode_text,
    join_for_training,
    save_weights,
    write_together,
)
from tune_amp.reuse.markdown import render_markdown
from tune_amp.training.amp import name_device
from tune_amp.training.data import Dataset
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.runs import NoData, start_run
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import COMMON_METRICS, EpochMetrics, TrialConfig, list_settings
from tune_amp.trial.consent import list_own_code
from tune_amp.trial.text import dump_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnResult:
    """What the user's own loop or task measured."""

    config: TrialConfig
    epochs: Sequence[EpochMetrics]
    tested: Mapping[str, float]
    """Metrics of the test set after the last epoch; empty if the user's own loop yields none while confirming."""
    device: str


class OwnTraining(Training):
    """Trains ``config``: a task on training and validation data together, a loop on whatever it trains on.

    Args:
        config: from ``results.load_best``; it names the user's own loop or task.
        dataset: the data that ``config`` was chosen on; empty for a loop.
        device: where to train.
        objectives: metrics that a loop must yield.
    """

    def __init__(
        self, config: TrialConfig, dataset: Dataset, device: torch.device, objectives: Sequence[str] = ()
    ) -> None:
        self._config, self._dataset, self._device = config, dataset, device
        data: TrainingData | NoData = NoData(device=device)
        if config.train is None:
            data = TrainingData(join_for_training(dataset, config.imbalance), None, dataset.num_classes, device)
        super().__init__(start_run(config, data, objectives=objectives, confirming=True))

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The trained models: that of a task, and those that a loop keeps, by name."""
        return self._run.models if isinstance(self._run, OwnRun) else {"model": self._run.model}

    def test(self) -> OwnResult:
        """Return the metrics of the test set, which was read once, after the last epoch."""
        columns = self._run.test(self._dataset.test)
        numbers = {name: value for name, value in columns.items() if isinstance(value, float)}
        name = name_device(self._device)
        tested = {**numbers, **columns["metrics"]}
        return OwnResult(config=self._config, epochs=self._epochs, tested=tested, device=name)

    def save(self, folder: Path, result: OwnResult, source: dict[str, Any], card: str) -> list[str]:
        """Write the fp32 weights of each model (safetensors), the metrics as JSON, and the card; return their names.

        Raises:
            InputError: a file cannot be written, or exists already; the contents of ``folder`` are unchanged.
        """
        about = {**source, "config": dataclasses.asdict(result.config), "device": result.device}
        measured = {"epochs": list(map(dataclasses.asdict, result.epochs)), "tested": dict(result.tested)}
        text = dump_json(about | measured, indent=2) + "\n"
        writers = {f"{name}.safetensors": save_weights(model) for name, model in self.models.items()}
        writers |= {CARD_FILE: encode_text(card), METRICS_FILE: encode_text(text)}
        write_together(folder, writers)
        return list(writers)


def describe_own_card(result: OwnResult, models: Sequence[str], **source: Any) -> str:
    """Return the card as Markdown, from ``templates/own_card.md``.

    Args:
        result: what was measured.
        models: names of the models whose weights are saved.
        source: ``best``, ``rank`` and ``versions``, as in ``card.CardSource``.
    """
    last = result.epochs[-1]
    return render_markdown(
        "own_card.md",
        result=result,
        models=models,
        config=result.config,
        last=last,
        measured={name: value for name, value in list_metrics(last).items() if name not in result.tested},
        settings=list_settings(result.config),
        own_code=list_own_code(vars(result.config))[1::2],
        **source,
    )


def list_metrics(metrics: EpochMetrics) -> dict[str, float]:
    """Return what an epoch measured: the common metrics that it has, and the user's own."""
    common = {name: getattr(metrics, name) for name in COMMON_METRICS}
    known = {name: value for name, value in common.items() if value is not None and not math.isnan(value)}
    return known | dict(metrics.metrics)
