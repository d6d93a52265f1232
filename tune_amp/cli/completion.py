"""The command ``tune-amp completion``: prints what bash and zsh need to complete commands, flags, spaces and runs."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

from tune_amp.cli.console import EXIT_DONE, OneLineParser, answer_bad_input, ignoring_closed_pipe

OF_RUNS = ("show", "report", "train", "compare")
"""Commands that take the name of a run in ``results``."""
# compgen expands its words, so that a folder with the name of a command would run it: other names are left out.
LIST_RUNS = "$(cd results 2>/dev/null && ls 2>/dev/null | grep -xE '[A-Za-z0-9_.-]+')"
SCRIPT = """\
_tune_amp() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _tune_amp tune-amp
"""


def completion_command(
    arguments: Sequence[str] | None = None,
    program: str = "tune-amp completion",
    *,
    commands: Mapping[str, Callable[..., int]],
) -> int:
    """Print the script of the completion; ``commands`` are the functions of all commands by name."""
    parser = OneLineParser(
        program,
        'Print the shell completion of tune-amp: eval "$(tune-amp completion)" in .bashrc, or in .zshrc '
        "after `autoload -U bashcompinit && bashcompinit`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return answer_bad_input(lambda: _completion(parser.parse_args(arguments), commands))


def _completion(_: argparse.Namespace, commands: Mapping[str, Callable[..., int]]) -> int:
    cases = "\n".join(f'            {name}) words="{_list_words(name, run)}" ;;' for name, run in commands.items())
    with ignoring_closed_pipe():
        print(SCRIPT.format(commands=" ".join(commands), cases=cases), end="")  # noqa: T201
    return EXIT_DONE


def _list_words(name: str, command: Callable[..., int]) -> str:
    """Return the flags of a command, which its help lists, and the names that it takes."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command(["--help"])
    flags = sorted({*re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.getvalue())})
    names = [LIST_RUNS] if name in OF_RUNS else []
    if name == "search":
        from tune_amp.space.space import list_bundled

        names = [*list_bundled()]
    return " ".join([*flags, *names])
