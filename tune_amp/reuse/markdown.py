"""Markdown pages from the templates in ``templates/``. Texts that come from files are inline code in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_amp.trial.config import code_span, is_function_name


def render_markdown(name: str, **values: Any) -> str:
    """Fill the template ``name``."""
    import jinja2  # its import takes longer than most commands

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(),  # escapes HTML only; the filter ``code`` escapes Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code_span, "count": "{:,}".format, "value": _show_value}
    return environment.get_template(name).render(values)


def format_settings(settings: Mapping[str, object]) -> str:
    """Return settings in one line, such as ``lr 0.001, batch_size 64``."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )


def _show_value(value: object) -> str:
    if isinstance(value, str):
        return code_span(value) if is_function_name(value) else value
    return f"{value:g}" if isinstance(value, float) else str(value)
