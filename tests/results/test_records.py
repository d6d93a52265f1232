"""What is written is what is read, damage is named, and the best trial is the right one."""

import dataclasses
import datetime
import itertools
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import INF, NAN, PROVENANCE, STARTED, make_epoch, make_trial
from small_runs import CLOCKS

from tune_amp.results import parquet
from tune_amp.results.confirmed import Confirmation, ConfirmedRun
from tune_amp.results.parquet import build_columns, read_file, write_parquet
from tune_amp.results.records import (
    SCHEMAS,
    BestRow,
    SlotTime,
    TrialRecord,
    load_best,
    load_best_file,
    load_best_rows,
    load_confirmed,
    load_provenance,
    load_trials,
    load_trials_file,
    rank_trials,
    write_best,
    write_confirmed,
    write_trials,
)
from tune_amp.trial.config import (
    CLASS_WEIGHTINGS,
    CURRICULA,
    INPUT_SCALINGS,
    MODELS,
    OPTIMIZERS,
    EpochMetrics,
    InputError,
    TrialConfig,
    TrialStatus,
    field_types,
)


def load_best_record(path: Path, rank: int = 1) -> TrialRecord:
    return load_best_file(path).pick(rank).trial


COMPLETED = make_trial()
DIVERGED = make_trial(
    "16076160",  # reads as a number where ids are not typed, as 7422e802 reads as infinity
    status=TrialStatus.DIVERGED,
    config=TrialConfig(lr=0.5, model="my.models:build"),
    epochs=(make_epoch(1, train_loss=NAN, val_loss=INF, loss_scale=None, peak_memory_bytes=7),),
    error="loss is nan",
)
FAILED = make_trial("00000003", status=TrialStatus.FAILED, epochs=(), started=None, error="RuntimeError: no")
TRIALS = (COMPLETED, DIVERGED, FAILED)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_trials(tmp_path, TRIALS, PROVENANCE)
    write_best(tmp_path, rank_trials([COMPLETED, DIVERGED]), PROVENANCE)
    return tmp_path


# ---- round trip ----

seconds = st.floats(-1e12, 1e12)  # larger ones are refused: they would fill a line
shares = st.floats(-100, 100) | st.just(float("nan"))
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
any_float = st.floats()  # NaN and infinities included: a diverged trial reports them
counts = st.integers(0, 2**63 - 1)
texts = st.text(max_size=20)


