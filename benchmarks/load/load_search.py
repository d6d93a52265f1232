"""The searches of ``load``, each in its own process (``python -m benchmarks.load.load_search``).

One is a real ``run_search`` that keeps how long its own steps took; where a long one is only resumed, what it would
have left is made up by the code of a search, without Ray.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.load.instant import Sample, Sampler, load_images, load_small_space, read_peak_memory
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.options import SearchOptions
from tune_amp.trial.config import EpochMetrics, TrialConfig, TrialStatus
from tune_amp.trial.consent import consent_to

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tune_amp.search.recorder import TrialRecorder
    from tune_amp.search.study import AmpSearch
    from tune_amp.space.space import SearchSpace
    from tune_amp.training.data import Dataset

SLEEP_SECONDS = 10.0
"""Of each training step of a trial that is to last without computing: 64 end no faster than a driver hears of them."""


NAP_SECONDS = 0.5
"""The same, where a few are to."""


SAMPLES_FILE = "samples.jsonl"


TIMES_FILE = "times.json"


RUN = "load"


CUT_OFF = 10
"""Trials of the last part that ran when its search was cut off, and as many come after them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A search, as a process is told of it."""

    part: str
    trials: int
    epochs: int
    slots: int
    gpus_per_slot: float = 0.0
    """Simulated."""
    model: str = "simple_net"
    sampler: str = "tpe"
    forked: bool = False
    """Whether workers are forked from one process, and so share what they have imported."""

    @property
    def options(self) -> SearchOptions:
        """Of the search."""
        return SearchOptions(
            model=self.model,
            num_samples=self.trials,
            max_epochs=self.epochs,
            sampler=self.sampler,
            max_concurrent=self.slots,
            gpus_per_trial=self.gpus_per_slot,
            confirm_seeds=0,
        )


def search(plan: Plan, folder: Path) -> None:
    """Begin the search in ``folder``, or go on with it where it has begun."""
    begun = time.monotonic()
    consent_to(plan.model, plan.sampler)
    times: dict[str, list[float]] = collections.defaultdict(list)
    run = folder / RUN
    with contextlib.ExitStack() as stack, (folder / SAMPLES_FILE).open("a", encoding="utf-8") as samples:

        def keep(sample: Sample) -> None:
            samples.write(json.dumps(dataclasses.asdict(sample)) + "\n")
            samples.flush()

        from tune_amp.search import history as reading

        past = None
        if RunFolder(run).journal.exists():
            started = time.perf_counter()
            with _timing_one(reading, "read_journal", times["read"]):
                past = stack.enter_context(reading.open_history(run))
            times["replay"].append(time.perf_counter() - started - times["read"][-1])
        space, dataset = _load_inputs(folder)
        stack.enter_context(_start_ray(plan))
        from tune_amp.search.plan import plan_search
        from tune_amp.search.run import run_search

        stack.enter_context(timing(times))
        planned = plan_search(space, dataset, plan.options, folder=run, history=past, begun=begun)
        run_search(planned, Sampler(keep))
        said = {"times": times, "peak_memory_bytes": read_peak_memory()}
        (folder / TIMES_FILE).write_text(json.dumps(said), encoding="utf-8")


@contextlib.contextmanager
def _start_ray(plan: Plan) -> Iterator[None]:
    from tune_amp.cluster.session import ray_session

    with contextlib.ExitStack() as stack:
        if plan.forked:
            from benchmarks.load.forked_workers import forking_workers

            stack.enter_context(forking_workers(("tune_amp.cluster.trainable",)))
        gpus = round(plan.slots * plan.gpus_per_slot)
        stack.enter_context(ray_session(num_cpus=plan.slots, num_gpus=gpus))
        yield


@contextlib.contextmanager
def timing(times: dict[str, list[float]]) -> Iterator[None]:
    """In the ``with`` block, each call of the steps of a search adds its seconds to ``times``."""
    from tune_amp.search import run as searching
    from tune_amp.search.recorder import TrialRecorder
    from tune_amp.search.study import AmpSearch

    steps: Mapping[str, tuple[Any, str]] = {
        "write": (TrialRecorder, "write"),
        "rungs": (searching, "restore_scheduler"),
        "study": (AmpSearch, "__init__"),
        "suggest": (AmpSearch, "suggest"),
    }
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in steps.items():
            stack.enter_context(_timing_one(owner, attribute, times[name]))
        yield


@contextlib.contextmanager
def _timing_one(owner: Any, attribute: str, seconds: list[float]) -> Iterator[None]:
    plain = getattr(owner, attribute)

    @functools.wraps(plain)
    def timed(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*arguments, **settings)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, attribute, timed)
    try:
        yield
    finally:
        setattr(owner, attribute, plain)


def _load_inputs(folder: Path) -> "tuple[SearchSpace, Dataset]":
    return load_small_space(folder), load_images()


def sleepy_net(input_shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """A linear model whose training steps last without computing: one core carries many of them."""
    return _build_sleepy(input_shape, num_classes, SLEEP_SECONDS)


def napping_net(input_shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """The same with steps that are over soon."""
    return _build_sleepy(input_shape, num_classes, NAP_SECONDS)


def second_net(input_shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """A linear model that sleeps for a second in its first training step."""
    return _build_sleepy(input_shape, num_classes, 1.0, steps=1)


def _build_sleepy(
    input_shape: tuple[int, int, int], num_classes: int, seconds: float, steps: float = math.inf
) -> "nn.Module":
    from torch import nn

    class Sleepy(nn.Linear):
        left = steps

        def forward(self, images: "Tensor") -> "Tensor":
            if self.training and self.left:
                self.left -= 1
                time.sleep(seconds)
            return super().forward(images.flatten(1))

    return Sleepy(math.prod(input_shape), num_classes)


class FabricatedTrial:
    """What a recorder reads of Ray's trial."""

    def __init__(self, place: int, settings: dict[str, Any]) -> None:
        self.trial_id = f"{place:08x}"
        self.config = settings
        self.experiment_tag = str(place)
        self.last_result: dict[str, Any] = {}
        self.run_metadata = types.SimpleNamespace(metric_analysis={}, metric_n_steps={}, last_result=None)
        self.temporary_state = types.SimpleNamespace(ray_actor=f"Actor {place % CUT_OFF}")

    def __str__(self) -> str:
        from tune_amp.search.tuner import name_trial

        return name_trial(self)


