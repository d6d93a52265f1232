"""Gives Tune its trials: first those left over from before the search was cut off, then new ones of the searcher."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.search import SearchGenerator

from tune_amp.search.history import RecordedTrial
from tune_amp.search.study import AmpSearch
from tune_amp.trial.config import TrialConfig, describe_error


class TrialSource(SearchGenerator):
    """Submits trials, never more at a time than there are slots at that moment.

    Ray's own wrapper gives a resumed trial a new id, which neither study nor journal holds. Its limit of trials at a
    time stays as it was at the start, even if nodes join or leave.

    Args:
        searcher: suggests the settings.
        count_slots: returns how many trials may run now.
        on_submit: is called with each trial, its Optuna number and its configuration.
        on_fault: is called with a line if the study cannot be written, after which no trial is submitted.
        past: trials that were submitted before the search was cut off; those that ended are only counted.
    """

    def __init__(
        self,
        searcher: AmpSearch,
        *,
        count_slots: Callable[[], int],
        on_submit: Callable[[Trial, int, TrialConfig], None],
        on_fault: Callable[[str], None],
        past: Sequence[RecordedTrial] = (),
    ) -> None:
        super().__init__(searcher)
        self._suggest, self._find_number = searcher.suggest_config, searcher.find_number
        self._count_slots, self._on_submit, self._on_fault = count_slots, on_submit, on_fault
        self._left_over = [trial for trial in past if trial.status is None and trial.unrecorded_end is None]
        self._counter = len(past) - len(self._left_over)
        self._submitted = len(past)
        self._live: set[str] = set()

    def create_trial_if_possible(self, experiment_spec: dict[str, Any]) -> Trial | None:
        """Return the next trial, or None if no slot is free."""
        # If a node has left and there are no slots, one is requested: else Tune would sleep instead of looking again.
        if len(self._live) >= max(1, self._count_slots()):
            return None
        if self._left_over:
            past = self._left_over.pop(0)
            return self._submit(experiment_spec, past.trial_id, past.place, past.config)
        trial_id = Trial.generate_id()
        try:
            config = self._suggest(trial_id)
        except OSError as error:
            self._on_fault(describe_error(error))
            self._finished = True
            return None
        self._submitted += 1
        return self._submit(experiment_spec, trial_id, self._submitted, config)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Free the slot of a trial that is over."""
        self._live.discard(trial_id)
        super().on_trial_complete(trial_id, result, error)

    def save_to_dir(self, dirpath: str, session_str: str = "", **kwargs: Any) -> None:
        """Save nothing: a search resumes from its own journal."""

    def _submit(self, spec: dict[str, Any], trial_id: str, place: int, config: TrialConfig) -> Trial:
        trial: Trial = _create_trial_from_spec(
            copy.deepcopy(spec) | {"config": vars(config).copy()},
            self._parser,
            experiment_tag=str(place),  # of which Tune keeps several copies
            trial_id=trial_id,
        )
        self._counter += 1
        self._live.add(trial_id)
        self._on_submit(trial, self._find_number(trial_id), config)
        return trial
