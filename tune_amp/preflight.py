"""Refuses a space, a data set and a model that do not go together, before anything is started."""

from tune_amp.config import InputError, TrialConfig
from tune_amp.data import Dataset
from tune_amp.models import check_model
from tune_amp.options import SearchOptions
from tune_amp.resources import TrialResources
from tune_amp.space import SearchSpace


def check_fit(space: SearchSpace, dataset: Dataset, options: SearchOptions) -> None:
    """Refuse what would make trials fail: a batch larger than the data set, a model that does not fit it.

    Raises:
        InputError: says which.
    """
    bounds = space.bounds("batch_size")
    if bounds is not None and bounds[1] > len(dataset.train):
        raise InputError(
            f"{space.source}: batch_size: must be at most the {len(dataset.train):,} training images of "
            f"{dataset.name}, got {bounds[1]}"
        )
    if len(dataset.train) < TrialConfig().batch_size and bounds is None:
        raise InputError(f"--dataset: {dataset.name} has fewer training images than the default batch_size")
    check_model(options.model, dataset.input_shape, dataset.num_classes)


def check_objectives(options: SearchOptions, resources: TrialResources) -> None:
    """Refuse to search for what cannot be measured.

    Raises:
        InputError: GPU memory, where trials get no GPU.
    """
    if "peak_memory_bytes" in options.objectives and not resources.gpus:
        raise InputError("--objective: peak_memory_bytes is measured on GPUs only, and trials get none here")
