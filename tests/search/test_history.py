import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import past_runs as made
import pytest
from past_runs import written_past
from records import PROVENANCE

from tune_amp.results.journal import Journal
from tune_amp.search.history import open_history
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus


def test_a_run_is_told_as_its_journal_has_it(tmp_path: Path) -> None:
    events = [
        made.session(),
        made.trial("a", 0, lr=0.5),
        made.trial("b", 1),
        made.report("a", 1, metrics={"val_accuracy": 0.25}),
        {"event": "checkpoint", "at": 2.5, "trial_id": "a", "path": "ray/a/checkpoint_000000"},
        made.report("a", 2, at=3.0, metrics={"val_accuracy": 0.75}),
        made.end("b", "failed"),
        {"event": "finish", "at": 4.0},
        made.session(4.0, num_samples=9),
        made.trial("a", 2, at=5.0, lr=0.5),  # submitted once more, under another number
    ]
    with written_past(tmp_path, *events) as past:
        assert past.provenance == PROVENANCE
        assert (past.num_samples, past.seconds, len(past.sessions)) == (4, 5.0, 2)
        a, b = past.trials
        assert (a.trial_id, a.place, a.number, a.status, a.config) == ("a", 1, 2, None, TrialConfig(lr=0.5))
        assert a.last_result is not None
        assert (a.last_result["epoch"], a.last_result["val_accuracy"]) == (2, 0.75)
        assert a.checkpoints == ["ray/a/checkpoint_000000"]
        assert (b.place, b.status, b.last_result) == (2, TrialStatus.FAILED, None)
        assert past.unfinished == [a]
        assert past.last_epochs == {"a": 2}


def test_checkpoints_that_may_be_left_are_the_newest_two_of_each_part(tmp_path: Path) -> None:
    paths = ["ray/a/c0", "ray/a/c1", "ray/a/c2", "ray-2/a/c0", "ray-2/a/c1", "ray-2/a/c2"]
    events = [checkpoint(path) for path in paths]
    with written_past(tmp_path, made.session(), made.trial("a", 0), *events) as past:
        assert past.trials[0].checkpoints == ["ray-2/a/c2", "ray-2/a/c1", "ray/a/c2", "ray/a/c1"]


def test_epochs_that_are_repeated_are_not_the_highest(tmp_path: Path) -> None:
    reports = [made.report("a", epoch) for epoch in (1, 2, 3, 2)]
    with written_past(tmp_path, made.session(), made.trial("a", 0), *reports) as past:
        assert past.last_epochs == {"a": 3}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (made.report("a", 3, status="completed", done=True), "completed"),
        (made.report("a", 1, done=True), "stopped"),  # by the scheduler
        (made.report("a", 1, status="diverged", done=True), "diverged"),
        (made.report("a", 1, status="out_of_memory", done=True) | {"metrics": None}, "out_of_memory"),
        (made.report("a", 1), None),
    ],
)
def test_end_that_nobody_had_heard_of_is_read_from_the_last_report(
    tmp_path: Path, last: dict[str, Any], expected: str | None
) -> None:
    with written_past(tmp_path, made.session(), made.trial("a", 0), last) as past:
        [trial] = past.trials
        assert trial.unrecorded_end == expected
        assert (trial in past.unfinished) == (expected is None)
        assert trial.last_result is not None
        assert math.isnan(trial.last_result["val_accuracy"]) == (last["metrics"] is None)
    with written_past(tmp_path, made.session(), made.trial("a", 0), last, made.end("a", "stopped")) as past:
        assert past.trials[0].unrecorded_end is None


def checkpoint(path: str) -> dict[str, Any]:
    return {"event": "checkpoint", "at": 1.0, "trial_id": "a", "path": path}


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught, open_history(folder):
        pytest.fail("was opened")
    message = str(caught.value)
    assert message.startswith(f"{folder}/")
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


def test_run_that_was_cut_off_before_its_first_session_has_no_samples_and_no_storage(tmp_path: Path) -> None:
    with written_past(tmp_path) as past:
        assert (past.num_samples, past.storages) == (None, [])
    old, new = {"place": "/all", "name": "run"}, {"place": "/all", "name": "run-2", "token": "secret"}
    with written_past(tmp_path / "later", made.session(storage=old), made.session(storage=new)) as past:
        assert past.storages == [("/all", "run", None), ("/all", "run-2", "secret")]