def some_of(strategies: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with some of the names, in alphabetical order, as they are read back."""
    return st.fixed_dictionaries({}, optional=strategies).map(lambda values: dict(sorted(values.items())))


@st.composite
def configs(draw: st.DrawFn) -> TrialConfig:
    precision = draw(st.sampled_from(["fp32", "tf32", "bf16", "fp16"]))
    scaler: dict[str, st.SearchStrategy[Any]] = {
        "init_scale": st.floats(2.0**-126, 2.0**127),
        "growth_factor": st.floats(1, 1e6, exclude_min=True),
        "backoff_factor": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "growth_interval": st.integers(1, 2**63 - 1),
    }
    return TrialConfig(
        precision=precision,
        lr=draw(positive),
        batch_size=draw(st.integers(1, 2**63 - 1)),
        model=draw(st.sampled_from([*MODELS, "my.module:net", "ünï:f"])),
        dataset=draw(st.sampled_from(["mnist", "digits", "my:data"])),
        imbalance=draw(st.floats(1, allow_infinity=False)),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        weight_decay=draw(st.floats(0, allow_infinity=False)),
        grad_clip=draw(st.none() | positive),
        input_scaling=draw(st.sampled_from(INPUT_SCALINGS)),
        class_weighting=draw(st.sampled_from(CLASS_WEIGHTINGS)),
        curriculum=draw(st.sampled_from(CURRICULA)),
        max_epochs=draw(st.integers(1, 2**63 - 1)),
        seed=draw(counts),
        accumulate=draw(st.integers(1, 2**63 - 1)),
        task=draw(st.none() | st.just("my:Task")),
        train=draw(st.none() | st.just("my:train")),
        own=draw(
            some_of({"act": texts, "dropout": st.floats(allow_nan=False, allow_infinity=False), "hidden": counts})
        ),
        **({name: draw(values) for name, values in scaler.items()} if precision == "fp16" else {}),
    )


def metrics(epoch: int) -> st.SearchStrategy[EpochMetrics]:
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        float: any_float,
        int: counts,
        float | None: st.none() | any_float,
        int | None: st.none() | counts,
        str: texts,
        tuple[int, ...]: st.lists(counts, max_size=3).map(tuple),
        tuple[float, ...]: st.lists(any_float, max_size=3).map(tuple),
    }
    values = {name: strategies[kind] for name, kind in field_types(EpochMetrics).items()}
    values |= dict.fromkeys(values.keys() & CLOCKS, seconds)
    values |= {"metrics": some_of({"perplexity": any_float, "val_f1": any_float})}
    values |= dict.fromkeys(("val_accuracy", "underflow_share"), st.none() | shares)
    return st.builds(EpochMetrics, **values | {"epoch": st.just(epoch)})


@st.composite
def records(draw: st.DrawFn, trial_id: str) -> TrialRecord:
    epochs = sorted(draw(st.sets(st.integers(0, 2**63 - 1), max_size=3)))
    return TrialRecord(
        trial_id=trial_id,
        status=draw(st.sampled_from(TrialStatus)),
        config=draw(configs()),
        epochs=tuple(draw(metrics(epoch)) for epoch in epochs),
        trial_name=draw(texts),
        error=draw(st.none() | texts),
        inert=tuple(draw(st.lists(texts, max_size=3))),
        started=draw(st.none() | starts),
        wall_seconds=draw(seconds),
        device=draw(texts),
        num_threads=draw(counts),
    )


EAST = datetime.timezone(datetime.timedelta(hours=5, minutes=45))
starts = st.datetimes(  # fold tells nothing in a zone without summer time, and is not kept
    min_value=datetime.datetime(1, 1, 2),  # noqa: DTZ001 (hypothesis adds the zone)
    timezones=st.sampled_from([datetime.UTC, EAST]),
).map(lambda start: start.replace(fold=0))
trial_ids = st.lists(st.sampled_from(["7422e802", "16076160", "", "nan", "a\0b"]), min_size=1, max_size=3, unique=True)
all_records = trial_ids.flatmap(lambda ids: st.tuples(*(records(trial_id) for trial_id in ids)))


@settings(max_examples=50)
@given(trials=all_records)
def test_what_is_read_equals_what_was_written(trials: tuple[TrialRecord, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_trials(folder, trials, PROVENANCE)
        write_best(folder, rank_trials(trials), PROVENANCE)
        # repr tells types apart, -0.0 from 0.0, and takes NaN for equal to itself; a float's repr is exact.
        assert repr(load_trials(folder)) == repr(list(trials))
        for rank, trial in enumerate(trials, start=1):
            assert repr(load_best_record(folder, rank)) == repr(trial)
            assert repr(load_best(folder, rank)) == repr(trial.config)


@given(
    command=st.lists(st.text()), versions=st.dictionaries(st.text(), st.text()), seed=st.integers(-(2**63), 2**63 - 1)
)
@settings(max_examples=30)
def test_provenance_survives_the_round_trip(command: list[str], versions: dict[str, str], seed: int) -> None:
    written = dataclasses.replace(PROVENANCE, command=tuple(command), versions=versions, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        write_trials(Path(name), [], written)
        assert load_provenance(name) == written


def test_a_command_with_undecodable_bytes_is_written(tmp_path: Path) -> None:
    written = dataclasses.replace(PROVENANCE, command=("search.py", os.fsdecode(b"caf\xe9")))
    write_trials(tmp_path, [], written)
    assert load_provenance(tmp_path) == written


def test_a_run_without_trials_is_written_and_read(tmp_path: Path) -> None:
    write_trials(tmp_path, [], PROVENANCE)
    assert load_trials(tmp_path) == []
    assert pq.read_schema(tmp_path / "trials.parquet").names == SCHEMAS["trials"].names


@pytest.mark.parametrize("name", ["trials.parquet", "epochs.parquet", "best.parquet"])
def test_each_file_carries_the_provenance(run: Path, name: str) -> None:
    assert load_provenance(run / name) == PROVENANCE
    text = pq.read_metadata(run / name).metadata[b"tune_amp"]
    about = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert about["schema_version"] == 6
    assert about["kind"] == name.removesuffix(".parquet")
    assert about["provenance"]["space_text"] == PROVENANCE.space_text


def test_provenance_of_a_folder_needs_only_one_file(run: Path) -> None:
    (run / "trials.parquet").unlink()
    (run / "epochs.parquet").unlink()
    assert load_provenance(run) == PROVENANCE


def test_a_file_is_named_by_itself_or_by_its_folder_as_path_or_text(run: Path) -> None:
    for path in (run, run / "trials.parquet", str(run)):
        assert repr(load_trials(path)) == repr(list(TRIALS))
    for best in (run, run / "best.parquet", str(run / "best.parquet")):
        assert load_best(best) == COMPLETED.config


def test_the_first_rank_is_the_default(run: Path) -> None:
    assert load_best(run) == load_best(run, 1) == COMPLETED.config
    assert load_best(run, 2) == DIVERGED.config
    assert load_best_record(run) == COMPLETED


def test_best_alone_still_tells_the_configuration_and_the_last_epoch(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "winner.parquet"
    alone.parent.mkdir()
    (run / "best.parquet").rename(alone)
    assert load_best(alone) == COMPLETED.config
    last = make_epoch(2, loss_scale_steps=(), loss_scale_values=(), val_recalls=())  # lists are in epochs.parquet only
    assert load_best_record(alone) == dataclasses.replace(COMPLETED, epochs=(last,))


def test_epochs_are_sorted_by_trial_and_epoch(run: Path) -> None:
    table = pq.read_table(run / "epochs.parquet")
    assert table["trial_id"].to_pylist() == ["7422e802", "7422e802", "16076160"]
    assert table["epoch"].to_pylist() == [1, 2, 1]


def test_ranks_count_from_one_in_the_order_given(run: Path) -> None:
    table = pq.read_table(run / "best.parquet")
    assert table["rank"].to_pylist() == [1, 2]
    assert table["trial_id"].to_pylist() == ["7422e802", "16076160"]


def test_trials_show_their_last_epoch_and_null_where_there_is_none(run: Path) -> None:
    table = pq.read_table(run / "trials.parquet")
    assert table["epoch"].to_pylist() == [2, 1, None]
    assert table["steps"].to_pylist() == [200, 100, None]
    assert table["val_loss"].to_pylist() == [0.2, INF, None]
    assert table["train_loss"].null_count == 1  # the NaN of a diverged trial is a value, not a null


# ---- schema ----


def test_trials_start_with_these_columns_types_and_units() -> None:
    first = [(field.name, str(field.type), field.nullable, unit_of(field)) for field in list(SCHEMAS["trials"])[:28]]
    assert first == [
        ("trial_id", "string", False, None),
        ("status", "string", False, None),
        ("lr", "double", False, None),
        ("batch_size", "int64", False, "images"),
        ("precision", "string", False, None),
        ("init_scale", "double", True, None),
        ("growth_factor", "double", True, None),
        ("backoff_factor", "double", True, None),
        ("growth_interval", "int64", True, "steps"),
        ("model", "string", False, None),
        ("dataset", "string", False, None),
        ("imbalance", "double", False, None),
        ("optimizer", "string", False, None),
        ("weight_decay", "double", False, None),
        ("grad_clip", "double", True, None),
        ("input_scaling", "string", False, None),
        ("class_weighting", "string", False, None),
        ("curriculum", "string", False, None),
        ("max_epochs", "int64", False, "epochs"),
        ("seed", "int64", False, None),
        ("accumulate", "int64", False, "batches"),
        ("task", "string", True, None),
        ("train", "string", True, None),
        ("epoch", "int64", True, "epochs"),
        ("train_loss", "double", True, "nats"),
        ("val_loss", "double", True, "nats"),
        ("val_accuracy", "double", True, None),
        ("steps", "int64", True, "steps"),
    ]


def test_trials_end_with_the_columns_of_the_record() -> None:
    last = [(field.name, str(field.type), field.nullable, unit_of(field)) for field in list(SCHEMAS["trials"])[-15:]]
    assert last == [
        ("state", "string", True, None),
        ("underflow_share", "double", True, None),
        ("probe_seconds", "double", True, "s"),
        ("loop", "string", True, None),
        ("trial_name", "string", False, None),
        ("error", "string", True, None),
        ("config_fault", "bool", False, None),
        ("inert", "list<element: string not null>", False, None),
        ("started", "timestamp[us, tz=UTC]", True, None),
        ("wall_seconds", "double", False, "s"),
        ("setup_seconds", "double", False, "s"),
        ("checkpoint_seconds", "double", False, "s"),
        ("worker", "int64", True, None),
        ("device", "string", False, None),
        ("num_threads", "int64", False, None),
    ]


def test_best_is_a_rank_before_the_columns_of_trials_and_what_fresh_seeds_say_after_them() -> None:
    confirmation = [*field_types(Confirmation)]
    assert SCHEMAS["best"].names == ["rank", *SCHEMAS["trials"].names, *confirmation]
    assert {"confirm_seeds", "val_accuracy_mean", "test_accuracy_high", "tied_with_best", "optimism"} <= {*confirmation}
    assert all(SCHEMAS["best"].field(name).nullable for name in confirmation)
    assert SCHEMAS["best"].field("rank").type == pa.int64()


def test_confirmed_rows_come_back_as_they_were_with_the_default_beside_them(run: Path) -> None:
    confirmation = Confirmation(
        confirm_seeds=(1, 2),
        val_accuracy_mean=0.97,
        val_accuracy_low=0.96,
        val_accuracy_high=0.98,
        tied_with_best=True,
        optimism=0.001,
    )
    failed = Confirmation(confirm_seeds=(1, 2), confirm_failures=("seed 2: diverged",))
    default = make_trial("default", epochs=())
    rows = [
        BestRow(rank=1, trial=COMPLETED, confirmation=confirmation),
        BestRow(rank=2, trial=DIVERGED, confirmation=failed),
        BestRow(rank=None, trial=default, confirmation=confirmation),
    ]
    write_best(run, rows, PROVENANCE)
    assert repr(load_best_rows(run)) == repr(rows)  # a NaN is not equal to itself
    assert load_best(run, 2) == DIVERGED.config
    assert "must be one of 1..2" in message_of(lambda path: load_best(path, 3), run)


def test_a_metric_of_any_size_comes_back(run: Path) -> None:
    confirmation = Confirmation(confirm_seeds=(1, 2), optimism=3.7e23)
    write_best(run, [BestRow(rank=1, trial=COMPLETED, confirmation=confirmation)], PROVENANCE)
    assert load_best_rows(run)[0].confirmation == confirmation


def test_runs_on_fresh_seeds_come_back_as_they_were(run: Path) -> None:
    runs = [
        ConfirmedRun(trial_id="7422e802", seed=1, status=TrialStatus.COMPLETED, test_recalls=(0.9, 1.0), val_loss=0.1),
        ConfirmedRun(trial_id="default", seed=2, status=TrialStatus.DIVERGED, error="loss is nan"),
    ]
    write_confirmed(run, runs, PROVENANCE)
    assert load_confirmed(run) == runs
    assert load_provenance(run / "confirm.parquet") == PROVENANCE


def test_epochs_hold_the_trial_id_and_every_metric() -> None:
    assert SCHEMAS["epochs"].names == ["trial_id", *field_types(EpochMetrics)]
    assert not SCHEMAS["epochs"].field("train_loss").nullable
    assert SCHEMAS["epochs"].field("val_loss").nullable
    assert str(SCHEMAS["epochs"].field("loss_scale_steps").type) == "list<element: int64 not null>"
    assert str(SCHEMAS["epochs"].field("loss_scale_values").type) == "list<element: double not null>"
    assert "loss_scale_steps" not in SCHEMAS["trials"].names


@pytest.mark.parametrize("kind", ["trials", "epochs", "best"])
def test_files_have_the_types_descriptions_and_units_of_the_schema(run: Path, kind: str) -> None:
    written = pq.read_schema(run / f"{kind}.parquet")
    assert written.equals(SCHEMAS[kind], check_metadata=False)
    units = {field.name: unit_of(field) for field in written if unit_of(field)}
    assert all(field.metadata[b"description"] for field in written)
    sources = (TrialConfig, EpochMetrics, TrialRecord, Confirmation)
    described = [field for source in sources for field in dataclasses.fields(source)]
    declared = {field.name: field.metadata["unit"] for field in described if field.metadata.get("unit")}
    assert units == {name: unit for name, unit in declared.items() if name in written.names}
    for name, unit in {"_seconds": "s", "_steps": "steps", "_bytes": "B", "_loss": "nats"}.items():
        ending = {column for column in written.names if column.endswith(name)}
        assert {units.get(column) for column in ending} <= {unit}


def unit_of(field: pa.Field) -> str | None:
    unit = field.metadata.get(b"unit")
    return None if unit is None else unit.decode()


# ---- four readers ----


def test_pyarrow_reads_types_and_values(run: Path) -> None:
    table = pq.read_table(run / "trials.parquet")
    assert table["trial_id"].to_pylist() == ["7422e802", "16076160", "00000003"]
    assert table["lr"].to_pylist() == [0.003, 0.5, 0.003]
    assert table["started"].to_pylist() == [STARTED, STARTED, None]
    epochs = pq.read_table(run / "epochs.parquet")
    assert epochs["loss_scale_values"].to_pylist()[0] == [65536.0, 32768.0]


def test_pandas_reads_types_and_values(run: Path) -> None:
    frame = pd.read_parquet(run / "trials.parquet")
    assert frame["trial_id"].tolist() == ["7422e802", "16076160", "00000003"]
    assert frame["status"].tolist() == ["completed", "diverged", "failed"]
    assert (str(frame["lr"].dtype), str(frame["batch_size"].dtype)) == ("float64", "int64")
    assert str(frame["started"].dtype) == "datetime64[us, UTC]"
    assert frame["val_loss"].tolist()[:2] == [0.2, INF]
    epochs = pd.read_parquet(run / "epochs.parquet")
    assert epochs["loss_scale_steps"][0].tolist() == [1, 2]
    assert pd.read_parquet(run / "best.parquet")["rank"].tolist() == [1, 2]


def test_polars_reads_types_and_values(run: Path) -> None:
    frame = pl.read_parquet(run / "trials.parquet")
    assert frame["trial_id"].to_list() == ["7422e802", "16076160", "00000003"]
    types = [pl.String, pl.Float64, pl.Int64, pl.Int64, pl.Datetime("us", "UTC")]
    assert [frame.schema[name] for name in ("trial_id", "lr", "batch_size", "epoch", "started")] == types
    assert frame["started"].to_list() == [STARTED, STARTED, None]
    assert frame["val_loss"].to_list() == [0.2, INF, None]
    assert frame["train_loss"].is_nan().to_list() == [False, True, None]
    epochs = pl.read_parquet(run / "epochs.parquet")
    assert epochs.schema["loss_scale_steps"] == pl.List(pl.Int64)
    assert epochs["loss_scale_values"].to_list()[0] == [65536.0, 32768.0]
    assert pl.read_parquet(run / "best.parquet")["rank"].to_list() == [1, 2]


def test_duckdb_reads_types_and_values(run: Path) -> None:
    with duckdb.connect() as connection:
        columns = "trial_id, lr, batch_size, epoch, val_loss, epoch_us(started), isnan(train_loss), started"
        relation = connection.sql(f"select {columns} from '{run / 'trials.parquet'}'")
        assert [str(kind) for kind in relation.types] == [
            *("VARCHAR", "DOUBLE", "BIGINT", "BIGINT", "DOUBLE", "BIGINT", "BOOLEAN", "TIMESTAMP WITH TIME ZONE")
        ]
        started = round(STARTED.timestamp() * 1e6)
        assert relation.project("* exclude started").fetchall() == [  # fetching a time with zone needs pytz
            ("7422e802", 0.003, 64, 2, 0.2, started, False),
            ("16076160", 0.5, 64, 1, INF, started, True),
            ("00000003", 0.003, 64, None, None, None, None),
        ]
        epochs = connection.sql(f"select loss_scale_steps, loss_scale_values from '{run / 'epochs.parquet'}'")
        assert [str(kind) for kind in epochs.types] == ["BIGINT[]", "DOUBLE[]"]
        assert epochs.fetchall()[0] == ([1, 2], [65536.0, 32768.0])


# ---- faults ----


def change_file(path: Path, change: Callable[[pa.Table], pa.Table], **about: Any) -> None:
    """Rewrites a file as another version of tune_amp could have: ``change`` and ``about`` applied, checksums right."""
    old = pq.read_table(path)
    new = change(old)
    checksums = {name: parquet.checksum(new[i].to_pylist()) for i, name in enumerate(new.column_names)}
    metadata = json.loads(old.schema.metadata[b"tune_amp"]) | {"column_checksums": checksums} | about
    if "provenance" in about:
        metadata["provenance_checksum"] = parquet.checksum(about["provenance"])
    pq.write_table(new.replace_schema_metadata({"tune_amp": json.dumps(metadata)}), path)


def change_column(name: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    """Replaces a column's first values, keeping its type; nulls allowed."""

    def change(table: pa.Table) -> pa.Table:
        index, field = table.column_names.index(name), table.schema.field(name)
        column = pa.array(values + table[name].to_pylist()[len(values) :], field.type)
        return table.set_column(index, field.with_nullable(True), column)

    return change


def message_of(read: Callable[[Any], Any], path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


UNREADABLE = "must be a readable, undamaged Parquet file of tune_amp ("


@pytest.mark.parametrize("read", [load_best, load_best_record, load_trials, load_provenance])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "no.parquet"
    assert message_of(read, path) == f"{path}: must be a Parquet file or the folder of a run, but does not exist"


NO_BEST = ", which a search writes at its end if a trial produced a result"


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (load_best, f"best.parquet{NO_BEST}"),
        (load_best_record, f"best.parquet{NO_BEST}"),
        (load_trials, "trials.parquet"),
        (load_provenance, "trials.parquet or best.parquet or epochs.parquet"),
    ],
)
def test_a_folder_without_the_file_is_named(tmp_path: Path, read: Callable[[Path], Any], names: str) -> None:
    assert message_of(read, tmp_path) == f"{tmp_path}: must hold {names}"


