import dataclasses
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs  # type: ignore[import-untyped]

from tune_amp.cluster.checkpoints import OWNER_FILE, Part, RunStorage, prepare_storage
from tune_amp.trial.config import InputError

RUN = Path("results/run")


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RUN.mkdir(parents=True)


def test_checkpoints_go_into_the_run_folder_where_nothing_is_said(tmp_path: Path) -> None:
    storage = prepare_storage(None, RUN)
    assert (storage.path, storage.name) == (str(tmp_path / RUN), "ray")


def test_several_nodes_need_a_place_that_all_can_write(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare_storage(None, RUN, nodes=3)
    assert str(caught.value) == "--storage-path: must name a place that all 3 nodes of the cluster can write"
    assert prepare_storage(str(tmp_path), RUN, nodes=3).path == str(tmp_path)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_place_is_made_and_named_after_the_run(tmp_path: Path, prefix: str) -> None:
    place = tmp_path / "not" / "there"
    storage = prepare_storage(f"{prefix}{place}", RUN)
    assert place.is_dir()
    assert (storage.name, storage.folder) == ("run", f"{place}/run")


def test_a_run_of_the_same_name_is_never_mixed_with(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError) as caught:
        prepare_storage(str(tmp_path), RUN)
    assert str(caught.value) == f"--storage-path: {tmp_path} already holds a run run; choose another --name"


@pytest.mark.parametrize("place", ["/proc/nope", "/proc", "foo://bar", "file", "\0", "s3://bucket/a?nonsense=1"])
def test_a_place_that_cannot_be_written_is_one_line(
    place: str,
) -> None:
    Path("file").touch()
    with pytest.raises(InputError) as caught:
        prepare_storage(place, RUN)
    assert str(caught.value).startswith(f"--storage-path: {place} cannot be written (")
    assert "\n" not in str(caught.value)


def begin(place: Path | str | None, folder: Path, earlier: Sequence[Part] | None = None) -> RunStorage:
    """The storage of a part of a search in ``folder``, claimed, with a checkpoint of two trials."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = prepare_storage(None if place is None else str(place), folder, earlier=earlier)
    storage.claim()
    for trial in ("01-fp16-lr0.1", "02-fp32-lr0.1"):
        (Path(storage.folder) / trial / "checkpoint_000003").mkdir(parents=True)
        (Path(storage.folder) / trial / "checkpoint_000003" / "trial.pt").touch()
    return storage


def part(storage: RunStorage) -> Part:
    """As the journal of its run holds it."""
    return storage.place, storage.name, storage.token


def list_checkpoints(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("checkpoint_*"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_part_of_a_search_has_a_place_and_the_last_one_tidies_all(tmp_path: Path, elsewhere: bool) -> None:
    folder = tmp_path / "run"
    place, name = (tmp_path / "place", "run") if elsewhere else (None, "ray")
    places = [begin(place, folder)]
    for _ in range(2):
        places.append(begin(place, folder, [part(storage) for storage in places]))
    assert [storage.name for storage in places] == [name, f"{name}-2", f"{name}-3"]
    trials = [path.parent for storage in places for path in Path(storage.folder).rglob("checkpoint_*")]
    assert places[-1].list_foreign() == []
    kept = trials[0] / "events.out"
    kept.touch()
    places[-1].remove_checkpoints()
    assert list_checkpoints(tmp_path) == []
    assert len(trials) == 6
    assert [trial for trial in trials if trial.exists()] == [kept.parent]  # no empty folder is left


@pytest.mark.parametrize("elsewhere", [False, True])
def test_checkpoints_of_one_trial_are_removed_as_it_ends_from_all_parts(tmp_path: Path, elsewhere: bool) -> None:
    place = tmp_path / "place" if elsewhere else None
    first = begin(place, tmp_path / "run")
    second = begin(place, tmp_path / "run", [part(first)])
    second.remove_checkpoints("01-fp16-lr0.1")
    assert {Path(path).parts[-2] for path in list_checkpoints(tmp_path)} == {"02-fp32-lr0.1"}
    assert len(list_checkpoints(tmp_path)) == 2
    for name in ("..", ".", "", "../run/02-fp32-lr0.1", "02-fp32-lr0.1/", "/", "checkpoint_000003"):
        second.remove_checkpoints(name)
    assert len(list_checkpoints(tmp_path)) == 2


def test_copy_of_a_run_neither_loses_nor_removes_the_checkpoints_of_the_original(tmp_path: Path) -> None:
    """Each reads them, and each removes what it has written itself."""
    place, night = tmp_path / "place", tmp_path / "night"
    begun = begin(place, night)
    for command in (["cp", "-a"], ["cp", "-r"]):
        shutil.rmtree(tmp_path / "night2", ignore_errors=True)
        subprocess.run([*command, night, tmp_path / "night2"], check=True)
        copied = begin(place, tmp_path / "night2", [part(begun)])
        assert copied.list_foreign() == [f"{place}/night"]
        copied.remove_checkpoints()
        assert {Path(path).parts[0] for path in list_checkpoints(place)} == {"night"}
        shutil.rmtree(copied.folder)
    other = begin(place, tmp_path / "night2", [part(begun)])
    original = begin(place, night, [part(begun)])
    original.remove_checkpoints()
    assert {Path(path).parts[0] for path in list_checkpoints(place)} == {other.name}


def test_copy_in_the_place_of_the_original_removes_none_of_its_checkpoints(tmp_path: Path) -> None:
    place, night = tmp_path / "place", tmp_path / "night"
    begun = begin(place, night)
    night.rename(tmp_path / "kept")
    subprocess.run(["cp", "-a", tmp_path / "kept", night], check=True)
    copied = begin(place, night, [part(begun)])
    copied.remove_checkpoints()
    assert {Path(path).parts[0] for path in list_checkpoints(place)} == {"night"}


def test_run_that_was_moved_reads_its_checkpoints_and_leaves_those_that_lie_elsewhere(tmp_path: Path) -> None:
    outside, inside = begin(tmp_path / "place", tmp_path / "night"), begin(None, tmp_path / "night")
    (tmp_path / "night").rename(tmp_path / "moved")
    again = begin(tmp_path / "place", tmp_path / "moved", [part(outside)])
    assert again.list_foreign() == [outside.folder]
    again.remove_checkpoints()
    assert {Path(path).parts[0] for path in list_checkpoints(tmp_path / "place")} == {"night"}
    within = begin(None, tmp_path / "moved", [part(inside)])
    assert within.list_foreign() == []
    within.remove_checkpoints()
    assert list_checkpoints(tmp_path / "moved") == []


@pytest.mark.parametrize("token", [None, "", "0" * 32])
def test_journal_that_names_the_folder_of_another_run_removes_nothing_of_it(tmp_path: Path, token: str | None) -> None:
    """It knows the name, and perhaps where that run lies, but not its secret; older versions wrote none."""
    theirs = begin(tmp_path / "place", tmp_path / "run")
    ours = begin(tmp_path / "place", tmp_path / "run", [(theirs.place, theirs.name, token)])
    ours.remove_checkpoints()
    assert {Path(path).parts[0] for path in list_checkpoints(tmp_path / "place")} == {"run"}


@pytest.mark.parametrize("proof", ["absent", "empty", "longer", "folder", "pipe", "link"])
def test_folder_without_the_whole_proof_is_left_alone(tmp_path: Path, proof: str) -> None:
    storage = begin(tmp_path / "place", tmp_path / "run")
    path = Path(storage.folder) / OWNER_FILE
    content = path.read_text()
    path.unlink()
    if proof == "empty":
        path.touch()
    elif proof == "longer":
        path.write_text(f"{content}\n")
    elif proof == "folder":
        path.mkdir()
    elif proof == "pipe":  # which nobody writes
        os.mkfifo(path)
    elif proof == "link":
        path.symlink_to("nowhere")
    storage.remove_checkpoints()
    assert len(list_checkpoints(tmp_path)) == 2


def test_place_of_another_run_is_passed_over_and_left_alone(tmp_path: Path) -> None:
    """One that the search itself made before it told of it is taken for another's too."""
    first = begin(tmp_path, RUN)
    for name in ("run-2", "run-3"):
        (tmp_path / name / "01-fp32" / "checkpoint_000000").mkdir(parents=True)
    known = [part(first), ("/somewhere/else", "run-2", first.token), (None, "run-3", first.token)]
    storage = prepare_storage(str(tmp_path), RUN, earlier=known)
    assert (storage.name, storage.earlier) == ("run-4", (("run", first.token),))
    storage.remove_checkpoints()
    assert {Path(path).parts[0] for path in list_checkpoints(tmp_path)} == {"run-2", "run-3"}


def test_search_that_was_cut_off_before_it_told_of_its_place_goes_on_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert prepare_storage(str(tmp_path), RUN, earlier=[]).name == "run-2"
    with pytest.raises(InputError, match="already holds a run run"):
        prepare_storage(str(tmp_path), RUN)


def test_results_folder_whose_name_no_encoding_knows_proves_as_any_other(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "run"
    begin(tmp_path / "place", folder).remove_checkpoints()
    assert list_checkpoints(tmp_path / "place") == []


def test_two_searches_of_one_name_that_begin_at_once_are_never_mixed(tmp_path: Path) -> None:
    runs = [tmp_path / name / "run" for name in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
    first, second = (prepare_storage(str(tmp_path / "place"), run) for run in runs)
    first.claim()
    with pytest.raises(InputError, match="place/run was made by another search meanwhile"):
        second.claim()


def test_only_checkpoints_are_removed_and_none_is_no_fault(tmp_path: Path) -> None:
    storage = prepare_storage(str(tmp_path), RUN)
    storage.remove_checkpoints()
    storage.claim()
    storage.remove_checkpoints()
    removed = ("01-fp16/checkpoint_000003/trial.pt", "02-fp16/checkpoint_000001/trial.pt")
    kept = {"01-fp16/params.json", "gpt/checkpoint_000001/a.bin", "checkpoint_1/a.bin", "01-fp16/checkpoint_best/a.bin"}
    for name in (*removed, *kept):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    storage.remove_checkpoints()
    assert {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*")} == {OWNER_FILE, *kept}


def test_checkpoints_of_another_run_to_which_a_link_leads_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other" / "ray" / "01-fp16-lr0.1" / "checkpoint_000003"
    other.mkdir(parents=True)
    storage = begin(None, tmp_path / "run")
    ours = Path(storage.folder)
    (ours / "03-fp16-lr0.1").symlink_to(other.parent)
    (ours / "x").symlink_to(tmp_path / "other" / "ray")
    (ours / "02-fp32-lr0.1" / "checkpoint_000001").symlink_to(other)
    storage.remove_checkpoints("03-fp16-lr0.1")
    storage.remove_checkpoints()
    assert other.exists()
    assert not (ours / "01-fp16-lr0.1" / "checkpoint_000003").exists()


# An object store


@pytest.fixture(scope="module")
def object_store() -> Iterator[Any]:
    """A server that speaks S3, with one bucket; its address for ``endpoint_override``."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    fs.S3FileSystem(
        access_key="any",
        secret_key="any",
        endpoint_override=address,
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    ).create_dir("bucket")
    yield address
    server.stop()


def object_url(address: str, place: str, *, user: str = "") -> str:
    return f"s3://{user}{place}?scheme=http&endpoint_override={address}&region=us-east-1"


def test_object_store_holds_checkpoints_until_they_are_removed(object_store: str, tmp_path: Path) -> None:
    storage = prepare_storage(object_url(object_store, "bucket/searches", user="any:any@"), RUN)
    assert (storage.path, storage.name, storage.folder) == ("bucket/searches", "run", "bucket/searches/run")
    storage.claim()
    remote = pickle.loads(pickle.dumps(storage.filesystem))  # as a worker gets it
    owner, kept, other, removed = (
        f"{storage.folder}/{name}"
        for name in (
            OWNER_FILE,
            "01-fp16/params.json",
            "02-fp16/checkpoint_000001/trial.pt",
            "01-fp16/checkpoint_000002/trial.pt",
        )
    )
    for path in (kept, other, removed):
        remote.create_dir(path.rpartition("/")[0], recursive=True)
        with remote.open_output_stream(path) as file:
            file.write(b"state")

    def list_files() -> set[str]:
        found = storage.filesystem.get_file_info(fs.FileSelector("bucket/searches", recursive=True))
        return {entry.path for entry in found if entry.type is fs.FileType.File}

    dataclasses.replace(storage, owner="a copy of the run").remove_checkpoints()
    assert list_files() == {owner, kept, removed, other}
    storage.remove_checkpoints("01-fp16")
    assert list_files() == {owner, kept, other}
    storage.remove_checkpoints()
    assert list_files() == {owner, kept}
    with pytest.raises(InputError, match=r"--storage-path: s3://\*\*\*@bucket/searches\?.* already holds a run run"):
        prepare_storage(object_url(object_store, "bucket/searches", user="any:any@"), RUN)


def test_credentials_come_from_the_environment_where_the_url_has_none(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    storage = prepare_storage(object_url(object_store, "bucket/environment"), RUN)
    assert b"very-secret" not in pickle.dumps(storage.filesystem)  # nor do Ray's files hold it


def test_bucket_that_is_missing_is_one_line_without_the_secret(object_store: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare_storage(object_url(object_store, "no-such-bucket/a", user="name:very-secret@"), RUN)
    shown = object_url(object_store, "no-such-bucket/a", user="***@")
    assert str(caught.value).startswith(f"--storage-path: {shown} cannot be written (OSError: Bucket 'no-such-bucket'")
    assert "\n" not in str(caught.value)
