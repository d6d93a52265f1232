"""Search spaces: a YAML file defines what is searched, and the settings of each trial are suggested from it.

.. code-block:: yaml

    parameters:                        # what is searched: fields of TrialConfig
      lr: {low: 1.0e-4, high: 3.0e-2, log: true}
      batch_size: {low: 64, high: 1024, power_of_two: true}
      precision: {choices: [fp32, bf16, fp16]}
      init_scale: {low: 1, high: 2^24, power_of_two: true, when: {precision: fp16}}
      growth_interval: {low: 0.005, high: 0.5, log: true, fraction_of_trial: true, when: {precision: fp16}}
    fixed:                             # what every trial shares
      backoff_factor: 0.25             # a scaler field: reaches fp16 trials only
    own:                               # the user's own parameters, in the same syntax
      hidden: {choices: [64, 128, 256]}
      dropout: {low: 0.0, high: 0.5, default: 0.1}

``when`` makes a parameter active only in trials whose named fields all have (one of) the given values; other trials
omit it, and TrialConfig's default applies. A number may be written as the string ``2^N``.
Powers of two are suggested by their exponent, under the name ``log2(init_scale)``.

``fraction_of_trial`` is for ``growth_interval`` alone. Its numbers are fractions of the trial's training steps, which
are (training images // (``batch_size`` * ``accumulate``)) * ``max_epochs``; the interval is rounded to whole steps, at
least one. A fixed interval of 2,000 steps is a quarter of a trial at batch size 64, but longer than one at 1,024, where
it never acts.
A fraction above 1 never acts in any trial: the loss scale is static and changes only at overflows.
Fractions are suggested under the name ``growth_interval/trial_steps``, so that no study mixes them with steps.

Own parameters reach a model function as keyword arguments, and a train function as ``trial.own``. They are whole
numbers if both bounds are, else numbers; choices are all numbers or all texts. ``default`` is the value in the
configuration that a search has to beat: the first choice, or the middle of the range, unless it is given.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna

from tune_amp.space.document import STEP_SIZE, read_document, suggest_name
from tune_amp.space.parameter import Parameter, list_possible
from tune_amp.space.strict_yaml import read_yaml
from tune_amp.trial.config import OWN, SCALER_DEFAULTS, InputError, TrialConfig, read_setting
from tune_amp.trial.text import shown

MAX_BYTES = 2**16  # a space has a few hundred bytes; PyYAML needs seconds for a megabyte

_TOO_LARGE = "is larger than 64 KiB, too large for a search space"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search varies and what its trials share; :func:`load_space` builds and checks it."""

    source: str
    """File or bundled name, as shown in messages."""
    text: str
    """The YAML, verbatim."""
    parameters: tuple[Parameter, ...]
    """Searched fields: parents before children, batch size and accumulate before fractions of the trial."""
    fixed: Mapping[str, Any]
    """Settings of every trial; scaler fields among them apply to fp16 trials only."""

    @property
    def own_defaults(self) -> dict[str, Any]:
        """The user's own parameters that are active in the default configuration, by name without ``own.``."""
        precision = "fp16" if "fp16" in self.precisions else self.precisions[0]
        settings = {**vars(TrialConfig(precision=precision)), **self.fixed}
        own = {}
        for parameter in self.parameters:  # parents before children
            if parameter.own_type and parameter.is_active(settings):
                settings[parameter.name] = own[parameter.name.removeprefix(OWN)] = parameter.own_default
        return own

    @property
    def is_conditional(self) -> bool:
        """Whether some trials omit a parameter."""
        return any(parameter.when for parameter in self.parameters)

    def list_possible(self, name: str) -> tuple[Any, ...]:
        """Return the values that a field can have: choices, the fixed one, TrialConfig's default; none of a range."""
        return list_possible(name, self.parameters, self.fixed)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that trials can have."""
        return self.list_possible("precision")

    def suggest(self, trial: optuna.trial.BaseTrial, *, train_images: int, max_epochs: int) -> dict[str, Any]:
        """Return the arguments of TrialConfig for the fixed and the active searched settings.

        The other fields keep TrialConfig's defaults.
        """
        settings = dict(self.fixed)
        for parameter in self.parameters:
            if parameter.is_active(settings):
                steps = _count_steps(parameter, settings, train_images, max_epochs)
                settings[parameter.name] = parameter.suggest(trial, trial_steps=steps)
        if settings.get("precision") != "fp16":
            settings = {name: value for name, value in settings.items() if name not in SCALER_DEFAULTS}
        own = {name.removeprefix(OWN): settings.pop(name) for name in [*settings] if name.startswith(OWN)}
        return settings | ({"own": own} if own else {})

    def find_defaults(self, *, train_images: int, max_epochs: int) -> dict[str, Any]:
        """Return the usual default settings, or the nearest that the space has, as a study suggests them.

        They are TrialConfig's own defaults in fp16: those of PyTorch's GradScaler and of its AMP tutorials. A setting
        without a nearest value, which is a string that is not a choice, is omitted.
        """
        places = self.locate(
            TrialConfig(precision="fp16", own=self.own_defaults), train_images=train_images, max_epochs=max_epochs
        )
        return {name: value for _, nearest, _ in places for name, value in nearest.items()}

    def locate(
        self, config: TrialConfig, *, train_images: int, max_epochs: int
    ) -> Iterator[tuple[Parameter, dict[str, Any], Any]]:
        """Yield each parameter that is active near ``config``, with the study's suggestion and the setting it gives.

        If ``config`` has a string that is not a choice, no value is near: the suggestion is empty, the setting None.
        """
        settings = dict(self.fixed)
        for parameter in self.parameters:
            if parameter.is_active(settings):
                steps = _count_steps(parameter, settings, train_images, max_epochs)
                nearest = parameter.find_nearest(read_setting(config, parameter.name), trial_steps=steps)
                if nearest:
                    settings[parameter.name] = parameter.suggest(optuna.trial.FixedTrial(nearest), trial_steps=steps)
                yield parameter, nearest, settings.get(parameter.name)

    def sample(self, count: int, *, seed: int, train_images: int, max_epochs: int) -> Iterator[dict[str, Any]]:
        """Yield random suggestions, drawn independently of each other."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs the creation of the study at INFO
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for _ in range(count):
            yield self.suggest(study.ask(), train_images=train_images, max_epochs=max_epochs)

    def bounds(self, name: str) -> tuple[float | int, float | int] | None:
        """Return the smallest and largest number that the space itself gives to field ``name``.

        None if the field is neither searched nor fixed, is not a number, or depends on the length of the trial.
        """
        values: Iterable[Any] = (self.fixed.get(name),)
        for parameter in self.parameters:
            if parameter.name == name and not parameter.fraction_of_trial:
                values = parameter.choices or (parameter.low, parameter.high)
        numbers = [value for value in values if isinstance(value, int | float)]
        return (min(numbers), max(numbers)) if numbers else None


