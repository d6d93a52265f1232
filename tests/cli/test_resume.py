import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import past_runs as made
import pytest
from records import PROVENANCE

from tune_amp.cli.resume import describe_changes, describe_progress, name_resume_command, remember, restore_arguments
from tune_amp.cli.search_arguments import search_parser
from tune_amp.results.journal import Journal
from tune_amp.results.provenance import list_versions
from tune_amp.search.history import RunHistory, open_history
from tune_amp.search.options import build_options, check_trackers
from tune_amp.space.space import MAX_BYTES, load_space
from tune_amp.trial.config import KEEPS_NOTHING, InputError

BEGUN = ("quick", "--dataset", "digits", "--num-samples", "4", "--max-epochs", "3", "--data-dir", "somewhere")


def parser() -> argparse.ArgumentParser:
    return search_parser("scripts/search.py")


def begin(folder: Path, *command: str, trial: dict[str, Any] | None = None, **about: Any) -> Path:
    """Leave the journal of a run that this command line began, its last trial with the settings ``trial``."""
    arguments = parser().parse_args([*BEGUN, *command])
    space = load_space("quick")
    origin = {"dataset": "digits", "space_source": space.source, "space_text": space.text, **about}
    provenance = dataclasses.replace(PROVENANCE, **origin)
    first = made.beginning(arguments=remember(arguments), provenance=dataclasses.asdict(provenance))
    session = made.session(arguments=first["arguments"])
    options = build_options(vars(arguments))
    shared = {name: getattr(options, name) for name in ("model", "max_epochs", "seed")}
    shared |= {"dataset": provenance.dataset, "imbalance": arguments.imbalance}
    trials = [made.trial("a", 0, **shared), made.trial("b", 1, **shared | (trial or {}))]
    made.write_journal(folder, [json.loads(json.dumps(first)), session, *trials])
    return folder


def resume(folder: Path, *command: str) -> argparse.Namespace:
    with open_history(folder) as past:
        return restore_arguments(parser(), ["--resume", str(folder), *command], past)


def test_run_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    arguments = resume(begin(tmp_path, "--sampler", "random", "--cpus-per-trial", "1"))
    begun = parser().parse_args([*BEGUN, "--sampler", "random", "--cpus-per-trial", "1"])
    of_one_call: dict[str, Any] = {"resume": str(tmp_path), "space": None}  # the space is the run's own
    of_one_call["data_dir"] = Path("somewhere").resolve()
    assert vars(arguments) == vars(begun) | of_one_call


