"""The origin of a run: its command, data and versions, which every Parquet file of it carries, and how to reuse it."""

import dataclasses
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Mapping, Sequence

from tune_amp import __version__
from tune_amp.trial.config import SAMPLERS, SCHEDULERS, check, checked_type, described, field_types
from tune_amp.trial.objectives import read_objectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a run's files, stored in each file's metadata as JSON. It has no host or user names.

    Raises:
        InputError: a field has another type than declared, or an objective is unknown.
    """

    run: str = described("name of the run")
    command: tuple[str, ...] = described("command line that started the search")
    created: str = described("when the run started: ISO 8601, UTC")
    space_source: str = described("where the search space was read from")
    space_text: str = described("the search space as used, YAML")
    dataset: str = described("data set of the run")
    data_hash: str = described("hash of the data set's content")
    train_images: int = described("images trained on", unit="images")
    validation_images: int = described("images that chose the best", unit="images")
    objective: str = described(
        "what was searched for: a metric, or several joined by commas; :max or :min where the name implies another"
    )
    sampler: str = described("which of Optuna's samplers suggested: " + ", ".join(SAMPLERS))
    scheduler: str = described("what stopped trials early: " + ", ".join(SCHEDULERS))
    seed: int = described("seed of the search")
    device: str = described("what the trials were given: cpu or cuda")
    versions: Mapping[str, str] = described("version of each library that matters, by name")
    warm_start: str | None = described("run, file and checksum that the search was warm-started from", default=None)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Objectives of the search; the first ranks the trials."""
        return tuple(self.objective.split(","))

    @property
    def data_dir(self) -> str | None:
        """The search's ``--data-dir``; None if it was not given."""
        for part, following in itertools.pairwise([*self.command, None]):
            if part == "--data-dir":
                return following
            if part is not None and part.startswith("--data-dir="):
                return part.removeprefix("--data-dir=")
        return None

    def __post_init__(self) -> None:
        for name, hint in field_types(Provenance).items():
            if hint in (str, int, str | None):
                checked_type(name, getattr(self, name), hint)
        read_objectives("objective", self.objective, None)
        is_list, is_mapping = isinstance(self.command, list | tuple), isinstance(self.versions, Mapping)
        check("command", self.command, is_list and _are_texts(self.command), "must hold texts")
        check("versions", self.versions, is_mapping and _are_texts(self.versions.values()), "must hold texts")
        object.__setattr__(self, "command", tuple(self.command))
        object.__setattr__(self, "versions", dict(self.versions))


def list_reuse_words(
    train: Sequence[str], best: str, *, data_dir: str | None, own_code: Sequence[str] = ()
) -> list[str]:
    """Return the command that trains rank 1, with the same data, and with consent to the user's own code.

    Args:
        train: the command that trains, such as ``("tune-amp", "train")``.
        best: path of ``best.parquet``.
        data_dir: the search's ``--data-dir``; None if it was not given.
        own_code: flags that name the user's own code, from ``list_own_code``.
    """
    return [*train, best, *([] if data_dir is None else ["--data-dir", data_dir]), *own_code]


def list_versions(*packages: str) -> dict[str, str]:
    """Return the version of each installed package, and of Python."""
    return {name: find_version(name) for name in (*packages, "python")}


def find_version(package: str) -> str:
    """Return the version of a package or of ``python``, or ``not installed``."""
    if package == "python":
        return platform.python_version()
    if package == "tune_amp":  # on a cluster, the package is sent and not installed
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