def _count_steps(parameter: Parameter, settings: Mapping[str, Any], train_images: int, max_epochs: int) -> int:
    """Return the training steps of a trial, which ``STEP_SIZE`` decides; 0 if ``parameter`` is not relative to them."""
    if not parameter.fraction_of_trial:
        return 0
    sizes = {name: settings[name] for name in STEP_SIZE if name in settings}
    return TrialConfig(max_epochs=max_epochs, **sizes).count_full_steps(train_images)


def load_space(source: str | Path) -> SearchSpace:
    """Read and check a search space: a file, or the name of a bundled one (``mnist_amp``) if no such file exists.

    Raises:
        InputError: one line with the source, the line or key path, the rule and the value.
    """
    source = str(source)
    name = source if source.isprintable() and source else shown(source)
    try:
        text = _read_text(source)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return parse_space(name, text)


def parse_space(source: str, text: str) -> SearchSpace:
    """Check the text of a search space that was read from ``source`` before: a run's files hold the text.

    Raises:
        InputError: one line with the source, the line or key path, the rule and the value.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"{source}: {_TOO_LARGE}")
    try:
        parameters, fixed = read_document(read_yaml(text))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return SearchSpace(source=source, text=text, parameters=parameters, fixed=fixed)


def _read_text(source: str) -> str:
    try:
        with _find_file(source).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InputError(_TOO_LARGE)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"must be UTF-8, got byte 0x{data[error.start]:02x} at position {error.start}") from None


def _find_file(source: str) -> Path:
    path = Path(source)
    if path.exists() and not path.is_dir():
        return path
    bundled = list_bundled()
    if source in bundled:
        return bundled[source]
    if source and path.is_dir():
        raise InputError("is a directory, not a file")
    hint = suggest_name(source, bundled)
    raise InputError(f"is neither a file nor a bundled search space ({', '.join(bundled)}){hint}")


def list_bundled() -> dict[str, Path]:
    """Return the file of each bundled search space, by name."""
    here = Path(__file__).parents[1]
    folder = here / "search_spaces"  # an installed wheel
    if not folder.is_dir():
        folder = here.parent / "search_spaces"  # a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
