"""Markdown pages from the templates in ``templates/``. Texts that come from files are inline code in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_amp.trial.config import TrialConfig, is_function_name, list_values
from tune_amp.trial.text import code_span


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


def list_settings(config: TrialConfig) -> dict[str, Any]:
    """Return the fields of a configuration that have an effect, without those that are off; ``own.NAME`` for own ones.

    Of a user's own training, the model and the data set have the name of the task or of the loop.
    """
    off: dict[str, Any] = {"class_weighting": "none", "curriculum": "none", "imbalance": 1.0, "accumulate": 1}
    if config.train is not None:  # an own loop has its own optimizer and inputs
        off |= {"optimizer": "adam", "weight_decay": 0.0, "input_scaling": "minmax"}
    settings = {name: value for name, value in list_values(config).items() if value not in (None, off.get(name))}
    own_code = config.train or config.task
    return {name: value for name, value in settings.items() if own_code is None or value != own_code} | (
        {"train" if config.train else "task": own_code} if own_code else {}
    )
