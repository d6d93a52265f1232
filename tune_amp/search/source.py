"""Gives Tune its trials: first those that an interrupted search left unfinished, then new ones of the searcher."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.search import SearchAlgorithm

from tune_amp.cluster.failures import find_cause, find_status
from tune_amp.search.history import RecordedTrial
from tune_amp.search.study import AmpSearch
from tune_amp.trial.config import TrialConfig, TrialStatus
from tune_amp.trial.text import describe_error


class KeptWorkers:
    """Workers of the last trials of a search, for its confirmation: in a private Ray they live while they are here."""

    def __init__(self) -> None:
        self._is_open = True
        self.actors: list[Any] = []

    def keep(self, trial: Trial, status: TrialStatus) -> None:
        """Keep the worker of a trial that has ended, unless its process may be why."""
        worker = trial.temporary_state.ray_actor
        if worker in self.actors:  # Tune has given it one more trial
            self.actors.remove(worker)
        is_sound = status in (TrialStatus.COMPLETED, TrialStatus.DIVERGED, TrialStatus.STOPPED)
        if self._is_open and is_sound and worker is not None:
            self.actors.append(worker)

    def drop(self) -> None:
        """Keep none any longer. Call it once a worker has died: the retry may need what the others hold."""
        self._is_open = False
        self.actors.clear()


class TrialSource(SearchAlgorithm):
    """Submits trials, never more at a time than there are slots at that moment.

    Ray's own ``SearchGenerator`` gives a resumed trial a new id, which neither study nor journal has. Its limit of
    concurrent trials stays as it was at the start, even if nodes join or leave.

    Args:
        searcher: suggests the settings.
        count_slots: returns how many trials may run now.
        on_submit: is called with each trial, its Optuna number and its configuration.
        on_fault: is called with a line if the study cannot be written, after which no trial is submitted.
        past: trials that were submitted before the search was interrupted; those that ended are only counted.
        workers: gets those whose last trial has ended.
    """

    def __init__(
        self,
        searcher: AmpSearch,
        *,
        count_slots: Callable[[], int],
        on_submit: Callable[[Trial, int, TrialConfig], None],
        on_fault: Callable[[str], None],
        past: Sequence[RecordedTrial] = (),
        workers: "KeptWorkers | None" = None,
    ) -> None:
        self._searcher = searcher
        self._count_slots, self._on_submit, self._on_fault = count_slots, on_submit, on_fault
        self._unfinished = [trial for trial in past if trial.status is None and trial.unrecorded_end is None]
        self._suggested = len(past)
        self._spec: dict[str, Any] = {}
        self._running: dict[str, Trial] = {}
        self._workers = workers

    @property
    def total_samples(self) -> int:
        """Number of trials of the whole search."""
        return int(self._spec.get("num_samples", 0))

    def add_configurations(self, experiments: Any) -> None:
        """Set the experiment, of which Tune passes exactly one."""
        [experiment] = experiments
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        """Return the next trial, or None if there is none now."""
        # If a node has left and there are no slots, one is requested: else Tune would sleep instead of looking again.
        if self.is_finished() or len(self._running) >= max(1, self._count_slots()):
            return None
        if self._unfinished:
            past = self._unfinished.pop(0)
            return self._submit(past.trial_id, past.place, past.config)
        trial_id = Trial.generate_id()
        try:
            config = self._searcher.suggest(trial_id)
        except OSError as error:
            self._on_fault(describe_error(error))
            self.set_finished()  # type: ignore[no-untyped-call]
            return None
        self._suggested += 1
        return self._submit(trial_id, self._suggested, config)

    def is_finished(self) -> bool:
        """Return whether no trial is left to submit."""
        is_complete = not self._unfinished and self._suggested >= self.total_samples
        return is_complete or super().is_finished()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on the report of an epoch."""
        self._searcher.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Free the slot of a trial that has ended, and pass on its end."""
        trial = self._running.pop(trial_id, None)
        cause = find_cause(trial) if error and trial is not None else ""
        if self._workers and trial is not None and self.is_finished():
            self._workers.keep(trial, find_status(result, error=error))
        self._searcher.on_trial_complete(trial_id, result, error, cause)

    def _submit(self, trial_id: str, place: int, config: TrialConfig) -> Trial:
        names = ("storage", "checkpoint_config", "max_failures", "trial_name_creator", "trial_dirname_creator")
        trial = Trial(
            self._spec["run"],
            config=vars(config).copy(),
            trial_id=trial_id,
            experiment_tag=str(place),  # of which Tune keeps several copies
            placement_group_factory=self._spec["resources_per_trial"],
            stopping_criterion=self._spec["stop"],
            **{name: self._spec[name] for name in names},
        )
        self._running[trial_id] = trial
        self._on_submit(trial, self._searcher.find_number(trial_id), config)
        return trial
