"""Results of confirming the winners of a search: the columns of ``confirm.parquet`` and ``best.parquet``.

Imports nothing heavy, so that a report or a card can be made wherever pyarrow is installed.
"""

import dataclasses
from collections.abc import Mapping

from tune_amp.trial.config import TrialStatus, described, spread
from tune_amp.trial.objectives import metric_of

DEFAULT_ID = "default"
"""``trial_id`` of the tutorial's configuration, which is confirmed along with the winners."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmedRun:
    """A configuration trained again at its full budget on a fresh seed: one row of ``confirm.parquet``."""

    trial_id: str = described("trial of the search that is confirmed, or default: the tutorial's configuration")
    seed: int = described("of weights and data order; the same seeds for every configuration")
    status: TrialStatus = described("how the run ended: completed, diverged, out_of_memory or failed")  # noqa: RUF009 (a field)
    error: str | None = described("one line: why it did not complete", default=None)
    val_loss: float | None = described("mean validation loss after the last epoch, in fp32", unit="nats", default=None)
    val_accuracy: float | None = described("share of validation images classified correctly, in fp32", default=None)
    test_loss: float | None = described("mean test loss, in fp32; the test set is read once", unit="nats", default=None)
    test_accuracy: float | None = described("share of test images classified correctly, in fp32", default=None)
    test_recalls: tuple[float, ...] = described("test accuracy within each class", default=())
    train_seconds: float = described("time in training steps", unit="s", default=0.0)
    device: str = described("device the run computed on: cpu, or the GPU's name", default="cpu")
    metrics: Mapping[str, float] = spread("values that the user's own task or training loop measured, a column each")

    def find_value(self, objective: str) -> float | None:
        """Return the value of an objective or a metric of the test set; None if it was not measured."""
        name = metric_of(objective)
        value: float | None = self.metrics.get(name, getattr(self, name, None))
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """Results of a configuration on fresh seeds: the columns that ``best.parquet`` has in addition to the trial's.

    Means, deviations and intervals are over the seeds, on the same images (``statistics.mean_interval``). They are null
    if a run did not complete: a configuration that diverges on one seed is not scored by the others.
    """

    confirm_seeds: tuple[int, ...] = described("seeds on which the configuration was trained again")
    confirm_failures: tuple[str, ...] = described("a line for each of these runs that did not complete", default=())
    val_loss_mean: float | None = described("mean validation loss over the seeds", unit="nats", default=None)
    val_loss_std: float | None = described("its sample standard deviation", unit="nats", default=None)
    val_loss_low: float | None = described("lower end of its 95 % interval (Student's t)", unit="nats", default=None)
    val_loss_high: float | None = described("upper end of its 95 % interval", unit="nats", default=None)
    val_accuracy_mean: float | None = described("mean validation accuracy over the seeds", default=None)
    val_accuracy_std: float | None = described("its sample standard deviation", default=None)
    val_accuracy_low: float | None = described("lower end of its 95 % interval (Student's t)", default=None)
    val_accuracy_high: float | None = described("upper end of its 95 % interval", default=None)
    test_accuracy_mean: float | None = described("mean test accuracy over the seeds", default=None)
    test_accuracy_std: float | None = described("its sample standard deviation", default=None)
    test_accuracy_low: float | None = described("lower end of its 95 % interval (Student's t)", default=None)
    test_accuracy_high: float | None = described("upper end of its 95 % interval", default=None)
    tied_with_best: bool | None = described(
        "whether it may be the truly best: no other confirmed configuration is shown to be better (one-sided paired t "
        "tests on the seeds of both, Bonferroni's correction, 95 %); null where a run did not complete",
        default=None,
    )
    optimism: float | None = described(
        "the search's own value of the first objective minus the confirmed mean; null for the default", default=None
    )
    verdict: str | None = described("of rank 1 only: whether searching gained anything, a sentence", default=None)
    verdict_kind: str | None = described(
        "better, indistinguishable, worse or unknown: the best other configuration, beside the default", default=None
    )
    gain: float | None = described(
        "the best configuration but the default, minus the default: mean paired difference of the first objective",
        default=None,
    )
    gain_low: float | None = described(
        "lower end of its 95 % interval (paired t, corrected for the choice of the best)", default=None
    )
    gain_high: float | None = described("upper end of its 95 % interval", default=None)
    means: Mapping[str, float] = spread("NAME_mean, _std, _low and _high of the user's own values, a column each")

    def find_mean(self, objective: str) -> float | None:
        """Return the mean of an objective or a metric of the test set; None if there is none."""
        return self.find_part(objective, "mean")

    def find_part(self, objective: str, part: str) -> float | None:
        """Return the ``mean``, ``std``, ``low`` or ``high`` of an objective or a metric of the test set."""
        name = f"{metric_of(objective)}_{part}"
        value: float | None = self.means.get(name, getattr(self, name, None))
        return value
