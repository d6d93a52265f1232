"""What the user's own task determines of a search's arguments."""

from typing import Any

import pytest

from tune_amp.cli.search_arguments import search_parser
from tune_amp.cli.search_request import adopt_own_code
from tune_amp.training import Task
from tune_amp.training import task as task_module


class OwnTask(Task):
    metric = ("f1", "max")

    def data(self) -> Any:
        raise NotImplementedError

    def model(self, **own: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("task", "flags", "expected"),
    [
        (OwnTask, "", ("mine:T", "mine:T", "val_f1:max")),
        (OwnTask, "--model vit --dataset digits --objective val_loss", ("vit", "digits", "val_loss")),
        (Task, "", ("simple_net", "auto", "val_accuracy")),
    ],
)
def test_task_determines_what_no_flag_does(
    task: type[Task], flags: str, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_module, "load_task", lambda name: task())
    arguments = search_parser("").parse_args(["--task", "mine:T", *flags.split()])
    adopt_own_code(arguments)
    assert (arguments.model, arguments.dataset, arguments.objective) == expected