def test_trials_without_their_epochs_are_refused(run: Path) -> None:
    (run / "epochs.parquet").unlink()
    assert message_of(load_trials, run / "trials.parquet") == f"{run}: must hold epochs.parquet"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"lr,batch_size\n0.1,64\n", b"PAR1" * 100])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.parquet"
    path.write_bytes(content)
    for read in (load_best, load_provenance):
        assert message_of(read, path).startswith(f"{path}: {UNREADABLE}")


def test_an_unreadable_file_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    path = run / "best.parquet"
    assert message_of(load_best, path) == f"{path}: {UNREADABLE}[Errno 13] Permission denied)"


def test_a_parquet_file_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.parquet"
    pq.write_table(pa.table({"lr": [0.1]}), path)
    for read in (load_best, load_provenance):
        rule = "must be written by tune_amp, but has no 'tune_amp' metadata"
        assert message_of(read, path) == f"{path}: {rule}"


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", "[" * 100_000, '{"schema_version": 2, "kind": "best"}'])
def test_metadata_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "best.parquet"
    pq.write_table(pa.Table.from_pylist([], schema=SCHEMAS["best"]).replace_schema_metadata({"tune_amp": text}), path)
    for read in (load_best, load_provenance):
        assert message_of(read, path).startswith(f"{path}: {UNREADABLE}")


def test_another_kind_than_expected_is_refused(run: Path) -> None:
    path = run / "trials.parquet"
    assert message_of(load_best, path) == f"{path}: kind: must be best, got 'trials'"
    path = run / "best.parquet"
    assert message_of(load_trials, path) == f"{path}: kind: must be trials, got 'best'"


@pytest.mark.parametrize("version", [1, 7, "3", None])
def test_another_schema_version_is_named(run: Path, version: object) -> None:
    path = run / "best.parquet"
    change_file(path, lambda table: table.drop_columns(["lr"]), schema_version=version)
    for read in (load_best, load_provenance):
        message = f"{path}: was written by schema version {version!r}; this tune_amp reads 2 to 6"
        assert message_of(read, path) == message


def test_columns_that_an_older_file_lacks_are_null_or_their_default(run: Path) -> None:
    """``setup_seconds`` and ``confirm_failures`` have defaults, ``worker`` and ``val_loss_mean`` can be null."""
    path = run / "best.parquet"
    lacking = [
        "setup_seconds",
        "config_fault",
        "worker",
        "grad_clip",
        "weight_decay",
        *(c.name for c in build_columns(Confirmation)),
    ]
    change_file(path, lambda table: table.drop_columns(lacking), schema_version=2)
    filled = [{name: row[name] for name in lacking} for row in read_file(path, "best", SCHEMAS["best"]).rows]
    defaults = {"setup_seconds": 0.0, "config_fault": False, "weight_decay": 0.0, "confirm_failures": []}
    assert filled == [dict.fromkeys(lacking) | defaults] * 2
    assert [(row.trial.worker, row.confirmation) for row in load_best_rows(path)] == [(None, None)] * 2
    assert load_best(path).weight_decay == 0.0


def test_slot_time_is_read_from_the_ledger_of_an_older_file(run: Path) -> None:
    ledger = {"slots": 2, "wall_seconds": 9.5, "seconds": {"training": 12.0, "idle": 7.0}, "step_seconds": 14.0}
    about = {"ledger": ledger, "ledger_checksum": parquet.checksum(ledger)}
    change_file(run / "trials.parquet", lambda table: table, **about)
    assert load_trials_file(run).slot_time == SlotTime(slots=2, wall_seconds=9.5)
    assert len(load_trials(run)) == len(TRIALS)


@pytest.mark.parametrize(
    ("slots", "wall_seconds", "message"),
    [
        (0, 1.0, "slots: must be at least 1, got 0"),
        (1.5, 1.0, "slots: must be a whole number, got 1.5"),
        (1, -1.0, r"wall_seconds: must be between 0 and 1e\+12, got -1.0"),
        (1, float("nan"), "wall_seconds: must be a finite number, got nan"),
    ],
)
def test_slot_time_that_cannot_be_is_refused(slots: Any, wall_seconds: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SlotTime(slots=slots, wall_seconds=wall_seconds)


def test_a_column_that_an_older_file_lacks_and_that_has_no_default_is_named(run: Path) -> None:
    path = run / "trials.parquet"
    change_file(path, lambda table: table.drop_columns(["wall_seconds"]), schema_version=2)
    assert message_of(load_trials, path) == f"{path}: wall_seconds: must be a column, once, got it 0 times"


def test_a_column_that_was_lost_from_an_older_file_is_not_made_up(run: Path) -> None:
    """Its learning rate would be read as the default: the file says, by a checksum, that it had one."""
    path = run / "best.parquet"
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"tune_amp"]) | {"schema_version": 2}
    pq.write_table(table.drop_columns(["lr"]).replace_schema_metadata({"tune_amp": json.dumps(about)}), path)
    assert message_of(load_best, path) == f"{path}: lr: must be a column, once, got it 0 times"


