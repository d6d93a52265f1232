"""Reads YAML 1.2 strictly: what PyYAML lets pass in silence, or what could hurt, is an error with its line."""

import re
from typing import Any

import yaml

from tune_amp.trial.config import InputError, shown

# A space needs 6 levels; PyYAML recurses, and would run out of stack some hundred levels down.
MAX_DEPTH = 10


# YAML 1.2.2, section 10.3.2: tag, what a scalar of it looks like, and how it begins; any other scalar is a text.
# PyYAML's own are those of YAML 1.1, to which 1e-4 is a text, no is false, 010 is 8 and 1:30 is 90.
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
    """YAML without anchors (a few lines of aliases can stand for gigabytes), tags or deep nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # a class's own, as in yaml.resolver
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
        """The node as Python values; unlike PyYAML's own conversion, refuses a key that stands twice."""
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
        """The number that CORE_SCHEMA found to be one."""
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


for _kind, _form, _beginnings in CORE_SCHEMA:
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})\Z"), _beginnings)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.read_int)


def read_yaml(text: str) -> Any:
    """The document as dictionaries, lists, texts and numbers.

    Raises:
        InputError: not YAML, a key that stands twice or is no text, anchors, tags, or nesting beyond ``MAX_DEPTH``.
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
    except (ValueError, OverflowError):  # PyYAML's scanner trusts numbers: "\UFFFFFFFF", a directive's version
        raise InputError(f"line {loader.line + 1}: not valid YAML: a number out of range") from None
