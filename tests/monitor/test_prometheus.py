"""Metrics of a search as a strict registry sees them: what Ray refuses, it refuses too."""

import collections
import re
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from records import make_epoch, make_trial

from tune_amp.monitor import prometheus as gauges_module
from tune_amp.monitor.prometheus import ALL_SERIES, Gauges, find_new_epochs
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmProgress, Observer, SearchProgress
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import EpochMetrics, TrialConfig, TrialStatus

PAGE = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"
SLOT_SERIES = ("tune_amp_slot_trial", "tune_amp_slot_epoch", "tune_amp_loss_scale", "tune_amp_gpu_memory_peak_bytes")


class Store:
    """What a scrape would show, and what was set last; ``registry`` stands in for ``ray.util.metrics``."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[tuple[str, str], ...], float]] = collections.defaultdict(dict)
        self.fresh: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        self.runs: set[str] = set()
        store = self

        class Metric:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                assert description
                self.name, self.keys = name, set(tag_keys)
                self.defaults: dict[str, str] = {}

            def set_default_tags(self, tags: dict[str, str]) -> "Metric":
                self.defaults = tags
                return self

            def _record(self, value: float, tags: dict[str, str], before: float) -> None:
                labels = {**self.defaults, **tags}
                assert set(labels) == self.keys
                assert all(label.encode("ascii") for label in labels.values())
                store.runs.add(labels["run"])
                del labels["run"]
                key = tuple(sorted(labels.items()))
                store.values[self.name][key] = before + value
                store.fresh.add((self.name, key))

        class Gauge(Metric):
            def set(self, value: float, tags: dict[str, str]) -> None:
                self._record(value, tags, 0)

        class Counter(Metric):
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0
                key = tuple(sorted(tags.items()))
                self._record(value, tags, store.values[self.name].get(key, 0.0))

        self.registry = types.SimpleNamespace(Gauge=Gauge, Counter=Counter)

    def read(self, name: str, **labels: str) -> float:
        return self.values[name][tuple(sorted(labels.items()))]

    def labels(self, name: str) -> list[dict[str, str]]:
        """Of the series that were set in the last publication."""
        return [dict(key) for fresh, key in self.fresh if fresh == name]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def gauges(store: Store) -> Gauges:
    return Gauges(Observer(), slots=2, registry=store.registry)


def make_running(number: int, *epochs: Any, **changes: Any) -> TrialRecord:
    return make_trial(
        f"trial{number}",
        trial_name=f"{number:02d}-fp16-lr0.003-b64-scale2^16",
        status=TrialStatus.INTERRUPTED,  # as the recorder has it until the end is known
        epochs=epochs,
        **changes,
    )


def make_ended(number: int, *epochs: Any, status: TrialStatus = TrialStatus.COMPLETED) -> TrialRecord:
    return make_trial(f"trial{number}", trial_name=f"{number:02d}-fp16", status=status, epochs=epochs)


def make_progress(trials: Sequence[TrialRecord], running: Sequence[TrialRecord] = (), **changes: Any) -> SearchProgress:
    values: dict[str, Any] = {
        "run": "demo",
        "model": "simple_net",
        "dataset": "digits",
        "objectives": ("val_accuracy",),
        "num_samples": 10,
        "time_budget": None,
        "started": time.monotonic(),
    }
    ids = frozenset(trial.trial_id for trial in running)
    return SearchProgress(**values | changes, trials=tuple(trials), running=ids)


def tell(
    store: Store,
    gauges: Gauges,
    trials: Sequence[TrialRecord],
    running: Sequence[TrialRecord] = (),
    ended: TrialRecord | None = None,
    **changes: Any,
) -> None:
    """A report, and a publication."""
    gauges.on_progress(make_progress(trials, running, **changes), ended)
    store.fresh.clear()
    gauges.publish()


def test_every_series_is_kept_while_a_trial_runs(store: Store, gauges: Gauges) -> None:
    tell(store, gauges, [running := make_running(1)], [running])
    ended = make_ended(1, make_epoch(1))
    second = make_running(2, make_epoch(1, skipped_steps=3))
    tell(store, gauges, [ended, second], [second], ended)
    assert set(store.values) == {series.name for series in ALL_SERIES}
    assert store.read("tune_amp_slots") == 2
    about = {"model": "simple_net", "dataset": "digits", "objectives": "val_accuracy", "version": "0.1.0"}
    assert store.labels("tune_amp_run_info") == [about]


def test_names_beyond_ascii_are_spelled_as_in_a_url(store: Store, gauges: Gauges) -> None:
    running = make_running(1)
    tell(store, gauges, [running], [running], run="l\u00e4uf_1-2.3", model="r\u00e9seau:net", dataset="a b@c\udcff")
    assert store.runs == {"l%C3%A4uf_1-2.3"}
    [about] = store.labels("tune_amp_run_info")
    assert (about["model"], about["dataset"]) == ("r%C3%A9seau:net", "a b@c%FF")


def test_names_follow_the_conventions_and_no_label_grows_with_the_trials() -> None:
    for series in ALL_SERIES:
        assert re.fullmatch(r"tune_amp_[a-z]+(_[a-z]+)*", series.name)
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert not {"trial", "trial_id", "trial_name"} & set(series.labels)
    assert len({series.name for series in ALL_SERIES}) == len(ALL_SERIES)


def test_trials_by_status_add_up_to_the_search(store: Store, gauges: Gauges) -> None:
    statuses = (TrialStatus.COMPLETED, TrialStatus.STOPPED, TrialStatus.STOPPED, TrialStatus.INTERRUPTED)
    ended = [make_ended(number, make_epoch(1), status=status) for number, status in enumerate(statuses, start=1)]
    running = [make_running(5), make_running(6)]
    tell(store, gauges, [*ended, *running], running)
    counts = {dict(key)["status"]: value for key, value in store.values["tune_amp_trials"].items()}
    assert {status: count for status, count in counts.items() if count} == {
        "waiting": 4,
        "running": 2,
        "completed": 1,
        "stopped": 2,
        "interrupted": 1,
    }
    assert set(counts) == {"waiting", "running", *map(str, TrialStatus)}


def test_each_epoch_counts_once_however_often_it_is_seen(store: Store, gauges: Gauges) -> None:
    first, second, third = (make_epoch(n, steps=100 * n, skipped_steps=skips) for n, skips in ((1, 5), (2, 5), (3, 7)))
    tell(store, gauges, [trial := make_running(1)], [trial])
    assert "tune_amp_epochs_total" not in store.values  # a counter of nothing
    for epochs in ((first,), (first,), (first, second)):
        tell(store, gauges, [trial := make_running(1, *epochs)], [trial])
    assert store.read("tune_amp_epochs_total") == 2
    ended = make_ended(1, first, second, third)
    tell(store, gauges, [ended], ended=ended)
    gauges.publish()
    assert store.read("tune_amp_epochs_total") == 3
    assert store.read("tune_amp_steps_total") == 300
    assert store.read("tune_amp_skipped_steps_total") == 7


def test_epochs_that_a_dead_worker_had_done_count_again_when_they_are_done_again() -> None:
    first, second, third = (make_epoch(epoch) for epoch in (1, 2, 3))
    again = make_epoch(2)
    assert find_new_epochs((first, second, third), (first, again)) == [(first, again)]
    assert find_new_epochs((first, second), (again_first := make_epoch(1),)) == [(None, again_first)]
    # What the dead worker had done beyond that still stands, until it is done again: it was counted before.
    assert find_new_epochs((first, second, third), (first, again, third)) == [(first, again)]
    assert find_new_epochs((first,), (first, second, third)) == [(first, second), (second, third)]
    assert find_new_epochs((first, second), (first, second)) == []


def test_slots_are_reused_and_a_trial_keeps_its_own(store: Store, gauges: Gauges) -> None:
    first, second, third = (make_running(n, make_epoch(n, loss_scale=2.0**n)) for n in (1, 2, 3))
    tell(store, gauges, [first, second], [first, second])
    ended = make_ended(1, make_epoch(1))
    tell(store, gauges, [ended, second, third], [second, third], ended)
    numbers = {slot: store.read("tune_amp_slot_trial", slot=slot) for slot in ("1", "2")}
    assert numbers == {"1": 3, "2": 2}
    assert {slot: store.read("tune_amp_loss_scale", slot=slot) for slot in ("1", "2")} == {"1": 8, "2": 4}


def test_hundreds_of_trials_leave_no_more_series_than_there_are_slots(store: Store, gauges: Gauges) -> None:
    trials: list[TrialRecord] = []
    tell(store, gauges, [])
    for number in range(1, 201, 2):
        pair = [make_running(number, make_epoch(1)), make_running(number + 1, make_epoch(1))]
        tell(store, gauges, [*trials, *pair], pair, num_samples=200)
        for trial in pair:
            trials.append(make_ended(int(trial.trial_id.removeprefix("trial")), *trial.epochs))
            tell(store, gauges, trials, ended=trials[-1], num_samples=200)
    for name in SLOT_SERIES:
        assert len(store.values[name]) == 2
    assert sum(map(len, store.values.values())) < 50
    assert store.read("tune_amp_epochs_total") == 200


def test_what_a_trial_has_not_or_has_no_longer_is_not_set(store: Store, gauges: Gauges) -> None:
    fp32 = make_running(1, make_epoch(1, loss_scale=None), config=TrialConfig(precision="fp32"))
    tell(store, gauges, [fp32], [fp32])
    assert store.labels("tune_amp_loss_scale") == []
    assert store.labels("tune_amp_slot_epoch") == [{"slot": "1"}]
    ended = make_ended(1, *fp32.epochs)
    tell(store, gauges, [ended], ended=ended)
    assert [store.labels(name) for name in SLOT_SERIES] == [[], [], [], []]


def test_gpu_memory_is_the_running_trials_peak_and_zero_on_the_cpu(store: Store, gauges: Gauges) -> None:
    running = [make_running(1, make_epoch(1, peak_memory_bytes=5 * 2**30)), make_running(2, make_epoch(1))]
    tell(store, gauges, running, running)
    assert store.read("tune_amp_gpu_memory_peak_bytes", slot="1") == 5 * 2**30
    assert store.read("tune_amp_gpu_memory_peak_bytes", slot="2") == 0


@pytest.mark.parametrize(
    ("objective", "values", "best"),
    [
        ("val_accuracy", (0.8, 0.9, 0.7), (0.8, 0.9, 0.9)),
        ("val_loss", (0.4, 0.5, 0.3), (0.4, 0.4, 0.3)),
        ("val_accuracy", (0.8, float("nan"), 0.85), (0.8, 0.8, 0.85)),
        ("val_loss:min", (0.4, 0.5, 0.3), (0.4, 0.4, 0.3)),
    ],
)
def test_the_best_is_that_of_the_trials_that_ended(
    objective: str, values: tuple[float, ...], best: tuple[float, ...], store: Store, gauges: Gauges
) -> None:
    trials: list[TrialRecord] = []
    for number, value in enumerate(values, start=1):
        metric = objective.removesuffix(":min")
        trials.append(make_ended(number, make_epoch(1, **{metric: value})))
        running = make_running(9, make_epoch(1, val_accuracy=1.0, val_loss=0.0))
        tell(store, gauges, [*trials, running], [running], trials[-1], objectives=(objective,))
        assert store.read("tune_amp_best", objective=metric) == best[number - 1]


def test_each_of_several_objectives_has_its_own_best(store: Store, gauges: Gauges) -> None:
    trials = [
        make_ended(1, make_epoch(1, val_accuracy=0.9, train_seconds=8.0)),
        make_ended(2, make_epoch(1, val_accuracy=0.8, train_seconds=2.0)),
    ]
    for number in (1, 2):
        both = ("val_accuracy", "train_seconds")
        tell(store, gauges, trials[:number], ended=trials[number - 1], objectives=both)
    assert store.read("tune_amp_best", objective="val_accuracy") == 0.9
    assert store.read("tune_amp_best", objective="train_seconds") == 2.0


def test_what_an_earlier_run_left_counts_as_trials_and_best_but_not_as_epochs_of_this_one(
    store: Store, gauges: Gauges
) -> None:
    earlier = make_ended(1, make_epoch(1, val_accuracy=0.9), make_epoch(2, val_accuracy=0.95))
    running = make_running(2, make_epoch(1))  # goes on from a checkpoint
    tell(store, gauges, [earlier, running], [running])
    assert store.read("tune_amp_trials", status="completed") == 1
    assert store.read("tune_amp_best", objective="val_accuracy") == 0.95
    assert "tune_amp_epochs_total" not in store.values
    running = make_running(2, *running.epochs, make_epoch(2))
    tell(store, gauges, [earlier, running], [running])
    assert store.read("tune_amp_epochs_total") == 1


def test_slot_time_is_told_as_what_was_added(store: Store, gauges: Gauges) -> None:
    epochs: list[EpochMetrics] = []
    tell(store, gauges, [running := make_running(1)], [running])
    for epoch, training in enumerate((2.0, 5.5), start=1):
        epochs.append(make_epoch(epoch, train_seconds=training, val_seconds=0.25 * epoch, probe_seconds=0.125))
        for _ in range(2):
            tell(store, gauges, [running := make_running(1, *epochs)], [running])
    told = {kind: store.read("tune_amp_slot_seconds_total", kind=kind) for kind in ("training", "validation", "probe")}
    assert told == {"training": 5.5, "validation": 0.5, "probe": 0.125}


class Watcher(Observer):
    """An observer that remembers, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.seen: list[Any] = []
        self.error = error

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        self._see(progress, ended)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        self._see(progress, ended)

    def _see(self, *what: Any) -> None:
        self.seen.append(what)
        if self.error:
            raise self.error


