"""The card of trained weights says what is known of them and no more, and its snippet loads and uses them."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from records import PROVENANCE, make_scored, make_trial
from small_runs import TIED_MODEL, make_split

from tune_amp.results.confirmed import DEFAULT_ID, Confirmation
from tune_amp.results.records import BestFile, BestRow
from tune_amp.results.statistics import wilson_interval
from tune_amp.reuse.card import describe_card
from tune_amp.reuse.final import FinalResult, FinalTraining
from tune_amp.training.data import Dataset, load_dataset
from tune_amp.trial.config import TrialConfig
from tune_amp.trial.text import code_span

WriteModule = Callable[[str], str]
CONFIG = TrialConfig(lr=0.01, batch_size=8, max_epochs=2)


def make_dataset() -> Dataset:
    train, validation, test = (make_split(count, seed=count) for count in (60, 24, 45))
    # Pixels that do not begin at 0, so that a forgotten shift shows.
    parts = [dataclasses.replace(part, images=part.images // 2 + 30) for part in (train, validation, test)]
    return Dataset(name="small", num_classes=3, content_hash="cafe", train=parts[0], validation=parts[1], test=parts[2])


def make_confirmation(**changes: Any) -> Confirmation:
    values: dict[str, Any] = {
        "confirm_seeds": (11, 12, 13),
        "test_accuracy_mean": 0.9713,
        "test_accuracy_low": 0.9688,
        "test_accuracy_high": 0.9738,
        "tied_with_best": True,
    }
    return Confirmation(**values | changes)


def make_source(*rows: BestRow, rank: int = 1, **provenance: Any) -> dict[str, Any]:
    about = dataclasses.replace(PROVENANCE, **provenance)
    best = BestFile(path=Path("best.parquet"), rows=rows, provenance=about, has_epochs=False)
    return {"best": best, "rank": rank, "versions": {"tune_amp": "0.1.0", "torch": "2.15.0"}}


def make_row(rank: int | None, accuracy: float = 0.97, **changes: Any) -> BestRow:
    trial = make_scored(DEFAULT_ID if rank is None else f"trial{rank}", accuracy, config=CONFIG)
    return BestRow(rank=rank, trial=trial, **changes)


def train(config: TrialConfig = CONFIG) -> tuple[FinalTraining, FinalResult]:
    training = FinalTraining(config, make_dataset(), torch.device("cpu"))
    assert len(list(training.epochs())) == config.max_epochs
    return training, training.test()


@pytest.fixture(scope="module")
def result() -> FinalResult:
    return train()[1]


def lines_of(card: str, section: str) -> list[str]:
    [text] = re.findall(rf"^## {section}\n\n(.*?)(?=\n\n## |\Z)", card, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("- ") for line in text.strip().splitlines()]


def told(result: FinalResult, *rows: BestRow, rank: int = 1, **provenance: Any) -> str:
    return "\n".join(
        lines_of(describe_card(result, **make_source(*rows, rank=rank, **provenance)), "Where the .* from")
    )


@pytest.mark.parametrize("model", ["simple_net", "tied"])
@pytest.mark.parametrize("input_scaling", ["minmax", "standard"])
def test_the_snippet_loads_the_weights_and_classifies_as_tested(
    model: str,
    input_scaling: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_module: WriteModule,
) -> None:
    name = f"{write_module(TIED_MODEL)}:net" if model == "tied" else model
    training, result = train(dataclasses.replace(CONFIG, model=name, input_scaling=input_scaling))
    card = describe_card(result, **make_source(make_row(1)))
    training.save(tmp_path, result, {}, card)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(99)
    exec(find_snippet((tmp_path / "card.md").read_text()), names)
    test = make_dataset().test
    found = names["classify"](torch.from_numpy(test.images))
    assert np.mean(found.numpy() == test.labels) == pytest.approx(result.test_accuracy, abs=1e-12)
    assert result.test_accuracy > 0.5
    assert ("must be importable" in card) is (model == "tied")


OWN_INPUTS = """
import numpy as np
from torch import nn
def data():
    values = np.random.default_rng(0).integers(0, 9, (400, 6))
    labels = (values[:, 0] > 4).astype(np.int64)
    return {inputs}[:300], labels[:300], {inputs}[300:], labels[300:]
def tokens_net(input_shape, num_classes):
    return nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.LazyLinear(num_classes))
def floats_net(input_shape, num_classes):
    return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, num_classes))
