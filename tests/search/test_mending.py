"""A file of a run that is damaged beside a whole journal is set aside, whatever is wrong with it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import past_runs as made
import pytest
from past_runs import written_past
from records import PROVENANCE
from report_runs import write_full_run

from tune_amp.results.run_folder import RunFolder
from tune_amp.search.mending import mend_run
from tune_amp.search.study import open_storage

LRS = (0.01, 0.02, 0.03)


def write_study(path: Path, *, name: str = PROVENANCE.run, direction: Any = "maximize", **ids: str) -> None:
    study = optuna.create_study(study_name=name, direction=direction, storage=open_storage(path))
    for number, lr in enumerate(LRS):
        study.enqueue_trial({"lr": lr})
        trial = study.ask()
        trial.suggest_float("lr", 1e-4, 0.1)
        trial.set_user_attr("trial_id", ids.get(f"trial_{number}", f"trial {number}"))


def mend(folder: Path, *, lrs: tuple[float, ...] = LRS) -> list[str]:
    """Mend a run of which the journal tells trials with these settings."""
    trials = [made.trial(f"trial {number}", number, lr=lr) for number, lr in enumerate(lrs)]
    with written_past(folder, made.session(), *trials) as past:
        return mend_run(folder, past)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_whole_study_stays_and_half_a_line_of_it_is_cut_off(run: Path) -> None:
    path = RunFolder(run).study
    write_study(path)
    whole = path.read_bytes()
    assert mend(run) == []
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"op_code":4,"worker')
    assert mend(run) == []
    assert path.read_bytes() == whole
    assert mend(run, lrs=LRS[:2]) == []  # the study hears of a trial before the journal does
    path.unlink()
    assert mend(run) == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: write_study(path, name="another"), "cannot be read (KeyError: "),
        (lambda path: path.write_bytes(b"\xff\xfe\n" * 3), "cannot be read (UnicodeDecodeError: "),
        (lambda path: path.write_bytes(b"somebody's notes\nand more\n"), "cannot be read (JSONDecodeError: "),
        (lambda path: path.write_bytes(b"notes without a newline"), "cannot be read (KeyError: "),
        (lambda path: path.write_bytes(b""), "cannot be read (KeyError: "),
        (lambda path: path.write_bytes(b"[]\n7\n"), "cannot be read (TypeError: "),
        (lambda path: write_study(path, direction="minimize"), "is of a search that would minimize; "),
        (lambda path: write_study(path, trial_1="trial 2"), "has another trial 1; "),
        (Path.mkdir, "is not a file; "),
        (os.mkfifo, "is not a file; "),
    ],
)
def test_study_that_cannot_be_that_of_the_journal_is_set_aside(
    damage: Callable[[Path], object], fault: str, run: Path
) -> None:
    path = RunFolder(run).study
    damage(path)
    content = path.read_bytes() if path.is_file() else None
    [line] = mend(run)
    aside = run / "study.journal.damaged"
    assert line.startswith(f"{path}: {fault}")
    assert line.endswith("; it is kept as study.journal.damaged, and rebuilt from reports.journal")
    assert "\n" not in line
    assert not path.exists()
    assert content is None or aside.read_bytes() == content
    assert mend(run) == []


def test_study_whose_settings_are_not_those_of_the_journal_is_set_aside(run: Path) -> None:
    write_study(RunFolder(run).study)
    [line] = mend(run, lrs=(*LRS[:2], 0.04))
    assert ": has another trial 2; " in line
    write_study(RunFolder(run).study)
    [line] = mend(run, lrs=(*LRS, 0.04))
    assert ": has no trial 3; it is kept as study.journal.damaged-2, " in line
    contents = [(run / f"study.journal.damaged{number}").read_bytes() for number in ("", "-2")]
    assert [content.count(b"\n") for content in contents] == [contents[0].count(b"\n")] * 2


def test_confirmed_runs_that_cannot_be_read_are_set_aside(run: Path) -> None:
    path = RunFolder(write_full_run(run)).confirm
    whole = path.read_bytes()
    assert mend(run) == []
    assert path.read_bytes() == whole
    for number, content in (("", whole[:-9]), ("-2", b""), ("-3", b"PAR1" * 50)):
        path.write_bytes(content)
        [line] = mend(run)
        assert f"; it is kept as confirm.parquet.damaged{number}, " in line
        assert "\n" not in line
        assert path.with_name(f"confirm.parquet.damaged{number}").read_bytes() == content
        assert not path.exists()