CONFIRMATION = ConfirmProgress(run="demo", names={"a": "a"}, objective="val_accuracy", total=8, done=3, started=0.0)


def test_everything_is_passed_on_in_its_order(store: Store) -> None:
    watcher = Watcher()
    gauges = Gauges(watcher, slots=1, registry=store.registry)
    ended = make_ended(1, make_epoch(1))
    progress = make_progress([ended])
    gauges.on_progress(progress, ended)
    gauges.on_confirmation(CONFIRMATION, None)
    assert watcher.seen == [(progress, ended), (CONFIRMATION, None)]
    gauges.publish()
    states = [store.read("tune_amp_confirm_runs", state=state) for state in ("ended", "left")]
    assert states == [3, 5]


def test_metrics_go_on_where_whoever_watched_is_gone(store: Store) -> None:
    watcher = Watcher(BrokenPipeError())
    gauges = Gauges(watcher, slots=1, registry=store.registry)
    for number in (1, 2):
        ended = make_ended(number, make_epoch(1))
        tell(store, gauges, [ended], ended=ended)
    gauges.on_confirmation(CONFIRMATION, None)
    assert len(watcher.seen) == 1
    assert store.read("tune_amp_epochs_total") == 2


def test_a_report_looks_at_no_trial(store: Store, gauges: Gauges) -> None:
    class Untouchable(tuple[TrialRecord, ...]):
        def __iter__(self) -> Iterator[TrialRecord]:
            pytest.fail("a report looked at all trials")

        def __getitem__(self, index: Any) -> Any:
            pytest.fail("a report looked at a trial")

    tell(store, gauges, [make_ended(1, make_epoch(1))])
    ended = make_ended(2, make_epoch(1))
    progress = make_progress([])
    object.__setattr__(progress, "trials", Untouchable([ended] * 1000))
    gauges.on_progress(progress, ended)