def fabricate(plan: Plan, folder: Path, *, cut_off: int = CUT_OFF) -> None:
    """Write what a search leaves that is killed while its last trials run, by the code that a search uses.

    What the trials report is what one real trial did, but for the values, which are drawn. Their settings are drawn
    too: a search by TPE leaves the same files, and takes long for it.

    Args:
        plan: of the search.
        folder: for its run folder, which is there.
        cut_off: trials that run when it is killed, and come on top when it goes on; 0: it ends in peace.
    """
    from tune_amp.cluster.checkpoints import RAY_FOLDER
    from tune_amp.cluster.failures import find_cause
    from tune_amp.cluster.resources import TrialResources
    from tune_amp.results.progress import SearchProgress
    from tune_amp.search.history import begin_run
    from tune_amp.search.plan import SearchPlan, list_shared
    from tune_amp.search.plan import describe_run as describe
    from tune_amp.search.recorder import TrialRecorder
    from tune_amp.search.schedulers import build_scheduler
    from tune_amp.search.study import AmpSearch

    consent_to(plan.model, plan.sampler)
    run, options = folder / RUN, dataclasses.replace(plan, trials=plan.trials + cut_off).options
    space, dataset = _load_inputs(folder)
    resources = TrialResources(cpus=1, gpus=0.0, max_concurrent=CUT_OFF, reason="")
    planned = SearchPlan(space=space, dataset=dataset, options=options, folder=run, resources=resources, unfit={})
    provenance = describe(planned)
    reports = _train_one(TrialConfig(**list_shared(dataset, options)), dataset)
    with begin_run(run, space, provenance, {}) as history:
        progress = SearchProgress(
            run=run.name,
            model=options.model,
            dataset=dataset.name,
            objectives=options.objectives,
            num_samples=options.num_samples,
            time_budget=None,
            slots=resources.max_concurrent,
            started=time.monotonic(),
        )
        recorder = TrialRecorder(
            run,
            history,
            progress,
            Sampler(lambda _: None),
            storage_root=str(run),
            begin=time.monotonic(),
            explain_death=find_cause,
            on_fault=_refuse_fault,
        )
        searcher = AmpSearch(
            space,
            list_shared(dataset, options),
            train_images=len(dataset.train),
            objectives=options.objectives,
            seed=options.seed,
            folder=run,
            study_name=run.name,
            sampler="random",
            num_samples=options.num_samples,
        )
        scheduler = build_scheduler(options, lambda _: None)
        about: dict[str, Any] = {"command": [], "arguments": {}, "storage": {"place": None, "name": RAY_FOLDER}}
        recorder.open_session(num_samples=options.num_samples, slots=resources.max_concurrent, **about)
        random = np.random.default_rng(0)
        for place in range(1, plan.trials + 1):
            told = reports[:1] if place > plan.trials - cut_off else reports
            _fabricate_trial(place, told, random.random(), searcher, scheduler, recorder)
        if cut_off == 0:
            recorder.finish()


