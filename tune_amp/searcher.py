"""How a trial's outcome is told to Optuna.

Ray's OptunaSearch tells every trial that ASHA stopped as complete, leaves one whose metric is NaN running for ever, and
tells a crash as a failure that the sampler forgets. Each outcome is told here for what it is.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from tune_amp.config import TrialConfig, TrialStatus
from tune_amp.space import SearchSpace
from tune_amp.stopping import WORST_VALUES, objective_mode
from tune_amp.trainable import RUNNING

STUDY_FILE = "study.journal"
HOPELESS = (TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY)
STATUS_ATTRIBUTE = "status"


class AmpSearch(OptunaSearch):
    """OptunaSearch with a sampler for this space and an honest end for every trial.

    - completed: its value, at the full budget;
    - stopped: pruned, with the epoch it reached and its values on the way;
    - diverged or out of memory: complete with the worst value and an infeasible constraint, which TPE ranks below every
      other trial (a pruned one's rank would depend on how long it ran);
    - failed or interrupted: failed, which the sampler does not count, since the settings are not to blame.

    Args:
        space: what is searched.
        shared: the ``TrialConfig`` fields that all trials have in common.
        objective: ``val_accuracy`` or ``val_loss``.
        seed: of the sampler.
        folder: where the study is kept, in Optuna's own journal file, for ``optuna-dashboard`` to open.
        study_name: the run's name.
    """

    def __init__(
        self,
        space: SearchSpace,
        shared: Mapping[str, Any],
        *,
        objective: str,
        seed: int,
        folder: Path,
        study_name: str,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce every study and trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # about group, since Optuna 2.8
            # Multivariate TPE models a conditional space group by group; ungrouped it would sample it parameter by
            # parameter.
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=space.is_conditional, constant_liar=True
            )
        self._reported_epochs: dict[str, int] = {}
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
        super().__init__(
            functools.partial(suggest_config, space, dict(shared)),  # the standard pickle must take it: no lambda
            metric=objective,
            mode=objective_mode(objective),
            sampler=sampler,
            storage=storage,
            study_name=study_name,
        )

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return cast("optuna.Study", self._ot_study)  # made by OptunaSearch, as it was given a space

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The settings of the next trial: every field of ``TrialConfig``, and nothing else."""
        suggested = super().suggest(trial_id)
        assert suggested is not None  # only a searcher that limits concurrency itself suggests nothing
        return {field.name: suggested[field.name] for field in dataclasses.fields(TrialConfig)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the value of an epoch."""
        value = result.get(self.metric)
        if value is not None and math.isfinite(value) and trial_id not in self._completed_trials:
            self._report(trial_id, value, result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell how a trial ended."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        status = find_status(result, error=error)
        trial.set_user_attr(STATUS_ATTRIBUTE, str(status))
        trial.set_user_attr("trial_id", trial_id)
        if status in HOPELESS:
            trial.set_constraint(str(status), 1.0)
            self.study.tell(trial, WORST_VALUES[self.metric])
        elif status in (TrialStatus.COMPLETED, TrialStatus.STOPPED):
            assert result is not None  # find_status read it there
            # Tune tells of a trial's end instead of its last epoch, so that epoch is reported here.
            self._report(trial_id, result[self.metric], result["epoch"])
            if status is TrialStatus.COMPLETED:
                self.study.tell(trial, result[self.metric])
            else:
                self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def close(self) -> None:
        """Tell every trial that was never told as interrupted: nothing stays running in the study."""
        for trial_id in self._ot_trials.keys() - self._completed_trials:
            self.on_trial_complete(trial_id)

    def _report(self, trial_id: str, value: float, epoch: int) -> None:
        """Report an epoch once: a trial that is tried again repeats some, and Optuna keeps the first value."""
        if epoch > self._reported_epochs.get(trial_id, 0):
            self._reported_epochs[trial_id] = epoch
            self._ot_trials[trial_id].report(value, epoch)


def suggest_config(space: SearchSpace, shared: Mapping[str, Any], trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """All settings of a trial: the searched and fixed ones of the space, the shared ones, defaults for the rest."""
    return vars(TrialConfig(**{**shared, **space.suggest(trial)})).copy()


def find_status(result: Mapping[str, Any] | None, *, error: bool) -> TrialStatus:
    """How a trial ended, from its last result.

    Args:
        result: the last result, None or without a status where there was none.
        error: whether Ray counts it as an error: its process died, and retries were used up.
    """
    if error:
        return TrialStatus.FAILED
    status = (result or {}).get("status", RUNNING)
    if status != RUNNING:
        return TrialStatus(status)
    # Tune sets ``done`` where the scheduler stopped the trial; Ctrl-C and the time budget leave it unset.
    return TrialStatus.STOPPED if (result or {}).get("done") else TrialStatus.INTERRUPTED