def test_gauges_are_set_again_while_nothing_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges_module, "EVERY_SECONDS", 0.01)
    gauges = Gauges(Observer(), slots=1, registry=store.registry)
    running = make_running(1, make_epoch(1))
    for _ in ("the search", "its confirmation"):
        with gauges:
            gauges.on_progress(make_progress([running], [running]), None)
            for _ in range(2):
                store.fresh.clear()
                deadline = time.monotonic() + 20
                while ("tune_amp_loss_scale", (("slot", "1"),)) not in store.fresh:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
        store.fresh.clear()
        time.sleep(0.05)
        assert store.fresh == set()  # its thread has ended


def test_the_last_report_is_published_at_the_end(store: Store) -> None:
    with Gauges(Observer(), slots=1, registry=store.registry) as gauges:
        ended = make_ended(1, make_epoch(1))
        gauges.on_progress(make_progress([ended]), ended)
    assert store.read("tune_amp_epochs_total") == 1


def test_a_search_outlives_its_metrics_and_says_once_that_they_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no more\nmetrics")

    watcher = Watcher()
    gauges = Gauges(watcher, slots=1, registry=types.SimpleNamespace(Gauge=refuse, Counter=refuse))
    with gauges:
        for number in (1, 2, 3):
            ended = make_ended(number, make_epoch(1))
            gauges.on_progress(make_progress([ended]), ended)
            gauges.publish()
    assert len(watcher.seen) == 3
    assert capsys.readouterr().err == "metrics ended, the search continues: RuntimeError: no more metrics\n"


