"""Storage for Ray's checkpoints of a run: the run folder, or a place that all nodes of a cluster can write."""

import contextlib
import dataclasses
import hashlib
import itertools
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import ray
from pyarrow import fs  # type: ignore[import-untyped]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_amp.cluster.resources import TrialResources, count_slots
from tune_amp.trial.config import PRECISIONS, InputError
from tune_amp.trial.text import describe_error, hide_credentials

RAY_FOLDER = "ray"
OWNER_FILE = ".tune_amp_owner"
"""File in the folder of Ray's experiment. It proves to one run folder only that this run folder made the experiment."""
Part = tuple[str | None, str, str | None]
"""``RunStorage.place``, ``name`` and ``token`` of one part of a search: from its start or resumption to its end."""

# Only folders with the name of a trial's checkpoint, as tuning.name_trial and Ray form it, are ever deleted.
_TRIAL = re.compile(rf"\d+-(?:{'|'.join(PRECISIONS)})[^/]*")
_CHECKPOINT = re.compile(rf"{_TRIAL.pattern}/checkpoint_\d+")

# Time for a node to start a worker and answer. A node that is busy or was lost is skipped after that.
NODE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStorage:
    """The folder of Ray's experiment."""

    path: str
    """Parent folder, as a path in ``filesystem``."""
    name: str
    """Name of the folder below ``path``."""
    filesystem: fs.FileSystem
    """File system on which a test write succeeded. Ray receives the same object."""
    place: str | None = None
    """``path`` as the user requested it, without secrets; None for the run folder, wherever it lies."""
    owner: str = ""
    """Identity of the run folder, from ``identify_folder``; empty if the experiment lies in the run folder."""
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    """Random secret that the run's journal records."""
    earlier: tuple[tuple[str, str | None], ...] = ()
    """Names and tokens of the folders that earlier parts of the search had below ``path``."""

    @property
    def folder(self) -> str:
        """Path of the folder in ``filesystem``."""
        return f"{self.path}/{self.name}"

    @property
    def is_taken(self) -> bool:
        """Whether the folder already exists."""
        found = self.filesystem.get_file_info(self.folder).type
        return bool(found is not fs.FileType.NotFound)

    def claim(self) -> None:
        """Create the folder, and write the proof that it belongs to this run.

        Raises:
            InputError: another search has created it in the meantime.
            OSError: it cannot be created.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            try:
                Path(self.folder).mkdir(parents=True)
            except FileExistsError:
                raise InputError(f"--storage-path: {self.folder} was made by another search meanwhile") from None
        else:
            self.filesystem.create_dir(self.folder, recursive=True)
        with self.filesystem.open_output_stream(f"{self.folder}/{OWNER_FILE}") as file:
            file.write(self._build_proof(self.token))

    def remove_checkpoints(self, trial: str | None = None) -> None:
        """Delete checkpoints: only trials whose worker died need them, and they add up to gigabytes.

        Nothing is deleted from a folder without the proof that this run folder made it, because a journal may come from
        any source, and a copy of a run names the folders of the original. Files that cannot be deleted stay.

        Args:
            trial: name of the trial whose checkpoints are deleted; None for all trials.
        """
        if trial is not None and not _TRIAL.fullmatch(trial):
            return
        for name, token in (*self.earlier, (self.name, self.token)):
            with contextlib.suppress(OSError):
                if self._is_own(name, token):
                    self._remove_below(f"{self.path}/{name}", trial)

    def list_foreign(self) -> list[str]:
        """Return the existing folders of earlier parts that lack the proof that this run folder made them."""
        return [
            f"{self.path}/{name}"
            for name, token in self.earlier
            if dataclasses.replace(self, name=name).is_taken and not self._is_own(name, token)
        ]

    def _build_proof(self, token: str) -> bytes:
        return hashlib.sha256(f"{token} {self.owner}".encode(errors="surrogateescape")).hexdigest().encode()

    def _is_own(self, name: str, token: str | None) -> bool:
        path = f"{self.path}/{name}/{OWNER_FILE}"
        if token is None or self.filesystem.get_file_info(path).type is not fs.FileType.File:
            return False
        expected = self._build_proof(token)
        with self.filesystem.open_input_stream(path) as file:
            return bool(file.read(len(expected) + 1) == expected)

    def _remove_below(self, folder: str, trial: str | None) -> None:
        for path in self._list_folders(folder, trial):
            if _CHECKPOINT.fullmatch(path.removeprefix(f"{folder}/")):
                with contextlib.suppress(FileNotFoundError):  # Ray has replaced it
                    self.filesystem.delete_dir(path)
        if trial is None and isinstance(self.filesystem, fs.LocalFileSystem):
            for emptied in Path(folder).glob("*/"):
                with contextlib.suppress(OSError):  # it is not empty, or a link
                    emptied.rmdir()

    def _list_folders(self, folder: str, trial: str | None) -> list[str]:
        """Return the folders inside trial folders. Skip symbolic links: a run may come from any source."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            trials = Path(folder).glob("*/") if trial is None else [Path(folder) / trial]
            folders = [path for found in trials if not found.is_symlink() for path in found.glob("*/")]
            return [str(path) for path in folders if not path.is_symlink()]
        base = folder if trial is None else f"{folder}/{trial}"
        below = fs.FileSelector(base, allow_not_found=True, recursive=True)
        return [entry.path for entry in self.filesystem.get_file_info(below) if entry.type is fs.FileType.Directory]