def placed(place: Any, name: str, **about: Any) -> list[Mapping[str, Any]]:
    return [made.beginning(), made.session(storage={"place": place, "name": name, **about})]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "must hold how the run began"),
        ([made.session()], "was written by journal version None; this tune_amp resumes 3"),
        ([made.beginning(version=1)], "was written by journal version 1; this tune_amp resumes 3"),
        ([made.beginning(), made.report("a", 1)], "line 2: must be written by a search (KeyError: 'a')"),
        ([made.beginning(), {"event": "party", "at": 1.0}], "line 2: event: must be one that this tune_amp"),
        ([made.beginning(), made.trial("a", 0), made.end("a", "fine")], "line 3: must be written by a"),
        ([made.beginning(), made.session(5.0), made.trial("a", 0)], "line 3: at: must not go back, got 1.0"),
        ([made.beginning(), made.session(10**300)], "line 2: at: must be at most 1e+12 seconds, got 1000000"),
        ([made.beginning(), made.session(math.nan)], "line 2: at: must not go back, got nan"),
        ([made.beginning(), made.trial("a", 0) | {"config": {"lr": -1.0}}], "line 2: lr: must be"),
        ([made.beginning(), made.trial("a", 0) | {"config": 7}], "line 2: must be written by a search"),
        ([made.beginning(), {"event": "session", "at": 0.0, "arguments": {}}], "line 2: must be written by a search"),
        (placed(7, "ray"), "line 2: storage.place: must be"),
        (placed(None, ".."), "line 2: storage.name: must"),
        (placed(None, "a/b"), "line 2: storage.name: must"),
        (placed(None, ""), "line 2: storage.name: must"),
        (
            placed(None, "ray", token=7),
            "line 2: storage.token: must be",
        ),
        ([made.beginning(), made.trial("a", 0), checkpoint("/etc")], "line 3: path: must lie in the run's"),
        ([made.beginning(), made.trial("a", 0), checkpoint("ray/../..")], "line 3: path: must lie in the"),
        ([made.beginning(provenance={"run": 7})], ""),
    ],
)
def test_what_no_search_writes_is_refused_on_one_line(
    tmp_path: Path, events: list[Mapping[str, Any]], expected: str
) -> None:
    made.write_journal(tmp_path, events)
    assert refusal(tmp_path).startswith(f"reports.journal: {expected}")
    Journal(tmp_path / "reports.journal").__exit__()  # and the lock is free again


def test_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, open_history(tmp_path):
        pytest.fail("was opened")
    assert str(caught.value) == f"{tmp_path}: must hold reports.journal, from which a run resumes"


def test_run_that_still_goes_on_is_refused(tmp_path: Path) -> None:
    path = made.write_journal(tmp_path, [made.beginning()])
    with Journal(path):
        assert refusal(tmp_path) == "reports.journal: is being written: the run is still active in another process"


def test_half_a_line_at_the_end_is_no_event(tmp_path: Path) -> None:
    path = made.write_journal(tmp_path, [made.beginning(), made.session(), made.trial("a", 0)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with open_history(tmp_path) as past:
        past.journal.append(made.session(1.0))
        assert past.trials == []
        assert dataclasses.asdict(past.provenance) == dataclasses.asdict(PROVENANCE)
    with open_history(tmp_path) as past:  # what came next is not glued to it
        assert len(past.sessions) == 2


def test_journal_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^/proc/version: cannot be written \("):
        Journal(Path("/proc/version"))


@pytest.mark.parametrize("name", ["reports.journal", "study.journal", "ray", "trials.parquet"])
def test_run_with_a_link_in_it_is_refused_and_what_the_link_leads_to_stays(name: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("without a newline")
    made.write_journal(tmp_path / "run", [made.beginning()])
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(mine)
    expected = f"{name}: must not be a link in a run that is resumed, since a link may lead anywhere"
    assert refusal(tmp_path / "run") == expected
    assert mine.read_text() == "without a newline"


def test_journal_that_is_refused_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "reports.journal"
    path.write_text("somebody's notes, without a newline")
    assert refusal(tmp_path).startswith("reports.journal: must hold how the run began")
    assert path.read_text() == "somebody's notes, without a newline"