def test_a_missing_column_is_named(run: Path) -> None:
    path = run / "best.parquet"
    change_file(path, lambda table: table.drop_columns(["growth_interval"]))
    assert message_of(load_best, path) == f"{path}: growth_interval: must be a column, once, got it 0 times"


def test_a_column_that_is_there_twice_is_named(run: Path) -> None:
    path = run / "best.parquet"
    change_file(path, lambda table: table.append_column(table.schema.field("lr"), table["lr"]))
    assert message_of(load_best, path) == f"{path}: lr: must be a column, once, got it 2 times"


@pytest.mark.parametrize(
    ("name", "kind", "shown"),
    [
        ("lr", pa.float32(), "double, got 'float'"),
        ("batch_size", pa.float64(), "int64, got 'double'"),
        ("trial_id", pa.dictionary(pa.int32(), pa.string()), "string, got 'dictionary<v...2, ordered=0>'"),
        ("started", pa.timestamp("us"), "timestamp[us, tz=UTC], got 'timestamp[us]'"),
    ],
)
def test_a_column_of_another_type_is_named(run: Path, name: str, kind: pa.DataType, shown: str) -> None:
    path = run / "best.parquet"

    def cast(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, table[name].cast(kind))

    change_file(path, cast)
    assert message_of(load_best, path) == f"{path}: {name}: must be a column of type {shown}"