def _fabricate_trial(
    place: int,
    reports: Sequence[EpochMetrics],
    value: float,
    searcher: "AmpSearch",
    scheduler: Any,
    recorder: "TrialRecorder",
) -> None:
    """Tell everyone of a trial; one with as many reports as it has epochs ends, or where the scheduler stops it."""
    from ray.tune.schedulers import TrialScheduler

    from tune_amp.cluster.trainable import REPORT, progress_report, read_report

    trial_id = f"{place:08x}"
    config = searcher.suggest(trial_id)
    trial = FabricatedTrial(place, vars(config).copy())
    recorder.add_trial(trial, searcher.find_number(trial_id), config)
    scheduler.on_trial_add(None, trial)
    recorder.on_trial_start(0, [], trial)
    max_epochs = trial.config["max_epochs"]
    for epoch in reports:
        metrics = dataclasses.replace(epoch, val_accuracy=value, val_loss=1.0 - value)
        is_last = epoch.epoch == max_epochs
        result = progress_report(metrics, TrialStatus.COMPLETED if is_last else "running")
        is_cut_off = len(reports) < max_epochs
        if not is_last and not is_cut_off and scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
            result["done"] = True
        own = {"device": "cpu", "num_threads": 1, "setup_seconds": 0.01, "checkpoint_seconds": 0.0}
        recorder.on_trial_result(0, [], trial, result | {REPORT: read_report(result | own)})
        if result["done"]:
            trial.last_result = result
            scheduler.on_trial_complete(None, trial, result)
            searcher.on_trial_complete(trial_id, result)
            recorder.on_trial_complete(0, [], trial)
            return
        searcher.on_trial_result(trial_id, result)


def _train_one(config: TrialConfig, dataset: "Dataset") -> list[EpochMetrics]:
    import torch

    from tune_amp.training.run import TrainingRun
    from tune_amp.training.training_data import TrainingData

    data = TrainingData(dataset.train, dataset.validation, dataset.num_classes, torch.device("cpu"))
    training = TrainingRun(config, data)
    return [training.train_epoch() for _ in range(config.max_epochs)]


def _refuse_fault(line: str) -> None:
    raise RuntimeError(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one search, or fabricate one, in a folder."""
    actions = {"search": search, "fabricate": fabricate}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.load_search")
    parser.add_argument("action", choices=actions)
    parser.add_argument("plan", type=json.loads)
    parser.add_argument("folder", type=Path)
    parsed = parser.parse_args(arguments)
    actions[parsed.action](Plan(**parsed.plan), parsed.folder)


if __name__ == "__main__":
    main()