def test_how_much_and_where_may_change(tmp_path: Path) -> None:
    changes = (
        "--num-samples",
        "9",
        "--max-concurrent",
        "1",
        "--time-budget",
        "60",
        "--max-failures",
        "9",
        "--data-dir",
        "elsewhere",
        "--json",
    )
    arguments = resume(begin(tmp_path, "--quiet"), *changes)
    assert (arguments.num_samples, arguments.max_concurrent, arguments.time_budget) == (9, 1, 60.0)
    assert arguments.max_failures == 9
    assert (arguments.data_dir, arguments.json, arguments.quiet) == (Path("elsewhere"), True, False)
    assert arguments.max_epochs == 3


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["--max-epochs", "8"], "--max-epochs: must stay 3 in a resumed run, got 8"),
        (["--seed", "1"], "--seed: must stay 0 in a resumed run, got 1"),
        (["--model", "vit"], "--model: must stay simple_net in a resumed run, got vit"),
        (["--grace-period", "2"], "--grace-period: must stay 1 in a resumed run, got 2"),
        (["--reduction-factor", "3"], "--reduction-factor: must stay 2.0 in a resumed run, got 3.0"),
        (["--scheduler", "none"], "--scheduler: must stay asha in a resumed run, got none"),
        (["--sampler", "random"], "--sampler: must stay tpe in a resumed run, got random"),
        (["--objective", "val_loss"], "--objective: must stay val_accuracy in a resumed run, got val_loss"),
        (["--dataset", "mnist"], "--dataset: must stay digits in a resumed run, got mnist"),
        (["--imbalance", "2"], "--imbalance: must stay 1.0 in a resumed run, got 2.0"),
        (["--num-samples", "1"], "--num-samples: must be at least the 2 of the run, got 1"),
        (["--name", "x"], "--name: sets how a run begins, and is not allowed with --resume"),
        (["--warm-start", "x"], "--warm-start: sets how a run begins, and is not allowed with --resume"),
        (["--max-epochs", "0"], "--max-epochs: must be at least 1, got 0"),
        (["--num-samples", "0"], "--num-samples: must be at least 1, got 0"),
    ],
)
def test_what_trials_have_in_common_must_stay(tmp_path: Path, command: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        resume(begin(tmp_path), *command)
    assert str(caught.value) == expected


def test_what_was_changed_once_stays_for_the_next_time(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    longer = resume(folder, "--num-samples", "9", "--time-budget", "60")
    with Journal(folder / "reports.journal") as journal:
        journal.append(made.session(5.0, num_samples=9, arguments=remember(longer)))
    again = resume(folder)
    assert (again.num_samples, again.time_budget) == (9, 60.0)
    with open_history(folder) as past:
        assert past.num_samples == 4  # samplers are sized as the run was begun


def test_warm_start_that_was_never_taken_over_is_not_forgotten_in_silence(tmp_path: Path) -> None:
    folder = begin(tmp_path, warm_start="run x")
    assert resume(folder).max_epochs == 3
    first = json.loads((folder / "reports.journal").read_text().splitlines()[0].partition(" ")[2])
    made.write_journal(folder, [first, made.session(arguments=first["arguments"])])
    with pytest.raises(InputError) as caught:
        resume(folder)
    assert str(caught.value) == "--resume: the run was cut off before its warm start was applied; start it again"


def test_naming_what_stays_is_no_change(tmp_path: Path) -> None:
    arguments = resume(begin(tmp_path), "quick", "--sampler", "tpe", "--max-epochs", "3", "--dataset", "digits")
    assert arguments.max_epochs == 3


def test_another_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        resume(begin(tmp_path), "stress")
    assert str(caught.value).startswith("SPACE: must stay ")
    assert str(caught.value).endswith(" as it was in a resumed run, got stress, which differs")


def test_data_set_is_the_one_that_was_found_then(tmp_path: Path) -> None:
    """``auto`` may find another one today."""
    assert resume(begin(tmp_path, "--dataset", "auto")).dataset == "digits"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"model": "evil:net"}, "model: must be simple_net, as in the whole run, got 'evil:net'"),
        ({"dataset": "evil:load"}, "dataset: must be digits, as in the whole run, got 'evil:load'"),
        ({"max_epochs": 10**18}, "max_epochs: must be 3, as in the whole run, got 1000000000000000000"),
        ({"seed": 7}, "seed: must be 0, as in the whole run, got 7"),
        ({"imbalance": 2.0}, "imbalance: must be 1.0, as in the whole run, got 2.0"),
    ],
)
def test_trial_with_other_settings_than_its_run_is_refused(tmp_path: Path, settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError) as caught:
        resume(begin(tmp_path, trial=settings))
    assert str(caught.value) == f"reports.journal: trial 'b': {rule}"


def test_pickle_of_a_study_is_loaded_only_where_the_command_line_names_the_sampler(tmp_path: Path) -> None:
    folder = begin(tmp_path, "--sampler", "cmaes")
    with pytest.raises(InputError) as caught:
        resume(folder)
    assert str(caught.value) == (
        "--resume: sampler: cmaes keeps a pickle in the study, and loading a pickle can run code; "
        "to load it, add --sampler cmaes"
    )
    assert resume(folder, "--sampler", "cmaes").sampler == "cmaes"


@pytest.mark.parametrize("name", ["model", "dataset"])
def test_a_users_own_code_runs_only_where_the_command_line_names_it(tmp_path: Path, name: str) -> None:
    about: dict[str, Any] = {"dataset": "their:data"} if name == "dataset" else {}
    folder = begin(tmp_path, f"--{name}", "their:data", **about)
    for command in ([], [f"--{name}", "other:data"]):
        with pytest.raises(InputError) as caught:
            resume(folder, *command)
        expected = f"--resume: {name}: names your own code; to run it, add --{name} their:data"
        assert str(caught.value) == expected
    assert getattr(resume(folder, f"--{name}", "their:data"), name) == "their:data"