def test_columns_of_a_later_version_are_ignored(run: Path) -> None:
    def extend(table: pa.Table) -> pa.Table:
        return table.append_column("a_list", [[[1, 2], [3]]]).append_column("a_number", [[0.1, None]])

    change_file(run / "best.parquet", extend)
    assert load_best(run, 2) == DIVERGED.config
    assert load_best_record(run) == COMPLETED


def test_columns_may_stand_in_another_order(run: Path) -> None:
    change_file(run / "best.parquet", lambda table: table.select(table.column_names[::-1]))
    assert load_best_record(run) == COMPLETED


@pytest.mark.parametrize("rank", [0, 3, -1])
def test_a_rank_that_is_not_there_is_named(run: Path, rank: int) -> None:
    path = run / "best.parquet"
    for load in (load_best, load_best_record):
        with pytest.raises(InputError) as caught:
            load(run, rank)
        assert str(caught.value) == f"{path}: rank: must be one of 1..2, got {rank}"


def test_a_row_without_rank_is_never_the_best(run: Path) -> None:
    change_file(run / "best.parquet", change_column("rank", [None, 1]))
    assert load_best(run) == DIVERGED.config
    with pytest.raises(InputError, match=r"rank: must be one of 1\.\.1, got 2$"):
        load_best(run, 2)


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("batch_size", 0, "batch_size: must be at least 1, got 0"),
        ("lr", NAN, "lr: must be a finite number, got nan"),
        ("lr", None, "lr: must be there, got null"),
        ("growth_interval", 0, "growth_interval: must be at least 1, got 0"),
        ("model", "os.system('rm')", "model: must be one of simple_net, conv_net, vit, or module:function, "),
    ],
)
def test_a_row_that_trial_config_refuses_is_named(run: Path, column: str, value: Any, rule: str) -> None:
    reads: dict[str, Callable[[Path], Any]] = {"best.parquet": load_best, "trials.parquet": load_trials}
    for name, read in reads.items():
        change_file(run / name, change_column(column, [value]))
        assert message_of(read, run / name).startswith(f"{run / name}: trial '7422e802': {rule}")
    assert load_best(run, 2) == DIVERGED.config  # whose row is in order