def test_the_page_lists_every_series() -> None:
    rows = dict(re.findall(r"^\| `ray_(tune_amp_\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    expected = {
        series.name: f"{series.kind} | {', '.join(f'`{label}`' for label in series.labels)} | {series.meaning}"
        for series in ALL_SERIES
    }
    assert rows == expected


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(), ""),  # the reader has gone
        (
            OSError(28, "No space left on device"),
            "the search continues, but is no longer shown: OSError: [Errno 28] No space left on device\n",
        ),
        (KeyError("oh"), "the search continues, but is no longer shown: KeyError: 'oh'\n"),
    ],
)
def test_observer_that_fails_gets_no_more_events_and_does_not_stop_the_search(
    error: Exception, said: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = Watcher(error)
    gauges = Gauges(watcher, slots=1, registry=store.registry)
    gauges.on_confirmation(CONFIRMATION, None)
    gauges.on_progress(make_progress([]), None)
    assert watcher.seen == [(CONFIRMATION, None)]
    assert capsys.readouterr().err == said


def test_ctrl_c_in_an_observer_is_not_taken_for_its_failure(store: Store) -> None:
    gauges = Gauges(Watcher(KeyboardInterrupt()), slots=1, registry=store.registry)
    with pytest.raises(KeyboardInterrupt):
        gauges.on_progress(make_progress([]), None)
