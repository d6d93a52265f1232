"""The slots of a confirmation: which worker gets which job, and that none waits for what an idle one holds."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tune_amp.cluster.resources import TrialResources
from tune_amp.cluster.trainable import AmpTrainable
from tune_amp.confirm import slots
from tune_amp.confirm.slots import ConfirmSlots
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmJob
from tune_amp.trial.config import TrialConfig, TrialStatus

Outcome = TrialStatus | BaseException | None
"""How a job ends; None if it hangs."""
OUT_OF_MEMORY, FAILED, COMPLETED = TrialStatus.OUT_OF_MEMORY, TrialStatus.FAILED, TrialStatus.COMPLETED
DIED = ray.exceptions.ActorDiedError()


class FakeActor:
    """An actor that is placed as soon as its share of the one GPU is free."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.lend = self.__ray_ready__ = self

    def options(self, name: str) -> "FakeActor":
        return self

    def remote(self, function: object = None, job: ConfirmJob | None = None, *_: object) -> "FakeReference":
        return FakeReference(self, job)


class FakeReference:
    def __init__(self, actor: FakeActor, job: ConfirmJob | None) -> None:
        self.actor, self.job = actor, job


class FakeRay:
    """What ``slots`` calls of Ray: actors share one GPU, or none, and jobs end as they are told, in turn."""

    exceptions = ray.exceptions

    def __init__(self, outcomes: dict[int, list[Outcome]]) -> None:
        self.outcomes = outcomes
        self.opened: list[FakeActor] = []
        self.living: list[FakeActor] = []
        self.trained: list[tuple[int, float]] = []
        self.now = 0.0
        """Time in seconds, which passes only while jobs hang."""

    def put(self, value: object) -> object:
        return value

    def remote(self, *, num_cpus: int, num_gpus: float, max_restarts: int) -> Callable[[type], Any]:
        assert max_restarts == 0

        def open_actor() -> FakeActor:
            self.opened.append(FakeActor(num_gpus))
            self.living.append(self.opened[-1])
            return self.opened[-1]

        def bind(trainable: type) -> Any:
            assert trainable is AmpTrainable
            return SimpleNamespace(remote=open_actor)

        return bind

    def wait(
        self, references: Sequence[FakeReference], *, timeout: float, **_: Any
    ) -> tuple[list[FakeReference], list[FakeReference]]:
        free, placed = 1.0, []
        for actor in self.living:  # in the order in which they asked
            if actor.share <= free:
                free -= actor.share
                placed.append(actor)
        running = [one for one in references if one.actor in placed]
        assert running, "all wait, and nothing ends"
        ended = [one for one in running if one.job is None or self.outcomes.get(one.job.config.seed) != [None]]
        self.now += 0 if ended else timeout
        return ended[:1], ended[1:]

    def get(self, reference: FakeReference) -> ConfirmedRun:
        assert reference.job is not None
        seed = reference.job.config.seed
        self.trained.append((seed, reference.actor.share))
        outcome = self.outcomes[seed].pop(0) if self.outcomes.get(seed) else COMPLETED
        assert outcome is not None
        if isinstance(outcome, BaseException):
            raise outcome
        error = None if outcome is COMPLETED else str(outcome)
        return ConfirmedRun(trial_id="a", seed=seed, status=outcome, error=error)

    def kill(self, actor: FakeActor) -> None:
        if actor in self.living:
            self.living.remove(actor)