def test_an_unknown_status_is_named(run: Path) -> None:
    path = run / "trials.parquet"
    change_file(path, change_column("status", ["won"]))
    known = "completed, stopped, diverged, out_of_memory, failed, interrupted"
    assert message_of(load_trials, run) == f"{path}: trial '7422e802': status: must be one of {known}, got 'won'"


@pytest.mark.parametrize(("name", "column"), [("trials", "device"), ("trials", "status"), ("epochs", "train_loss")])
def test_a_null_where_none_can_be_is_named(run: Path, name: str, column: str) -> None:
    path = run / f"{name}.parquet"
    change_file(path, change_column(column, [None]))
    assert message_of(load_trials, run) == f"{path}: trial '7422e802': {column}: must be there, got null"


def test_a_trial_without_id_is_refused(run: Path) -> None:
    change_file(run / "trials.parquet", change_column("trial_id", ["7422e802", "16076160", None]))
    path = run / "trials.parquet"
    assert message_of(load_trials, run) == f"{path}: trial None: trial_id: must be there, got null"


def test_a_null_metric_of_a_reported_epoch_is_named_where_best_stands_alone(run: Path) -> None:
    (run / "epochs.parquet").unlink()
    change_file(run / "best.parquet", change_column("steps", [None]))
    path = run / "best.parquet"
    assert message_of(load_best_record, run) == f"{path}: trial '7422e802': steps: must be there, got null"


