"""Each file of the package imports only from those above it, so that a reader can go from top to bottom."""

import ast
from pathlib import Path

import pytest

import tune_amp

PACKAGE = Path(tune_amp.__file__).parent

LAYERS = (
    "run_files",
    "text",
    "config",
    "consent",
    "files",
    "options",
    "halt",
    "generators",
    "buffers",
    "confirmed",
    "intervals",
    "gain",
    "curricula",
    "compared",
    "markdown",
    "compare_page",
    "states",
    "strict_yaml",
    "parameters",
    "space",
    "inert",
    "own_code",
    "idx_files",
    "data",
    "console",
    "batches",
    "models",
    "amp",
    "memory",
    "evaluation",
    "graphs",
    "training",
    "shares",
    "resources",
    "parquet_pages",
    "parquet",
    "results",
    "utilisation",
    "untroubled",
    "journal",
    "past",
    "progress",
    "ranking",
    "confirm_table",
    "warm_start",
    "importance",
    "reuse",
    "card",
    "cpus",
    "compare",
    "private_home",
    "session",
    "vitals",
    "memory_holders",
    "trainable",
    "failures",
    "stopping",
    "samplers",
    "searcher",
    "mending",
    "source",
    "time_limit",
    "storage",
    "preflight",
    "recorder",
    "trackers",
    "confirm",
    "confirm_slots",
    "gauges",
    "monitoring",
    "outcome",
    "report_style",
    "report_axes",
    "report_run",
    "report_scales",
    "report_figures",
    "report_parameters",
    "report_page",
    "report_summary",
    "report_sections",
    "report_findings",
    "report",
    "report_command",
    "planning",
    "tuning",
    "search",
    "resuming",
    "search_arguments",
    "search_output",
    "search_command",
    "train_command",
    "show_command",
    "compare_command",
    "grafana_command",
    "cli",
)

# What a module may import besides the standard library and tune_amp. Nothing else: results can be read without torch.
THIRD_PARTY = {
    "run_files": set(),
    "config": set(),
    "consent": set(),
    "files": set(),
    "options": set(),
    "utilisation": set(),
    "confirmed": set(),
    "intervals": {"scipy"},
    "curricula": set(),
    "compared": set(),
    "compare_page": set(),
    "states": set(),
    "inert": set(),
    "strict_yaml": {"yaml"},
    "parameters": {"optuna"},
    "space": {"optuna"},
    "parquet_pages": {"pyarrow"},
    "parquet": {"pyarrow"},
    "results": {"pyarrow"},
    "ranking": set(),
    "warm_start": {"optuna"},
    "importance": {"numpy", "optuna", "pyarrow"},
    "card": set(),
    "markdown": {"jinja2"},
    "private_home": set(),
    "cpus": set(),
    "untroubled": set(),
    "memory_holders": set(),
    "journal": set(),
    "halt": set(),
    "resuming": set(),
    "past": set(),
    "outcome": {"rich"},
    "show_command": {"rich"},
    "grafana_command": set(),
    "gauges": {"ray"},
    "report_style": {"plotly"},
    "report_axes": set(),
    "report_run": set(),
    "report_scales": {"plotly"},
    "report_figures": {"plotly"},
    "report_parameters": {"plotly"},
    "report_page": {"jinja2", "plotly"},
    "report_summary": set(),
    "report_sections": set(),
    "report_findings": set(),
    "report": set(),
    "amp": {"numpy", "torch"},
    "buffers": {"torch"},
    "evaluation": {"torch"},
    "generators": {"numpy", "torch"},
    "graphs": {"numpy", "torch"},
    "memory": {"torch"},
    "training": {"numpy", "torch"},
    "models": {"torch"},
    "own_code": {"torch"},
    "compare": {"pyarrow", "torch"},
    "trackers": {"mlflow", "ray", "tensorboardX", "wandb"},
    "shares": {"numpy", "torch"},
    "resources": {"ray", "torch"},
    "vitals": {"ray"},
}


def imported_modules(name: str) -> set[str]:
    """Dotted names of all modules that ``tune_amp/name.py`` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*LAYERS, "__init__"}


@pytest.mark.parametrize("name", LAYERS)
def test_a_file_imports_only_from_those_above(name: str) -> None:
    ours = {module.split(".")[1] for module in imported_modules(name) if module.startswith("tune_amp.")}
    below = set(LAYERS[LAYERS.index(name) :])
    assert ours & below == set()


def test_the_package_does_not_need_the_benchmarks() -> None:
    assert [name for name in LAYERS if any(module.startswith("benchmarks") for module in imported_modules(name))] == []


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_file_needs_no_other_library_than_its_own(name: str) -> None:
    import sys

    roots = {module.split(".")[0] for module in imported_modules(name)}
    assert roots - sys.stdlib_module_names - {"tune_amp"} == THIRD_PARTY[name]
