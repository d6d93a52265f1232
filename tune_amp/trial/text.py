"""Makes text fit to show: on one line, not too long, without credentials and control characters."""

import json
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
"""Replacement of a secret."""

# A user with a password, with or without a scheme. Azure's `blob_storage_authority` is not a secret.
_USER = re.compile(r"(://)[^?\s]*@|(?<![^\s='\"])[^\s/@:=]+:[^\s/@]+@")
_SECRET = re.compile(
    r"(?<![\w.%-])([\w.%-]*(?:auth(?!or(?!iz))|cookie|cred|jwt|key|pass|pwd|sas|secret|sig|token)[\w.%-]*)=[^&\s]*",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """Return ``text`` on one line, without characters that control a terminal: files are not trusted."""
    return "".join(character for character in text.replace("\n", " ") if character.isprintable())


def join_names(names: Sequence[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c`` of at least one name."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def count_of(number: int, noun: str) -> str:
    """Return ``1 trial``, ``1,024 trials``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def hide_credentials(text: str) -> str:
    """Return ``text`` without the users, passwords and keys in URLs and assignments, for messages and records."""
    return _SECRET.sub(rf"\1={HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def dump_json(value: object, indent: int | None = None) -> str:
    """Return ``value`` as JSON; numbers that JSON does not have (NaN, infinity) become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent, allow_nan=False)


def code_span(text: str) -> str:
    """Return ``text`` of a file on one line as Markdown inline code, in which Markdown and HTML have no effect."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def generalize_error(text: str) -> str:
    """Return an error's text without numbers and addresses: errors that differ only in these are the same error."""
    return re.sub(r"(?i)0x[0-9a-f]+|\d+(\.\d+)?", "#", text)


def shown(value: Any) -> str:
    """Return ``repr`` of a user's value for a one-line message, shortened if it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print an int of more than 4,300 digits
        return f"<{type(value).__name__} too long to show>"


def format_scale(scale: float | None) -> str:
    """Format a loss scale: ``2^16`` if it is a power of two, else four significant digits."""
    if scale is None:
        return ""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:.4g}"


def format_setting(name: str, value: Any) -> str:
    """Return a setting as people write it; empty if the trial does not have it. Without clipping is a setting too."""
    if value is None:
        return "null" if name == "grad_clip" else ""
    if name == "init_scale":
        return format_scale(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_number(value: float, digits: int) -> str:
    """Return a number with so many significant digits, and no exponent below 10^15: ``2.50``, ``1,234``."""
    is_large = 10 ** (digits - 1) <= abs(value) < 1e15  # a perplexity may have 300 digits
    return f"{value:,.0f}" if is_large else f"{value:#.{digits}g}".rstrip(".")


def one_line(text: str, limit: int = 300) -> str:
    """Return ``text`` with each run of white space as one blank, cut to ``limit`` characters if it is longer.

    Characters that control a terminal, or that no encoding has (file names can hold them), become a replacement
    character.
    """
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def describe_error(error: BaseException) -> str:
    """Return an exception's type and text on one line: some libraries write paragraphs."""
    name, text = type(error).__name__, str(error)
    return one_line(f"{name}: {text}" if text else name)