def test_epochs_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    write_trials(run, [make_trial("ffffffff")], PROVENANCE)
    rule = "epochs.parquet must hold epoch 2 of this trial: the files are of different runs"
    assert message_of(load_best_record, run) == f"{run / 'best.parquet'}: trial '7422e802': epoch: {rule}"


def test_epochs_that_end_too_early_are_refused(run: Path) -> None:
    change_file(run / "epochs.parquet", lambda table: table.slice(0, 1))
    assert "must hold epoch 2 of this trial" in message_of(load_trials, run)


def test_epochs_one_write_ahead_of_the_trials_are_left_out(run: Path, tmp_path: Path) -> None:
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    write_trials(ahead, [make_trial(epochs=(make_epoch(1), make_epoch(2), make_epoch(3))), *TRIALS[1:]], PROVENANCE)
    (ahead / "epochs.parquet").replace(run / "epochs.parquet")
    assert repr(load_trials(run)) == repr(list(TRIALS))


def test_a_trial_that_is_there_twice_is_refused(run: Path) -> None:
    path = run / "trials.parquet"
    change_file(path, lambda table: pa.concat_tables([table, table]))
    assert message_of(load_trials, run) == f"{path}: trial_id: must be unique"


def test_epochs_that_do_not_increase_are_refused(run: Path) -> None:
    change_file(run / "epochs.parquet", change_column("epoch", [2, 2]))
    rule = "epochs: must increase, got 2 after 2"
    assert message_of(load_trials, run) == f"{run / 'trials.parquet'}: trial '7422e802': {rule}"


def test_a_time_beyond_the_calendar_is_refused(run: Path) -> None:
    path = run / "best.parquet"

    def overflow(table: pa.Table) -> pa.Table:
        times = pa.array([2**62, 0]).cast(pa.timestamp("us", tz="UTC"))
        return table.set_column(table.column_names.index("started"), "started", times)

    pq.write_table(overflow(pq.read_table(path)), path)
    assert message_of(load_best, path).startswith(f"{path}: {UNREADABLE}")


def test_too_many_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.parquet"
    pq.write_table(pa.table({f"c{i}": [0] for i in range(1001)}), path)
    assert message_of(load_best, path) == f"{path}: must have at most 1,000 columns, got 1,001"


def test_too_many_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.parquet"
    pq.write_table(pa.table({"lr": pa.nulls(10_000_001, pa.bool_())}), path)
    assert message_of(load_best, path) == f"{path}: must have at most 10,000,000 rows, got 10,000,001"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "7", "seed: must be a whole number, got '7'"),
        ("run", None, "run: must be there, got null"),
        ("command", "search.py", "command: must hold texts, got 'search.py'"),
        ("command", [1], "command: must hold texts, got (1,)"),
        ("versions", ["torch"], "versions: must hold texts, got ('torch',)"),
        ("versions", {"torch": 2}, "versions: must hold texts, got {'torch': 2}"),
    ],
)
def test_provenance_of_other_types_is_refused(run: Path, name: str, value: Any, message: str) -> None:
    path = run / "best.parquet"
    change_file(path, lambda table: table, provenance=dataclasses.asdict(PROVENANCE) | {name: value})
    assert message_of(load_provenance, path) == f"{path}: {message}"


def test_provenance_of_a_later_version_may_hold_more_but_not_less(run: Path) -> None:
    path, written = run / "best.parquet", dataclasses.asdict(PROVENANCE)
    change_file(path, lambda table: table, provenance=written | {"tuned_by": "x"})
    assert load_provenance(path) == PROVENANCE
    del written["data_hash"]
    change_file(path, lambda table: table, provenance=written)
    assert message_of(load_provenance, path) == f"{path}: data_hash: must be there, got null"