def identify_folder(folder: Path) -> str:
    """Return a text that stays the same while a run folder is not moved, and differs for each copy of it."""
    return f"{folder.resolve()} {folder.stat().st_ino}"


def prepare_storage(
    storage_path: str | None,
    run_folder: Path,
    *,
    nodes: int = 1,
    earlier: Sequence[Part] | None = None,
) -> RunStorage:
    """Choose the storage, and test that it can be written. A resumed search gets a new folder each time.

    Args:
        storage_path: a path that all nodes can write, or a URL that pyarrow supports, with its options as a query
            (``s3://bucket?endpoint_override=host:port``); None for the run folder, which only this node can write.
            Credentials come from the environment or from the URL.
        run_folder: the run's own folder; its name is the experiment's name at ``storage_path``.
        nodes: number of nodes of the Ray cluster.
        earlier: storage of the earlier parts of a resumed search; None for a new search.

    Raises:
        InputError: the place cannot be written, already holds a run of this name, or is required and missing.
    """
    if storage_path is None:
        if nodes > 1:
            raise InputError(f"--storage-path: must name a place that all {nodes} nodes of the cluster can write")
        local = RunStorage(path=str(run_folder.resolve()), name=RAY_FOLDER, filesystem=fs.LocalFileSystem())
        return _choose_name(local, earlier)
    shown = hide_credentials(storage_path)
    try:
        place = storage_path if "://" in storage_path else str(Path(storage_path).expanduser().resolve())
        filesystem, root = fs.FileSystem.from_uri(place)
        storage = RunStorage(
            path=root.rstrip("/"),
            name=run_folder.name,
            filesystem=filesystem,
            place=hide_credentials(place),
            owner=identify_folder(run_folder),
        )
        filesystem.create_dir(storage.path, recursive=True)
        probe = f"{storage.path}/.{storage.name}-{secrets.token_hex(4)}"
        filesystem.open_output_stream(probe).close()
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(probe)
        storage = _choose_name(storage, earlier)
        taken = storage.is_taken
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError, ArrowNotImplementedError an OSError too
        reason = hide_credentials(describe_error(error))
        raise InputError(f"--storage-path: {shown} cannot be written ({reason})") from error
    if taken:
        raise InputError(f"--storage-path: {shown} already holds a run {run_folder.name}; choose another --name")
    return storage


def _choose_name(storage: RunStorage, earlier: Sequence[Part] | None) -> RunStorage:
    """Return ``run`` for a new search, and the first free name of ``run``, ``run-2``, ``run-3`` for a resumed one.

    A name that is taken may belong to another run. Only the folders that the journal lists belong to the search.
    """
    if earlier is None:
        return storage
    own = tuple((name, token) for place, name, token in earlier if place == storage.place)
    names = itertools.chain([storage.name], (f"{storage.name}-{number}" for number in itertools.count(2)))
    candidates = (dataclasses.replace(storage, name=name, earlier=own) for name in names)
    return next(candidate for candidate in candidates if not candidate.is_taken)


def check_from_nodes(storage: RunStorage, resources: TrialResources) -> None:
    """Test that this process sees what each node writes, for every node of the running Ray on which a trial fits.

    Without this test, a path that only looks the same on all nodes would first fail when a worker dies.

    Raises:
        InputError: a node cannot write there, or this process does not see what the node wrote.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(_write)
    mark = secrets.token_hex(4)
    nodes = {}
    for node in ray.nodes():
        if node["Alive"] and count_slots(node["Resources"], resources.cpus, resources.gpus):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            path = f"{storage.path}/.{storage.name}-{mark}-{node['NodeID']}"
            answer = probe.options(scheduling_strategy=there).remote(storage.filesystem, path)
            nodes[answer] = (node["NodeManagerAddress"], path)
    answered, late = ray.wait(list(nodes), num_returns=len(nodes), timeout=NODE_SECONDS)
    for answer in late:
        ray.cancel(answer)
    try:
        for answer in answered:
            address, path = nodes[answer]
            try:
                error = ray.get(answer)
            except ray.exceptions.RayError:  # the node left
                continue
            if error is not None:
                raise InputError(f"--storage-path: {storage.path} cannot be written on node {address} ({error})")
            if storage.filesystem.get_file_info(path).type is fs.FileType.NotFound:
                raise InputError(
                    f"--storage-path: {storage.path} must be the same place on all nodes; {address} has its own"
                )
    finally:
        for _, path in nodes.values():
            with contextlib.suppress(OSError):
                storage.filesystem.delete_file(path)


def _write(filesystem: fs.FileSystem, path: str) -> str | None:
    """Write an empty file. Return the error as one line, or None."""
    try:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        filesystem.open_output_stream(path).close()
    except (OSError, ValueError) as error:
        return hide_credentials(describe_error(error))
    return None
