import argparse
import code
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tune_amp.trial import consent
from tune_amp.trial.config import InputError
from tune_amp.trial.consent import consent_to, list_provided, load_function, name_function, provide


def test_function_in_a_package_is_found_and_installed_modules_are_not_shadowed(
    write_module: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "inner.py").write_text("def make():\n    return 7\n")
    consent_to("user_package.inner:make")
    assert load_function("user_package.inner:make")() == 7
    assert sys.path[-1] == str(tmp_path)
    load_function("user_package.inner:make")
    assert sys.path.count(str(tmp_path)) == 1


def test_file_of_the_standard_library_or_installed_that_hides_the_users_own_is_named(
    write_module: Callable[[str], str], tmp_path: Path
) -> None:
    """It is never imported instead: pdb, for one, imports ``code``."""
    consent_to("code:net", "yaml:net", "time:sleep", "json:dumps")
    for module in (code, yaml):
        own = tmp_path / f"{module.__name__}.py"
        own.write_text("def net(): ...\n")
        with pytest.raises(InputError) as caught:
            load_function(f"{module.__name__}:net")
        name = module.__name__
        assert str(caught.value) == f"{name}:net: {name} is {module.__file__}, not {own}; rename your own file"
    (tmp_path / "time.py").write_text("def sleep(): ...\n")
    with pytest.raises(InputError, match=r"^time:sleep: time is built into Python, not "):
        load_function("time:sleep")
    assert load_function("json:dumps")([1]) == "[1]"  # nothing of the user's is hidden


def test_users_file_named_like_a_script_of_ours_is_found(
    write_module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python scripts/search.py`` puts the folder of the scripts first."""
    scripts = str(Path(consent.__file__).parents[2] / "scripts")
    monkeypatch.setattr(sys, "path", [scripts, *sys.path])
    consent_to("train:net")
    (tmp_path / "train.py").write_text("import report\ndef net(): return report.__file__\n")
    (tmp_path / "report.py").write_text("")
    assert load_function("train:net")() == str(tmp_path / "report.py")
    assert scripts not in sys.path


ARGPARSE = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--hidden", type=int, default=32)
args, left = {call}, 0
def hidden(): return args.hidden
"""


def test_module_that_parses_the_command_line_is_refused_in_one_line(
    write_module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_module(ARGPARSE.format(call="parser.parse_args()"))
    guard = "put that below if __name__ == '__main__'"
    reason = f"SystemExit: {name} parses the command line when imported: {guard}"
    with pytest.raises(InputError) as caught:
        load_function(f"{name}:hidden")
    assert str(caught.value) == f"{name}:hidden: importing {name} failed ({reason})"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="2"):  # argparse itself is as it was
        argparse.ArgumentParser().error("wrong")


def test_module_that_parses_what_it_knows_gets_its_defaults_and_not_our_flags(
    write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have another command line: the model would differ there."""
    monkeypatch.setattr(sys, "argv", ["search", "--hidden", "9"])
    name = write_module(ARGPARSE.format(call="parser.parse_known_args()[0]"))
    assert load_function(f"{name}:hidden")() == 32
    assert sys.argv == ["search", "--hidden", "9"]


def test_function_that_the_user_did_not_name_is_not_imported(
    write_module: Callable[[str], str], tmp_path: Path
) -> None:
    module = write_module("import pathlib\npathlib.Path('imported').touch()\ndef net(): ...\n")
    message = f"{module}:main: code that only a file names is not run; .*, call tune_amp.trial.consent_to"
    with pytest.raises(InputError, match=message):
        load_function(f"{module}:main")  # another function of a module of which one is named
    assert not (tmp_path / "imported").exists()
    load_function(f"{module}:net")
    assert (tmp_path / "imported").exists()


def test_program_that_names_its_own_code_needs_no_consent_unless_a_file_named_it_too(
    write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_module("def net(): ...\ndef data(): ...\n")
    # A program that has not asked for consent.
    monkeypatch.setattr("tune_amp.trial.consent._consent", consent._Consent())
    consent.distrust(f"{module}:data")
    consent.distrust("mnist")  # no code
    load_function(f"{module}:net")
    assert consent.list_consented() == (f"{module}:net",)  # so that workers may load it
    with pytest.raises(InputError, match="code that only a file names is not run"):
        load_function(f"{module}:data")
    consent_to(f"{module}:data")
    load_function(f"{module}:data")
    with pytest.raises(InputError, match="code that only a file names is not run"):
        load_function(f"{module}:other")  # from now on, nothing else


@pytest.mark.parametrize("name", ["no_such_module_here:load", "user_module.py", "a:b:c", ":load", "a:"])
def test_name_without_a_module_and_a_function_is_refused(name: str) -> None:
    consent_to(name)
    with pytest.raises(InputError, match=name):
        load_function(name)


def module_function() -> int:
    return 1


def test_a_function_of_a_module_is_named_and_found_there() -> None:
    name = name_function(module_function)
    assert name == f"{__name__}:module_function"
    assert list_provided() == {}
    assert load_function(name) is module_function


def test_a_function_that_no_module_holds_is_kept_as_it_is_until_it_is_defined_again() -> None:
    def define(value: int) -> Callable[[], int]:
        def local() -> int:
            return value

        return local

    first, again = define(1), define(2)  # as a notebook's cell that is run again
    name = name_function(first)
    assert load_function(name) is first
    assert name_function(again) == name
    assert load_function(name) is again
    assert list_provided() == {name: again}
    provide({name: first})  # in a worker
    assert load_function(name) is first


def test_a_function_of_the_main_program_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's own ``__main__`` is another one."""
    monkeypatch.setattr(module_function, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "module_function", module_function, raising=False)
    name = name_function(module_function)
    assert name == "__main__:module_function"
    assert list_provided() == {name: module_function}


def test_what_has_no_name_is_refused() -> None:
    for value in (lambda: 1, 5, "mine:train"):
        with pytest.raises(InputError, match=r"must be a function or a class with a name$"):
            name_function(value)
