"""SECURITY.md promises nothing that no test holds."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()


def list_tests(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_each_promise_names_tests_that_exist() -> None:
    promises = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Promise")]
    assert len(promises) > 15
    for line in promises:
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", line)
        assert named, line
        for path, name in named:
            assert name in list_tests(ROOT / path), f"{path}::{name}"


def test_each_test_of_the_attack_is_named_or_prepares_one_that_is() -> None:
    named = set(re.findall(r"::(test_\w+)", PAGE))
    assert len(list_tests(ROOT / "tests" / "test_attack.py") & named) >= 12


def test_limits_on_the_page_are_those_of_the_code() -> None:
    from tune_amp.idx_files import MOST_BYTES
    from tune_amp.parquet_pages import FREE_BYTES, MOST_EXPANSION
    from tune_amp.space import MAX_BYTES
    from tune_amp.strict_yaml import MAX_DEPTH

    assert f"at most {FREE_BYTES // 2**20} MiB and {MOST_EXPANSION} times its size" in PAGE
    assert f"at most {MOST_BYTES // 2**30} GiB of values" in PAGE
    assert f"at most {MAX_BYTES // 2**10} KiB and {MAX_DEPTH} levels" in PAGE


def test_readme_leads_to_the_page() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