@pytest.fixture
def confirm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[FakeRay, ConfirmSlots]]:
    def build(outcomes: dict[int, list[Outcome]], *, at_once: int = 2, share: float = 0.0, **options: Any) -> Any:
        cluster = FakeRay(outcomes)
        monkeypatch.setattr(slots, "ray", cluster)
        monkeypatch.setattr(slots, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        monkeypatch.setattr(slots, "count_slots_now", lambda *_, **__: lambda: at_once)
        resources = TrialResources(cpus=1, gpus=share, max_concurrent=at_once, reason="")
        split: Any = None
        return cluster, ConfirmSlots(AmpTrainable, split, resources, **options)

    return build


def make_jobs(count: int) -> list[ConfirmJob]:
    return [ConfirmJob(trial_ids=("a",), config=TrialConfig(seed=seed)) for seed in range(count)]


Build = Callable[..., tuple[FakeRay, ConfirmSlots]]


def test_a_slot_has_one_worker_for_all_its_jobs_and_none_afterwards(confirm: Build) -> None:
    cluster, opened = confirm({})
    with opened:
        assert [run.status for _, run in opened.train(make_jobs(3))] == [COMPLETED] * 3
        assert [run.status for _, run in opened.train(make_jobs(5))] == [COMPLETED] * 5
        assert len(cluster.opened) == len(cluster.living) == 2
    assert cluster.living == []


def test_workers_of_the_search_are_used_before_new_ones_and_ended_too(confirm: Build) -> None:
    of_search = FakeActor(0.0)
    cluster, opened = confirm({}, at_once=2, workers=[of_search])
    cluster.living.append(of_search)
    with opened:
        assert [run.status for _, run in opened.train(make_jobs(5))] == [COMPLETED] * 5
        assert len(cluster.opened) == 1
        assert of_search in cluster.living
    assert cluster.living == []


@pytest.mark.parametrize(("outcome", "kept"), [(TrialStatus.DIVERGED, True), (FAILED, False), (OUT_OF_MEMORY, False)])
def test_only_a_worker_whose_job_was_sound_gets_another(outcome: TrialStatus, kept: bool, confirm: Build) -> None:
    cluster, opened = confirm({0: [outcome, outcome]}, at_once=1)
    with opened:
        ended = [(job.config.seed, run.status) for job, run in opened.train(make_jobs(2))]
    assert ended == [(0, outcome), (1, COMPLETED)]
    tries = 2 if outcome is FAILED else 1
    assert len(cluster.trained) == tries + 1
    assert len(cluster.opened) == (1 if kept else tries + 1)


def test_a_job_that_needs_a_larger_share_gets_it_though_others_hold_the_gpu(confirm: Build) -> None:
    cluster, opened = confirm({1: [OUT_OF_MEMORY]}, share=0.5)
    with opened:
        ended = {job.config.seed: run.status for job, run in opened.train(make_jobs(4))}
    assert ended == dict.fromkeys(range(4), COMPLETED)
    assert [share for seed, share in cluster.trained if seed == 1] == [0.5, 1.0]
    assert {share for seed, share in cluster.trained if seed != 1} == {0.5}


def test_a_death_ends_what_is_idle_which_may_have_been_on_the_same_node(confirm: Build) -> None:
    cluster, opened = confirm({9: [DIED]}, at_once=3)
    with opened:
        list(opened.train(make_jobs(3)))
        idle = list(cluster.living)
        [(_, run)] = opened.train([ConfirmJob(trial_ids=("a",), config=TrialConfig(seed=9))])
        assert run.status is COMPLETED
        assert not {*idle} & {*cluster.living}
        assert len(cluster.living) == 1


def test_job_that_hangs_is_ended_at_the_time_limit_and_the_others_are_not(confirm: Build) -> None:
    cluster, opened = confirm({0: [None], 3: [None]}, time_limit=5.0)
    with opened:
        ended = [(job.config.seed, run.status, run.error) for job, run in opened.train(make_jobs(5))]
        assert len(cluster.living) == 1
    reason = "it took longer than --trial-time-limit (5 s) and was ended"
    assert [end for end in ended if end[1] is FAILED] == [(0, FAILED, reason), (3, FAILED, reason)]
    assert [end for end in ended if end[1] is not FAILED] == [(seed, COMPLETED, None) for seed in (1, 2, 4)]
    assert cluster.now == 7  # both were found to run after the first second, and to hang in the check after the limit
    assert len(cluster.opened) == 3


def test_closing_the_jobs_ends_those_that_run(confirm: Build) -> None:
    cluster, opened = confirm({}, at_once=2)
    with opened:
        jobs = opened.train(make_jobs(5))
        next(jobs)
        assert len(cluster.living) == 2
        jobs.close()
        assert len(cluster.living) == 1  # the idle one


def test_a_request_to_end_is_found_between_jobs_and_while_they_run(confirm: Build) -> None:
    checks: list[int] = []

    def check() -> None:
        checks.append(len(checks))
        if len(checks) == 4:  # two jobs have ended, and the third hangs
            raise KeyboardInterrupt

    cluster, opened = confirm({2: [None]}, at_once=1, check=check)
    with opened, pytest.raises(KeyboardInterrupt):
        list(opened.train(make_jobs(4)))
    assert [seed for seed, _ in cluster.trained] == [0, 1]
    assert cluster.living == []
