"""Reads YAML 1.2 strictly: input that PyYAML accepts silently, or that could do harm, is an error with its line."""

import re
from collections.abc import Callable
from typing import Any

import yaml

from tune_amp.trial.config import InputError
from tune_amp.trial.text import shown

# A space needs 6 levels; PyYAML recurses and would overflow the stack after a few hundred levels.
MAX_DEPTH = 10

# YAML 1.2.2, section 10.3.2: any other plain scalar is a string. PyYAML implements YAML 1.1, which reads 1e-4 as a
# string, no as false, 010 as 8 and 1:30 as 90.
CORE_SCHEMA: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("null|Null|NULL|~|", lambda _: None),
    ("true|True|TRUE|false|False|FALSE", lambda text: text in ("true", "True", "TRUE")),
    ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


def read_yaml(text: str) -> Any:
    """Return the document as dictionaries, lists, strings and numbers.

    Raises:
        InputError: not YAML, a key that is duplicate or not a string, anchors, tags, or nesting beyond ``MAX_DEPTH``.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"line {line}: not valid YAML: character {text[error.position]!r} is not allowed") from None
    try:
        _check_events(loader)
        return _convert(yaml.compose(text, yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise InputError(f"line {line}: not valid YAML: {error.problem or error.context}") from None
    except InputError:
        raise
    except (ValueError, OverflowError):  # PyYAML's scanner does not check numbers: "\UFFFFFFFF", a directive's version
        raise InputError(f"line {loader.line + 1}: not valid YAML: a number out of range") from None


def _check_events(loader: yaml.SafeLoader) -> None:
    """Refuse anchors (a few lines of aliases can expand to gigabytes), tags and deep nesting, before any recursion."""
    depth = 0
    while loader.check_event():
        event = loader.get_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise InputError(f"line {line}: anchors and aliases (& and *) are not allowed")
        if getattr(event, "tag", None) is not None:
            raise InputError(f"line {line}: tags (!) are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"line {line}: must not be nested deeper than {MAX_DEPTH} levels")


def _convert(node: yaml.Node | None) -> Any:
    """Return the node as Python values; unlike PyYAML's own conversion, refuse a duplicate key."""
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child) for child in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _convert_scalar(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value if node else ():
        key = _convert(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise InputError(f"line {line}: a key must be a text, got {shown(key)}")
        if key in mapping:
            raise InputError(f"line {line}: key {shown(key)} stands twice")
        mapping[key] = _convert(value_node)
    return mapping


def _convert_scalar(node: yaml.ScalarNode) -> Any:
    for form, read in CORE_SCHEMA if node.style is None else ():  # any style is that of a quoted or a block text
        if re.fullmatch(form, node.value):
            try:
                return read(node.value)
            except ValueError:  # a number of 5,000 digits
                line = node.start_mark.line + 1
                raise InputError(f"line {line}: not a valid YAML value: {shown(node.value)}") from None
    return node.value
