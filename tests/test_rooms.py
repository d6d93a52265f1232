"""Each room imports only from rooms on lower floors, and needs no other libraries than its own."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tune_amp

PACKAGE = Path(tune_amp.__file__).parent

FLOORS = {
    "trial": 1,
    "space": 2,
    "training": 2,
    "results": 3,
    "cluster": 3,
    "confirm": 4,
    "reuse": 4,
    "report": 4,
    "monitor": 4,
    "search": 5,
    "cli": 6,
}

# What a room may import besides the standard library and lower rooms.
LIBRARIES = {
    "trial": set(),
    "space": {"optuna", "yaml"},
    "training": {"numpy", "sklearn", "torch", "torchvision"},
    "results": {"numpy", "optuna", "pyarrow", "scipy"},
    "cluster": {"grpc", "numpy", "pyarrow", "ray", "torch"},
    "confirm": {"ray"},
    "reuse": {"jinja2", "pyarrow", "safetensors", "torch"},
    "report": {"jinja2", "plotly"},
    "monitor": {"mlflow", "ray", "rich", "tensorboardX", "wandb"},
    "search": {"numpy", "optuna", "ray", "torch"},
    "cli": {"pyarrow", "rich", "torch", "yaml"},
}
RAYS_INTERNALS = ("ray.air", "ray.tune.execution", "ray.tune.impl", "ray.tune.tune")
"""Modules of Ray that are not public, although no underscore says so."""
PUBLIC_PARTS = {"ray.air.constants", "ray.air.integrations"}
"""Of these modules."""
RAYS_VARIABLES = {
    "RAY_ADDRESS",
    "RAY_AIR_NEW_OUTPUT",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_USAGE_STATS_ENABLED",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    "TUNE_GLOBAL_CHECKPOINT_S",
    "TUNE_MAX_PENDING_TRIALS_PG",
}
"""Environment variables that Ray's documentation or its messages name."""
OPENED = {
    "results": ["load_best", "load_best_rows", "load_trials", "load_provenance"],
    "training": ["build_model", "Task"],
    "trial": ["consent_to"],
}
"""Names at the doors of rooms, for use from outside."""


def list_files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).glob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_is_in_a_room() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    assert {folder.relative_to(PACKAGE).as_posix() for folder in folders} == {*FLOORS}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "doors.py"}


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_from_lower_floors_only(room: str) -> None:
    for path in list_files(room):
        rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("tune_amp.")} & {*FLOORS}
        assert all(FLOORS[other] < FLOORS[room] for other in rooms - {room}), path


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_needs_no_other_libraries_than_its_own(room: str) -> None:
    roots = {name.split(".")[0] for path in list_files(room) for name in imported_modules(path)}
    assert roots - sys.stdlib_module_names - {"tune_amp"} == LIBRARIES[room]


def test_a_door_says_what_the_room_is_for_and_opens_names_that_all_exist() -> None:
    opened: dict[str, list[str]] = {}
    for room in FLOORS:
        door = ast.parse((PACKAGE / room / "__init__.py").read_text())
        assert ast.get_docstring(door)
        for call in ast.walk(door):
            if isinstance(call, ast.Call):
                opened[room] = [name.value for keyword in call.keywords for name in keyword.value.elts]  # type: ignore[attr-defined]
    assert opened == OPENED
    found = "{room: [getattr(import_module('tune_amp.' + room), name).__name__ for name in names]"
    code = f"from importlib import import_module; print({found} for room, names in {opened}.items()}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{opened}\n"


def test_the_page_lists_every_file_in_its_room_with_a_line() -> None:
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    sections = re.split(r"^### `(\w+)/`.*$", page, flags=re.MULTILINE)[1:]
    listed = {
        room: re.findall(r"^\| `(\w+)\.py` \| \S.* \|$", text, re.MULTILINE)
        for room, text in zip(sections[::2], sections[1::2], strict=True)
    }
    assert listed == {room: sorted({path.stem for path in list_files(room)} - {"__init__"}) for room in FLOORS}


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`(\w+/\w+\.py)`", (PACKAGE.parent / page).read_text())
    assert [name for name in named if not any((top / name).exists() for top in (PACKAGE, PACKAGE.parent))] == []
    assert named


def test_no_circle_within_a_room() -> None:
    """So that a file can be read after those that it needs."""
    for room in FLOORS:
        needs = {
            path.stem: {
                name.split(".")[2]
                for name in imported_modules(path)
                if name.startswith(f"tune_amp.{room}.") and name.count(".") > 2
            }
            for path in list_files(room)
            if path.stem != "__init__"
        }
        while needs:
            free = {name for name, others in needs.items() if not others & {*needs} - {name}}
            assert free, f"{room}: a circle among {sorted(needs)}"
            needs = {name: others for name, others in needs.items() if name not in free}


@pytest.mark.parametrize(("module", "heavy"), [
    ("tune_amp", {"torch", "ray", "optuna", "pyarrow", "numpy", "rich"}),
    ("tune_amp.trial.config", {"torch", "ray", "optuna", "pyarrow", "numpy"}),
    ("tune_amp.results.records", {"torch", "ray", "optuna"}),
    ("tune_amp.training.run", {"ray", "optuna"}),
    ("tune_amp.cli.main", {"torch", "ray", "optuna", "pyarrow"}),
])  # fmt: skip
def test_what_must_load_quickly_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_only_commands_print() -> None:
    """What a search shows is rendered in lower rooms, and printed in one; but for warnings on stderr."""
    printing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    warning = {"search/tuner.py", "monitor/trackers.py", "monitor/prometheus.py"}
    assert {path for path in printing if not path.startswith("cli/")} == warning


def test_private_parts_of_ray_are_named_in_one_file() -> None:
    """Modules, names and attributes with an underscore, internal modules, undocumented variables, and patches.

    Attributes are checked in files that import Ray, on everything but ``self``, ``cls`` and ``super()``: what a
    subclass of a class of Ray's inherits is not checked.
    """
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "cluster" / "ray_patches.py"
        for name in find_private(path)
    }
    assert found == set()


def find_private(path: Path) -> Iterator[str]:
    imported = [*imported_modules(path)]
    uses_ray = any(name.split(".")[0] == "ray" for name in imported)
    for name in imported:
        is_internal = name.startswith(RAYS_INTERNALS) and ".".join(name.split(".")[:3]) not in PUBLIC_PARTS
        if is_internal or re.match(r"ray\.(.*\.)?_", name) or (uses_ray and name.startswith("unittest.mock")):
            yield name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant):
            if re.fullmatch(r"(RAY|TUNE(?!_AMP))_\w+", str(node.value)) and node.value not in RAYS_VARIABLES:
                yield str(node.value)
        elif uses_ray and isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            yield from re.findall(r"^_(?!_).*", node.attr)
