"""What the benchmarks write in Markdown: tables, and the verdict on a target."""

from collections.abc import Iterable, Sequence


def render_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell would begin the next one."""
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def judge(holds: bool) -> str:
    """The verdict where there is a target."""
    return "met" if holds else "missed"