@pytest.mark.parametrize(
    ("flag", "recorded", "other", "none"),
    [
        ("--address", "somewhere:6379", "auto", None),
        ("--storage-path", "s3://bucket/runs", "/shared", None),
        ("--tracker", "tensorboard,mlflow", "wandb", ["none"]),
    ],
)
def test_what_leads_out_of_the_run_folder_is_named_again_changed_or_left_out(
    flag: str, recorded: str, other: str, none: object, tmp_path: Path
) -> None:
    folder, name = begin(tmp_path, flag, recorded), flag.removeprefix("--").replace("-", "_")
    with pytest.raises(InputError) as caught:
        resume(folder)
    assert str(caught.value) == f"--resume: must be given again, each as it was or as none: {flag} {recorded}"
    for given in (recorded, other):
        found = getattr(resume(folder, flag, given), name)
        assert found == ([given] if name == "tracker" else given)
    assert getattr(resume(folder, flag, "none"), name) == none
    without = resume(folder, flag, "none")
    without.tracker = check_trackers(without.tracker)
    with Journal(folder / "reports.journal") as journal:
        journal.append(made.session(5.0, arguments=remember(without)))
    assert resume(folder).tracker == []
    assert (resume(folder).address, resume(folder).storage_path) == (None, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"address": 7}, "arguments.address: must be a text or null, got 7"),
        ({"storage_path": {"a": 1}}, "arguments.storage_path: must be a text or null, got {'a': 1}"),
        ({"tracker": [3]}, "arguments.tracker: must be a list of names, got [3]"),
        ({"tracker": "mlflow"}, "arguments.tracker: must be a list of names, got 'mlflow'"),
        ({"data_dir": 5}, "arguments.data_dir: must be a text or null, got 5"),
        ({"seed": "x"}, "arguments.seed: must be a whole number, got 'x'"),
        ({"seed": None}, "arguments.seed: must be a whole number, got None"),
    ],
)
def test_arguments_that_no_search_leaves_are_refused_in_a_line(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = begin(tmp_path)
    with open_history(folder) as past:
        arguments = dict(past.arguments)
    with Journal(folder / "reports.journal") as journal:
        journal.append(made.session(5.0, arguments=arguments | changes))
    with pytest.raises(InputError) as caught:
        resume(folder)
    assert str(caught.value).startswith(f"reports.journal: {expected}")
    for name in arguments.keys() - {"dataset"}:
        with Journal(folder / "reports.journal") as journal:
            journal.append(made.session(6.0, arguments={key: arguments[key] for key in arguments.keys() - {name}}))
        with pytest.raises(InputError, match=f"^reports.journal: arguments.{name}: must be "):
            resume(folder)


def test_what_is_told_once_is_not_taken_from_a_journal(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    with open_history(folder) as past:
        arguments = dict(past.arguments) | {"json": True, "results_dir": "/", "unknown": 1}
    with Journal(folder / "reports.journal") as journal:
        journal.append(made.session(5.0, arguments=arguments))
    found = resume(folder)
    assert (found.json, found.results_dir) == (False, Path("results"))
    assert not hasattr(found, "unknown")


def test_paths_are_kept_as_seen_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = begin(tmp_path / "run", "--storage-path", "checkpoints")
    monkeypatch.chdir("/")
    with open_history(folder) as past:
        assert past.arguments["storage_path"] == str(tmp_path / "checkpoints")
        assert past.arguments["data_dir"] == str(tmp_path / "somewhere")
    given = parser().parse_args([*BEGUN, "--storage-path", "checkpoints"])
    assert remember(given)["storage_path"] == "/checkpoints"


def changes(folder: Path) -> list[str]:
    with open_history(folder) as past:
        return describe_changes(past, folder)


def test_nothing_is_said_where_nothing_changed(tmp_path: Path) -> None:
    folder = begin(tmp_path, versions=list_versions("torch", "ray"))
    (folder / "space.yaml").write_text(load_space("quick").text)
    assert changes(folder) == []


def test_a_loop_that_keeps_nothing_is_said_to_start_again(tmp_path: Path) -> None:
    forgotten, kept = made.report("a", 1, metrics={"loop": KEEPS_NOTHING}), made.report("c", 1)
    events = [made.session(), *(made.trial(name, number) for number, name in enumerate("abc")), forgotten, kept]
    with made.written_past(tmp_path, *events) as past:
        [line] = [line for line in describe_changes(past, tmp_path) if "trial.keep" in line]
    assert line == "your loop keeps nothing (trial.keep): 1 trial starts again from the beginning"


def test_other_versions_are_explained(tmp_path: Path) -> None:
    now = list_versions("torch")["torch"]
    [line] = changes(begin(tmp_path, versions={**list_versions("ray"), "torch": "2.1.0"}))
    assert line == f"torch 2.1.0 then, {now} now: trials from here on may differ from what they would have been"


def test_library_that_is_gone_is_explained(tmp_path: Path) -> None:
    [line] = changes(begin(tmp_path, versions={"no-such-library": "1.0"}))
    assert line.startswith("no-such-library 1.0 then, not installed now: ")


def test_space_file_that_was_edited_since_is_explained(tmp_path: Path) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text("parameters: {}\n")
    [line] = changes(begin(tmp_path / "run", space_source=str(source), versions={}))
    assert line == f"{source} has changed since; the run resumes with the space as it was"


def test_what_a_run_names_as_its_space_is_read_only_where_it_can_be_one(tmp_path: Path) -> None:
    """A run may come from anybody, and a pipe that nobody writes would be read for ever."""
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(b" " * (MAX_BYTES + 1))
    for number, source in enumerate((pipe, large, tmp_path)):
        assert changes(begin(tmp_path / str(number), space_source=str(source), versions={})) == []


def test_runs_own_copy_of_the_space_must_not_be_edited(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    (folder / "space.yaml").write_text("parameters: {}\n")
    with pytest.raises(InputError) as caught:
        changes(folder)
    assert str(caught.value).startswith(f"{folder}/space.yaml: must stay as it was when the run began")


def test_standing_counts_what_is_over_and_what_goes_on(tmp_path: Path) -> None:
    events = [made.session(), *(made.trial(name, number) for number, name in enumerate("abcd"))]
    events += [made.report("b", 1), made.report("d", 1, done=True), made.end("a", "failed"), made.session(95.4)]
    with made.written_past(tmp_path, *events) as past:
        told = describe_progress(past, 32, 100.0)
        assert describe_progress(past, 32, 95.0) == f"{told}, all of --time-budget 95"
    assert told == "2 of 32 trials are over, 2 were cut off (1 of them after a report); 95 s so far"
    with made.written_past(tmp_path, made.session(), made.trial("a", 0), made.end("a", "failed")) as past:
        assert describe_progress(past, 1) == "1 of 1 trials are over; 3 s so far"


@pytest.mark.parametrize(
    ("folder", "model", "more", "expected"),
    [
        ("results/demo", "simple_net", (), "python search.py --resume demo"),
        ("elsewhere/demo", "simple_net", (), "python search.py --resume elsewhere/demo"),
        ("results/two words", "my.nets:net", (), "python search.py --resume 'results/two words' --model my.nets:net"),
        (
            "results/demo",
            "simple_net",
            ("--address", "auto", "--storage-path", "/shared", "--tracker", "mlflow", "--tracker", "wandb"),
            "python search.py --resume demo --address auto --storage-path /shared --tracker mlflow,wandb",
        ),
    ],
)
def test_command_that_goes_on_can_be_pasted(folder: str, model: str, more: tuple[str, ...], expected: str) -> None:
    arguments = remember(parser().parse_args([*BEGUN, "--model", model, *more]))
    command = name_resume_command(
        ("python", "search.py"), Path(folder), default_dir=Path("results"), arguments=arguments
    )
    assert command == expected


def test_secrets_of_a_url_are_not_kept_and_have_to_be_given_again(tmp_path: Path) -> None:
    url = "s3://user:secret@bucket/runs?endpoint_override=host:1"
    folder = begin(tmp_path, "--storage-path", url)
    assert b"secret" not in (folder / "reports.journal").read_bytes()
    with pytest.raises(InputError) as caught:
        resume(folder)
    assert str(caught.value) == (
        "--resume: must be given again, each as it was or as none: "
        "--storage-path 's3://***@bucket/runs?endpoint_override=host:1'"
    )
    with pytest.raises(InputError) as caught:
        resume(folder, "--storage-path", "s3://***@bucket/runs?endpoint_override=host:1")
    assert str(caught.value).startswith("--storage-path: must be given with its secrets, which are not kept: s3://***@")
    assert resume(folder, "--storage-path", url).storage_path == url
    folder = begin(tmp_path / "joined", "--address", "ray://user:secret@head:10001")
    assert b"secret" not in (folder / "reports.journal").read_bytes()


def test_what_is_remembered_is_plain(tmp_path: Path) -> None:
    with open_history(begin(tmp_path)) as past:
        assert isinstance(past, RunHistory)
        assert json.loads(json.dumps(past.arguments)) == past.arguments
        assert not {"resume", "name", "results_dir", "warm_start", "quiet", "json"} & past.arguments.keys()
