"""SECURITY.md promises nothing that no test holds."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()


def list_tests(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_each_promise_names_tests_that_exist() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    promises = [line for line in lines if not line.startswith(("| Promise", "| Function"))]
    assert len(promises) > 15
    for line in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line)
        assert named, line
        for path, name in named:
            assert name in list_tests(ROOT / path), f"{path}::{name}"


def test_each_test_of_the_attack_is_named_or_prepares_one_that_is() -> None:
    named = set(re.findall(r"::(test_\w+)", PAGE))
    assert len(list_tests(ROOT / "tests" / "test_attack.py") & named) >= 12


def test_limits_on_the_page_are_those_of_the_code() -> None:
    from tune_amp.results.page_limits import FREE_BYTES, MOST_EXPANSION
    from tune_amp.space.space import MAX_BYTES
    from tune_amp.space.strict_yaml import MAX_DEPTH
    from tune_amp.training.mnist_files import MOST_BYTES

    assert f"at most {FREE_BYTES // 2**20} MiB and {MOST_EXPANSION} times its size" in PAGE
    assert f"at most {MOST_BYTES // 2**30} GiB of values" in PAGE
    assert f"at most {MAX_BYTES // 2**10} KiB and {MAX_DEPTH} levels" in PAGE


def test_readme_leads_to_the_page() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()


# Whatever is named so removes, overwrites or moves something, or sends a signal. `replace` and `open` are looked at.
DESTRUCTIVE = {"rmtree", "unlink", "rmdir", "rename", "renames", "kill", "killpg", "terminate", "send_signal"}
DESTRUCTIVE |= {"truncate", "ftruncate", "delete_dir", "delete_dir_contents", "delete_file", "write_text"}
DESTRUCTIVE |= {"write_bytes", "write_atomically", "copytree", "copyfile", "open_output_stream"}


def is_destructive(node: ast.AST) -> bool:
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        return name in DESTRUCTIVE or ast.unparse(node) in {"os.remove", "shutil.move", "ray.cancel"}
    if not isinstance(node, ast.Call) or "os.devnull" in ast.unparse(node.func):
        return False
    called = ast.unparse(node.func).rpartition(".")[2]
    texts = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    if called == "open":
        return any(set(text) <= set("rwab+") and set(text) & set("wa+") for text in texts)  # "x" overwrites nothing
    of_a_path = len(node.args) == 1 and not node.keywords and "dataclasses" not in ast.unparse(node.func)
    return called == "replace" and of_a_path


def find_destructive(node: ast.AST, inside: tuple[str, ...] = ()) -> set[str]:
    """The functions below ``node`` that hold a call of that kind: ``Class.method`` or ``function``."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        inside = (*inside, node.name)
    found = {".".join(inside)} if is_destructive(node) and inside else set()
    return found.union(*(find_destructive(child, inside) for child in ast.iter_child_nodes(node)))


def test_each_function_that_could_touch_what_is_not_ours_is_on_the_page_with_its_proof() -> None:
    """Of the product and its commands; what a benchmark measures lies in temporary folders of its own."""
    files = [path for pattern in ("tune_amp/**/*.py", "benchmarks/*.py", "scripts/*.py") for path in ROOT.glob(pattern)]
    found = set().union(*(find_destructive(ast.parse(path.read_text())) for path in files))
    rows = PAGE.partition("\n| Function | ")[2].partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row.split(" | ")[0])]
    assert len(named) == len(set(named))
    assert set(named) == found