# ---- damage ----


def damaged(content: bytes, step: int) -> Iterator[bytes]:
    for i, flip in zip(range(0, len(content), step), itertools.cycle((0xFF, 0x01))):
        yield content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :]


def test_a_flipped_byte_is_noticed_or_changes_nothing(run: Path) -> None:
    path, messages, unchanged = run / "best.parquet", [], 0
    for content in damaged(path.read_bytes(), step=61):
        path.write_bytes(content)
        try:
            read = (load_best(path), load_best_record(path, 2), load_provenance(path))
        except InputError as error:
            messages.append(str(error))
        else:
            unchanged += 1
            assert repr(read) == repr((COMPLETED.config, DIVERGED, PROVENANCE))
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)
    assert any("CRC" in message for message in messages)  # page checksums are written, and verified
    assert len(messages) > unchanged  # what may flip: the copy of the descriptions that only pyarrow reads


def test_a_truncated_file_is_refused(run: Path) -> None:
    path = run / "best.parquet"
    content = path.read_bytes()
    for length in [*range(0, len(content), 1009), len(content) - 1]:
        path.write_bytes(content[:length])
        assert message_of(load_best, path).startswith(f"{path}: {UNREADABLE}")


def test_a_value_changed_behind_our_back_is_noticed(run: Path) -> None:
    path = run / "best.parquet"
    changed = change_column("val_accuracy", [0.99])(pq.read_table(path))
    pq.write_table(changed, path)
    rule = "val_accuracy: must match its checksum: the file is damaged or was edited"
    assert message_of(load_best, path) == f"{path}: {rule}"


def test_provenance_changed_behind_our_back_is_noticed(run: Path) -> None:
    path = run / "best.parquet"
    content = path.read_bytes()
    assert content.count(b'"seed": 7') == 1
    path.write_bytes(content.replace(b'"seed": 7', b'"seed": 8'))
    rule = "provenance: must match its checksum: the file is damaged or was edited"
    assert message_of(load_provenance, path) == f"{path}: {rule}"


# ---- writing is whole or not at all ----


def fail(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "pyarrow.parquet.write_table"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(
    run: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(step, fail)
        with pytest.raises(OSError, match="No space left"):
            write_best(run, rank_trials([DIVERGED]), PROVENANCE)
        with pytest.raises(OSError, match="No space left"):
            write_trials(run, [DIVERGED], PROVENANCE)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str | int] = []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        sync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    path = tmp_path / "x.parquet"
    write_parquet(pa.table({"a": [1]}), path)
    assert steps == [path.stat().st_size, "replace", "folder"]


def test_a_file_is_readable_by_whom_the_umask_allows_and_compressed(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    (tmp_path / "any").touch()
    write_parquet(pa.table({"a": [1]}), path)
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


def test_epochs_are_written_before_the_trials_that_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("tune_amp.results.records.write_parquet", lambda table, path: written.append(path.name))
    write_trials(tmp_path, TRIALS, PROVENANCE)
    assert written == ["epochs.parquet", "trials.parquet"]


def test_a_negative_number_of_threads_is_refused() -> None:
    """It would be passed to ``torch.set_num_threads``."""
    with pytest.raises(InputError, match=r"^num_threads: must be at least 0, got -1$"):
        dataclasses.replace(COMPLETED, num_threads=-1)


def test_only_we_can_write_no_best_or_one_trial_twice(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_best(tmp_path, rank_trials([]), PROVENANCE)
    with pytest.raises(AssertionError):
        write_trials(tmp_path, [COMPLETED, COMPLETED], PROVENANCE)
    assert list(tmp_path.iterdir()) == []


# ---- records ----


def test_the_last_epoch_is_the_newest_and_none_without_a_report() -> None:
    assert COMPLETED.last == make_epoch(2)
    assert FAILED.last is None


@pytest.mark.parametrize("epochs", [(2, 1), (1, 1)])
def test_a_record_whose_epochs_do_not_increase_is_refused(epochs: tuple[int, int]) -> None:
    with pytest.raises(InputError) as caught:
        make_trial(epochs=tuple(make_epoch(epoch) for epoch in epochs))
    assert str(caught.value) == f"epochs: must increase, got {epochs[1]} after {epochs[0]}"


def test_an_error_becomes_one_line_that_arrow_can_encode(tmp_path: Path) -> None:
    trial = make_trial(error="boom\n  at line 1: caf\udce9")
    assert trial.error == "boom at line 1: caf?"
    write_trials(tmp_path, [trial], PROVENANCE)
    assert load_trials(tmp_path) == [trial]


def test_a_start_is_kept_in_utc_and_needs_a_zone() -> None:
    trial = make_trial(started=STARTED.astimezone(EAST))
    assert trial.started == STARTED
    assert trial.started.tzinfo is datetime.UTC
    with pytest.raises(InputError) as caught:
        make_trial(started=datetime.datetime(2026, 1, 2))  # noqa: DTZ001 (the fault)
    assert str(caught.value) == "started: must carry a time zone, got 2026-01-02T00:00:00"


# ---- imports ----


def test_reading_needs_no_torch_ray_optuna_or_pandas() -> None:
    code = "import sys, tune_amp.results.records; print({'torch', 'ray', 'optuna', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
