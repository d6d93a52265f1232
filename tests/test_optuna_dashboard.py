"""The study of a run opens in optuna-dashboard, while the search goes on and after it."""

import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard  # type: ignore[import-untyped]
from optuna.storages.journal import JournalFileBackend

from tune_amp.results.run_folder import RunFolder
from tune_amp.search.study import AmpSearch
from tune_amp.space.space import load_space


def get(path: Path, url: str) -> Any:
    """What optuna-dashboard answers, started anew on the run's journal file."""
    app = optuna_dashboard.wsgi(optuna.storages.JournalStorage(JournalFileBackend(str(path))))
    request: dict[str, Any] = {"PATH_INFO": url}
    setup_testing_defaults(request)
    statuses = []
    body = b"".join(app(request, lambda status, *_: statuses.append(status)))
    assert statuses == ["200 OK"]
    return json.loads(body)


def test_dashboard_shows_a_study_live_and_after(tmp_path: Path) -> None:
    search = AmpSearch(
        load_space("precision"),
        {"model": "simple_net", "dataset": "digits", "max_epochs": 3, "seed": 0},
        train_images=1413,
        objectives=("val_accuracy",),
        seed=0,
        folder=tmp_path,
        study_name="run",
        num_samples=4,
    )
    report = {"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0, "status": "running", "training_iteration": 1}
    for trial_id in "abc":
        search.suggest(trial_id)
        search.on_trial_result(trial_id, report | {"done": False})
    search.on_trial_complete("a", report | {"epoch": 3, "status": "completed", "done": True})
    search.on_trial_complete("b", report | {"done": True})

    [study] = get(RunFolder(tmp_path).study, "/api/studies")["study_summaries"]
    assert (study["study_name"], study["directions"]) == ("run", ["maximize"])
    details = get(RunFolder(tmp_path).study, f"/api/studies/{study['study_id']}")
    assert details["objective_names"] == ["val_accuracy"]
    trials = details["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Pruned", "Running"]
    assert trials[0]["intermediate_values"] == [{"step": 1, "value": 0.5}, {"step": 3, "value": 0.5}]

    search.close()
    trials = get(RunFolder(tmp_path).study, f"/api/studies/{study['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Pruned", "Fail"]
