"""What a run may find when it goes on: spoiled checkpoints, another folder, other data, another process."""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import (
    ALONE,
    Follow,
    Undisturbed,
    begin,
    check_end,
    check_run,
    count_events,
    measure_returns,
    note_fault,
    prepare,
    read_end,
    read_events,
    resume,
)

from tune_amp.cli.search import search_command
from tune_amp.results.records import load_trials
from tune_amp.results.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # under a minute each, on a machine of their own

MakeKilled = Callable[[], Path]


@pytest.fixture(scope="module")
def killed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose driver was killed in the middle of its first trial, after two checkpoints at least."""
    folder = prepare(tmp_path_factory.mktemp("killed"))
    run = folder / "results" / "run"
    search = begin(folder, *ALONE)
    try:
        search.wait_until(lambda: count_events(run, "checkpoint") >= 2 and count_events(run, "report") >= 6)
    finally:
        search.destroy()
    assert count_events(run, "end") == 0
    return folder


@pytest.fixture
def killed(killed_folder: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed_folder, tmp_path / "killed"))


def test_half_written_checkpoint_is_not_used_and_of_two_processes_that_resume_at_once_one_is_refused(
    killed: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    """Nor are halves of a journal's line in the way, nor files of the user's, which stay."""
    run = killed / "results" / "run"
    before = count_events(run, "report")
    newest = max(run.glob("ray*/*/checkpoint_*"))
    content = (newest / "trial.pt").read_bytes()
    (newest / "trial.pt").write_bytes(content[: len(content) // 2])
    notes, cache = run / ".trials.parquet.notes.tmp", run / ".cache.tmp"
    notes.write_text("mine")
    cache.mkdir()
    with RunFolder(run).journal.open("ab") as journal, RunFolder(run).study.open("ab") as study:
        journal.write(b'0123abcd {"event":"report","at":1')
        study.write(b'{"op_code": 8, "worker_id"')
    searches = [follow(resume(killed)) for _ in range(2)]
    codes = sorted(search.wait() for search in searches)
    assert codes == [0, 2], [search.stderr for search in searches]
    search, refused = sorted(searches, key=lambda search: search.wait())
    assert refused.stderr.count("\n") == 1
    assert "the run is still active in another process" in refused.stderr
    assert notes.read_text() == "mine"
    notes.unlink()
    cache.rmdir()
    count = check_end(search, run, undisturbed("alone"), fallen_back=1)
    returns = measure_returns(run)
    note_fault("two processes resume at once", "one goes on, one is refused", count, ranking_equal=True)
    note_fault(
        "driver killed, and what it wrote last half written: checkpoint, both journals",
        "goes on with --resume, from an older one or the beginning",
        count,
        ended=0.0,
        resumed=returns[-1],
        before=before,
        ranking_equal=True,
    )


def rewrite_line(path: Path, number: int, change: Callable[[dict[str, object]], None]) -> None:
    """Change an event of a journal, its checksum too."""
    lines = path.read_bytes().split(b"\n")
    event = json.loads(lines[number].partition(b" ")[2])
    change(event)
    text = json.dumps(event).encode()
    lines[number] = b"%08x %s" % (zlib.crc32(text), text)
    path.write_bytes(b"\n".join(lines))


@pytest.mark.long
def test_run_that_was_moved_and_renamed_goes_on_and_another_version_is_told(
    killed: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    moved = killed / "elsewhere" / "other name"
    moved.parent.mkdir()
    (killed / "results" / "run").rename(moved)
    before = count_events(moved, "report")
    rewrite_line(RunFolder(moved).journal, 0, lambda event: event["provenance"]["versions"].update(torch="1.2.3"))  # type: ignore[index]
    search = follow(resume(killed, run="elsewhere/other name"))
    count = check_end(search, moved, undisturbed("alone"))
    assert re.search(r"^note +torch 1\.2\.3 then, \S+ now: trials from here on may differ", search.stdout, re.MULTILINE)
    note_fault(
        "driver killed, and the run folder moved",
        "goes on with --resume",
        count,
        ended=0.0,
        resumed=measure_returns(moved)[-1],
        before=before,
        ranking_equal=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler", "none"), "--scheduler: must stay asha"),
        (("--model", "other:net"), "--model slow:net"),
        (("quick",), "SPACE: must stay "),
    ],
)
def test_changed_settings_are_refused_in_a_line_and_change_nothing(
    arguments: tuple[str, ...],
    message: str,
    killed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = killed / "results" / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    given = ("--model", "slow:net") if "--model" not in arguments else ()
    monkeypatch.chdir(killed)
    assert search_command(["--resume", "run", *given, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


DATA = """
import numpy as np
def data():
    return tuple(np.load("data.npz")[name] for name in ("images", "labels", "test_images", "test_labels"))
