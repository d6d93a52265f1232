"""Reads YAML 1.2 strictly: input that PyYAML accepts silently, or that could do harm, is an error with its line."""

import re
from typing import Any

import yaml

from tune_amp.trial.config import InputError, shown

# A space needs 6 levels; PyYAML recurses and would overflow the stack after a few hundred levels.
MAX_DEPTH = 10


# YAML 1.2.2, section 10.3.2: a tag, the pattern of its scalars, and their first characters; any other scalar is a
# string. PyYAML implements YAML 1.1, which reads 1e-4 as a string, no as false, 010 as 8 and 1:30 as 90.
CORE_SCHEMA = (
    ("null", "null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", ["t", "T", "f", "F"]),
    ("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
)


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without anchors (a few lines of aliases can expand to gigabytes), tags or deep nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # an attribute of the class, as in yaml.resolver
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise InputError(f"line {line}: anchors and aliases (& and *) are not allowed")
        if getattr(event, "tag", None) is not None:
            raise InputError(f"line {line}: tags (!) are not allowed")
        if self.depth == MAX_DEPTH:
            raise InputError(f"line {line}: must not be nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def convert(self, node: yaml.Node | None) -> Any:
        """Return the node as Python values; unlike PyYAML's own conversion, refuse a duplicate key."""
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(child) for child in node.value]
        if isinstance(node, yaml.ScalarNode):
            try:
                return self.construct_object(node)
            except ValueError:  # a number of 5,000 digits
                line = node.start_mark.line + 1
                raise InputError(f"line {line}: not a valid YAML value: {shown(node.value)}") from None
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value if node else ():
            key = self.convert(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise InputError(f"line {line}: a key must be a text, got {shown(key)}")
            if key in mapping:
                raise InputError(f"line {line}: key {shown(key)} stands twice")
            mapping[key] = self.convert(value_node)
        return mapping

    def read_int(self, node: yaml.ScalarNode) -> int:
        """Return the value of a scalar that matches the pattern of integers in ``CORE_SCHEMA``."""
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


for _kind, _form, _beginnings in CORE_SCHEMA:
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})\Z"), _beginnings)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.read_int)


def read_yaml(text: str) -> Any:
    """Return the document as dictionaries, lists, strings and numbers.

    Raises:
        InputError: not YAML, a key that is duplicate or not a string, anchors, tags, or nesting beyond ``MAX_DEPTH``.
    """
    try:
        loader = _PlainLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"line {line}: not valid YAML: character {text[error.position]!r} is not allowed") from None
    try:
        return loader.convert(loader.get_single_node())
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise InputError(f"line {line}: not valid YAML: {error.problem or error.context}") from None
    except (ValueError, OverflowError):  # PyYAML's scanner does not check numbers: "\UFFFFFFFF", a directive's version
        raise InputError(f"line {loader.line + 1}: not valid YAML: a number out of range") from None
