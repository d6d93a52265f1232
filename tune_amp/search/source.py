"""Where Tune gets its trials: those left over from before the search was cut off, then new ones of the searcher."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.search import SearchGenerator
from ray.tune.search.variant_generator import format_vars

from tune_amp.search.history import PastTrial
from tune_amp.search.study import AmpSearch
from tune_amp.trial.config import describe_error


class TrialSource(SearchGenerator):
    """Submits trials, never more at a time than there are slots now.

    Ray's own wrapper gives a trial that goes on a new id, under which nobody would know it, and its limit of trials at
    a time is that of the beginning, whatever nodes join or leave.

    Args:
        searcher: suggests.
        count_slots: says how many trials may run now.
        on_submit: is told of each trial, and of its Optuna number.
        on_fault: is told, in a line, that there will be no more, because the study cannot be written.
        past: trials that were submitted before the search was cut off; those that are over are counted only.
    """

    def __init__(
        self,
        searcher: AmpSearch,
        *,
        count_slots: Callable[[], int],
        on_submit: Callable[[Trial, int], None],
        on_fault: Callable[[str], None],
        past: Sequence[PastTrial] = (),
    ) -> None:
        super().__init__(searcher)
        self._suggest, self._find_number = searcher.suggest, searcher.find_number
        self._count_slots, self._on_submit, self._on_fault = count_slots, on_submit, on_fault
        self._left_over = [trial for trial in past if trial.status is None]
        self._counter = len(past) - len(self._left_over)
        self._submitted = len(past)
        self._live: set[str] = set()

    def create_trial_if_possible(self, experiment_spec: dict[str, Any]) -> Trial | None:
        """The next trial, or None where no slot is free."""
        # Where there is none, because a node has left, one is asked for: Tune would sleep instead of looking again.
        if len(self._live) >= max(1, self._count_slots()):
            return None
        if self._left_over:
            past = self._left_over.pop(0)
            return self._submit(experiment_spec, past.trial_id, past.place, vars(past.config).copy())
        trial_id = Trial.generate_id()
        try:
            settings = self._suggest(trial_id)
        except OSError as error:
            self._on_fault(describe_error(error))
            self._finished = True
            return None
        self._submitted += 1
        return self._submit(experiment_spec, trial_id, self._submitted, settings)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial is over, and its slot free."""
        self._live.discard(trial_id)
        super().on_trial_complete(trial_id, result, error)

    def save_to_dir(self, dirpath: str, session_str: str = "", **kwargs: Any) -> None:
        """Save nothing: a search goes on from its own journal."""

    def _submit(self, spec: dict[str, Any], trial_id: str, place: int, settings: dict[str, Any]) -> Trial:
        trial: Trial = _create_trial_from_spec(
            copy.deepcopy(spec) | {"config": settings},
            self._parser,
            evaluated_params=settings,
            experiment_tag=f"{place}_{format_vars(settings)}",
            trial_id=trial_id,
        )
        self._counter += 1
        self._live.add(trial_id)
        self._on_submit(trial, self._find_number(trial_id))
        return trial