"""


def write_data(folder: Path, *, flaw: int = 0) -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    labels = np.arange(1500) % 10
    images = draw.integers(0, 160, (1500, 28, 28))
    images[np.arange(1500), labels * 2] += 90
    images[0, 0, 0] = flaw
    images, labels = images.astype(np.uint8), labels.astype(np.uint8)
    with (folder / "data.npz").open("wb") as file:
        np.savez(file, images=images[:1300], labels=labels[:1300], test_images=images[1300:], test_labels=labels[1300:])


@pytest.mark.long
def test_data_changed_in_the_run_do_not_harm_it_but_no_other_data_go_on(tmp_path: Path, follow: Follow) -> None:
    run = tmp_path / "results" / "run"
    prepare(tmp_path)
    (tmp_path / "own.py").write_text(DATA)
    write_data(tmp_path)
    own = ("--dataset", "own:data")
    search = follow(begin(tmp_path, *ALONE, *own, "--num-samples", "3"))
    search.wait_until(lambda: count_events(run, "report") >= 2)
    write_data(tmp_path, flaw=1)

    # While it runs, nobody else goes on with it.
    second = follow(resume(tmp_path, *own))
    assert second.wait() == 2
    assert second.stderr.count("\n") == 1
    assert "the run is still active in another process" in second.stderr

    assert search.wait() == 0, search.stderr
    assert len(load_trials(run)) == 3
    count = check_run(run)
    end = read_end(run)
    note_fault("a data file changed in the run", "goes on with what it had read", count)
    note_fault("a second process resumes a run that goes on", "refused", count)

    changed = follow(resume(tmp_path, *own, "--num-samples", "4"))
    assert changed.wait() == 2
    assert changed.stderr.count("\n") == 1
    assert "must hold the data that the search used" in changed.stderr
    assert read_end(run) == end
    assert check_run(run) == count
    note_fault("resumed with changed data", "refused", count)


@pytest.mark.long
def test_finished_run_has_nothing_to_do_and_with_more_samples_runs_the_new_ones_only(
    tmp_path: Path, undisturbed_run: Callable[[str], Path], undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    shutil.copytree(undisturbed_run("alone").parents[1], tmp_path, dirs_exist_ok=True)
    before = read_events(run)
    search = follow(resume(tmp_path))
    check_end(search, run, undisturbed("alone"))
    assert [event["event"] for event in read_events(run)[len(before) :]] == ["session", "finish"]

    more = follow(resume(tmp_path, "--num-samples", "8"))
    assert more.wait() == 0, more.stderr
    end = read_end(run)
    assert end.trials[:6] == undisturbed("alone").trials
    assert len(end.trials) == 8
    new = {event["trial_id"] for event in read_events(run)[len(before) :] if "trial_id" in event}
    assert new == {trial.trial_id for trial in load_trials(run)[6:]}
    count = check_run(run)
    assert more.find_left() == []
    note_fault("a finished run resumed, and again with more samples", "runs the new trials only", count)


@pytest.mark.parametrize(
    "damage", ["no journal", "an empty one", "half of its first line", "a flipped bit", "a directory"]
)
def test_run_without_a_sound_journal_is_refused_in_a_line(
    damage: str, killed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RunFolder(killed / "results" / "run").journal
    content = path.read_bytes()
    path.unlink()
    if damage == "an empty one":
        path.touch()
    elif damage == "half of its first line":
        path.write_bytes(content[: content.index(b"\n") // 2])
    elif damage == "a flipped bit":
        path.write_bytes(content[:-200] + bytes([content[-200] ^ 4]) + content[-199:])
    elif damage == "a directory":
        path.mkdir()
    monkeypatch.chdir(killed)
    assert search_command(["--resume", "run", "--model", "slow:net"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "reports.journal" in told