"""


@pytest.mark.parametrize(
    ("model", "inputs", "dtype"), [("tokens", "values", "int64"), ("floats", "(values / 3)", "float32")]
)
def test_a_card_does_not_take_tokens_or_floats_for_images(
    model: str, inputs: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_module: WriteModule
) -> None:
    module = write_module(OWN_INPUTS.format(inputs=inputs))
    dataset = load_dataset(f"{module}:data")
    config = dataclasses.replace(CONFIG, model=f"{module}:{model}_net", dataset=f"{module}:data")
    training = FinalTraining(config, dataset, torch.device("cpu"))
    list(training.epochs())
    result = training.test()
    card = describe_card(result, **make_source(make_row(1)))
    training.save(tmp_path, result, {}, card)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(find_snippet(card), names)
    found = names["classify"](torch.from_numpy(dataset.test.images))
    assert np.mean(found.numpy() == dataset.test.labels) == pytest.approx(result.test_accuracy, abs=1e-12)
    assert f"- Input: {dtype} [batch, 6], given to the model unscaled." in card
    assert "uint8" not in card


def find_snippet(card: str) -> str:
    [snippet] = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return str(snippet)


HOSTILE = "\x1b[2J\n\n# Owned ``` `<script>alert(1)</script>\n```python\nimport os\n```\n| [x](http://evil) ``"


def test_texts_of_a_file_stand_in_the_card_as_text_and_nothing_else(result: FinalResult) -> None:
    """Whatever a file holds, the card has the headings, the code, the elements and the links of an innocent one."""
    plain = make_row(
        1, confirmation=Confirmation(confirm_seeds=(1, 2), confirm_failures=("seed 1: failed",), verdict="no")
    )
    trial = dataclasses.replace(plain.trial, trial_id=HOSTILE, trial_name=HOSTILE)
    failed = Confirmation(confirm_seeds=(1, 2), confirm_failures=(HOSTILE, HOSTILE), verdict=HOSTILE)
    innocent = describe_card(result, **make_source(plain))
    hostile = describe_card(result, **make_source(BestRow(rank=1, trial=trial, confirmation=failed), run=HOSTILE))
    assert hostile.count("Owned") == 6
    assert all(character.isprintable() or character == "\n" for character in hostile)
    acting = {"heading_open", "fence", "html_block", "html_inline", "link_open", "list_item_open", "table_open"}
    innocent_tokens, hostile_tokens = (
        [(token.type, token.content) for token in list_tokens(card) if token.type in acting]
        for card in (innocent, hostile)
    )
    assert len(innocent_tokens) > 20
    assert hostile_tokens == innocent_tokens


def list_tokens(card: str) -> list[Token]:
    """What CommonMark, with GitHub's tables and links, makes of a page: blocks, and what stands in them."""
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(card)
    return [token for block in blocks for token in (block, *(block.children or ()))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain | text", "`plain | text`"),
        ("a `b` c", "``a `b` c``"),
        ("```", "```` ``` ````"),
        ("`", "`` ` ``"),
        ("", "`  `"),
        ("two\n# lines\x1b", "`two # lines\ufffd`"),
    ],
)
def test_code_span_holds_any_text(text: str, expected: str) -> None:
    assert code_span(text) == expected


def test_accuracy_comes_with_its_interval_over_images_and_that_the_test_set_was_read_once(result: FinalResult) -> None:
    card = describe_card(result, **make_source(make_row(1)))
    low, high = wilson_interval(result.test_accuracy, 45)
    accuracy, reading = lines_of(card, "How good")
    numbers = [float(number) for number in re.findall(r"([\d.]+) %", accuracy)]
    assert numbers == [round(100 * result.test_accuracy, 2), 95, round(100 * low, 2), round(100 * high, 2)]
    assert "on 45 images, in fp32" in accuracy
    assert reading.startswith("The test set was read once")


def test_what_the_weights_need_is_told(result: FinalResult) -> None:
    card = describe_card(result, **make_source(make_row(1)))
    model, given, output = lines_of(card, "What it is")
    assert model.startswith("Model: `simple_net`, 5,123 parameters")
    assert "[batch, 1, 4, 4]" in given
    assert f"`(pixel - {result.input_shift!r}) * {result.input_factor!r}`" in given
    assert result.input_shift == 30.0
    assert output == "Output: logits [batch, 3]."


def test_what_they_were_trained_on_is_told(result: FinalResult) -> None:
    text = "\n".join(lines_of(describe_card(result, **make_source(make_row(1))), "What it was trained on"))
    for part in (
        "84 images",
        "`cafe`",
        "Seed 0, 2 epochs, 20 steps",
        "Precision fp32, on cpu",
        "torch 2.15.0",
        "lr 0.01",
    ):
        assert part in text


def test_the_confirmation_of_the_settings_is_told_apart_from_these_weights(result: FinalResult) -> None:
    default = make_row(None, confirmation=make_confirmation(test_accuracy_mean=0.9555))
    card = describe_card(result, **make_source(make_row(1, confirmation=make_confirmation()), default))
    text = "\n".join(lines_of(card, "How good"))
    assert "again on 3 fresh seeds" in text
    assert "accuracy 97.13 %, 95 % interval 96.88 % to 97.38 % (Student's t, over seeds)" in text
    assert "default settings reached a mean of 95.55 %" in text
    assert "not the same training" not in text


