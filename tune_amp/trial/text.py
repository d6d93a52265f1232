"""Makes texts safe to show: credentials out of a command line, control characters out of what a file says."""

import re

HIDDEN = "***"
"""Stands where a secret stood."""

# A user with a password, behind a scheme or without one. Azure's `blob_storage_authority` is no secret.
_USER = re.compile(r"(://)[^?\s]*@|(?<![^\s='\"])[^\s/@:=]+:[^\s/@]+@")
_SECRET = re.compile(
    r"(?<![\w.%-])([\w.%-]*(?:auth(?!or(?!iz))|cookie|cred|jwt|key|pass|pwd|sas|secret|sig|token)[\w.%-]*)=[^&\s]*",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """``text`` on one line, without what a terminal would act on: a file may come from anybody, with its texts."""
    return "".join(character for character in text.replace("\n", " ") if character.isprintable())


def hide_credentials(text: str) -> str:
    """``text`` without users, passwords and keys, of URLs and of assignments: for messages, and for the record."""
    return _SECRET.sub(rf"\1={HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