def test_a_confirmation_at_another_budget_is_said_to_be_another_training(result: FinalResult) -> None:
    trial = dataclasses.replace(make_row(1).trial, config=dataclasses.replace(CONFIG, max_epochs=9, seed=4))
    row = BestRow(rank=1, trial=trial, confirmation=make_confirmation())
    card = describe_card(result, **make_source(row))
    assert "Those runs took 9 epochs, this one 2: not the same training." in lines_of(card, "How good")
    changed = lines_of(card, "Where the settings come from")[-1]
    assert changed == "Changed for this training: max_epochs 2 instead of 9, seed 0 instead of 4."


def test_settings_that_failed_on_a_fresh_seed_get_no_mean_of_the_others(result: FinalResult) -> None:
    failed = Confirmation(confirm_seeds=(11, 12), confirm_failures=("seed 12: diverged",))
    card = describe_card(result, **make_source(make_row(1, confirmation=failed)))
    assert lines_of(card, "How good")[2:] == [
        "Of 2 runs of these settings on fresh seeds not all completed: `seed 12: diverged`."
    ]
    assert "Whether it may be the best is unknown" in told(result, make_row(1, confirmation=failed))


def test_the_search_the_rank_and_the_trial_are_named(result: FinalResult) -> None:
    text = told(result, make_row(1), make_row(2), rank=2)
    assert "Run `2026-03-01-mnist`, rank 2 of 2." in text
    assert "Trial `trial2`" in text
    assert "Searched for val_accuracy on 5,000 validation images." in text
    assert "Changed" not in text


def test_ties_of_the_search_are_told_where_nothing_was_confirmed(result: FinalResult) -> None:
    rows = [make_row(1, 0.97), make_row(2, 0.969), make_row(3, 0.90)]
    assert "Not confirmed on fresh seeds. Tied with rank 2 (" in told(result, *rows)
    assert "Tied with rank 1 (" in told(result, *rows, rank=2)
    assert "Worse than rank 1 (" in told(result, *rows, rank=3)
    assert "No other ranked configuration is tied with it (" in told(result, rows[0], rows[2])
    assert "Whether others are as good was not tested." in told(result, *rows, objective="val_loss")


def test_the_verdict_of_the_search_is_told_whichever_rank_was_trained(result: FinalResult) -> None:
    verdict = "rank 1 is better than the defaults: +0.50 points"
    rows = [make_row(1, confirmation=make_confirmation(verdict=verdict)), make_row(2, confirmation=make_confirmation())]
    for rank in (1, 2):
        line = "Verdict of the search: `rank 1 is better than the defaults: +0.50 points`."
        assert line in told(result, *rows, rank=rank)


def test_a_default_that_no_other_beats_is_not_said_to_have_been_found(result: FinalResult) -> None:
    trial = make_trial(DEFAULT_ID, config=CONFIG, epochs=())
    rows = [
        BestRow(rank=1, trial=trial, confirmation=make_confirmation()),
        make_row(2, confirmation=make_confirmation()),
    ]
    card = describe_card(result, **make_source(*rows))
    assert "with the default settings, which none was shown to beat; the weights are fp32" in card
    assert "The tutorial's default configuration.\n" in card
    assert "default settings reached" not in card  # beside themselves


def test_ties_of_the_confirmation_are_told_where_there_is_one(result: FinalResult) -> None:
    tied, apart = make_confirmation(), make_confirmation(tied_with_best=False)
    rows = [
        make_row(1, 0.90, confirmation=tied),
        make_row(2, 0.99, confirmation=apart),
        make_row(3, 0.91, confirmation=tied),
        make_row(None, confirmation=tied),
    ]
    assert "Tied with rank 3 (one-sided paired t" in told(result, *rows)
    assert "Shown to be worse than another in val_accuracy (one-sided paired t" in told(result, *rows, rank=2)
    assert "Tied with rank 1 (one-sided paired t" in told(result, *rows, rank=3)
    assert "No other ranked configuration is tied with it (one-sided" in told(result, *rows[:2])
    assert "rank 1 of 3" in told(result, *rows)
    broken = make_row(2, 0.99, confirmation=make_confirmation(tied_with_best=None))
    text = told(result, rows[0], broken, rows[2])
    assert "Tied with rank 3 (one-sided" in text
    assert "Runs did not complete of rank 2: not compared." in text
    assert "Compared with no other ranked configuration. Runs did not complete of rank 2" in told(
        result, rows[0], broken
    )
