"""Builds the Optuna sampler that suggests the settings, and refuses one that does not apply to the search."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.trial import FrozenTrial, TrialState

from tune_amp.space.space import SearchSpace
from tune_amp.trial.config import InputError


class FeasibleGPSampler(GPSampler):
    """GPSampler with one fix: it draws at random until some trial is feasible.

    If all constraints are alike, for example because the first trials all ran out of memory, Optuna's sampler computes
    a probability of zero that any settings are feasible. It divides by it, warns, and takes the study for converged.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next settings, or none, which leaves them to random draws."""
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not any(all(value <= 0 for value in other.constraints.values()) for other in completed):
            return {}
        suggested: dict[str, Any] = super().sample_relative(study, trial, search_space)
        return suggested


def build_sampler(name: str, space: SearchSpace, *, seed: int, num_samples: int) -> BaseSampler:
    """Return one of Optuna's samplers, set up for this space.

    Args:
        name: one of ``SAMPLERS``.
        space: what is searched.
        seed: seed of the sampler, taken modulo 2^32, as samplers accept no other.
        num_samples: trials of the whole search, by which starting phases and populations are sized.

    Raises:
        InputError: the sampler does not apply here; the message says why.
    """
    seed %= 2**32
    with warnings.catch_warnings():
        # Optuna calls options experimental for years (group since 2.8). Our tests cover those that we rely on.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return RandomSampler(seed=seed)
        if name == "gp":
            return _build_gp(space, seed, num_samples)
        if name == "cmaes":
            return _build_cmaes(space, seed)
        if name == "nsga2":
            return _build_nsga2(space, seed, num_samples)
        assert name == "tpe"
        # Multivariate TPE (Falkner et al. 2018, arXiv:1807.01774) models a conditional space group by group;
        # without groups it would sample it parameter by parameter.
        return TPESampler(seed=seed, multivariate=True, group=space.is_conditional, constant_liar=True)


def reseed(sampler: BaseSampler, seed: int, number: int) -> None:
    """Make a sampler's next draws depend only on the seed, the number of the trial and what the study holds.

    Otherwise a search that resumes in a new process would repeat the draws of its beginning, instead of making those
    that it would have made next. ``BaseSampler.reseed_rng`` takes no seed. CMA-ES mixes in Optuna's number of the
    trial, which differs if a trial was submitted again.

    Args:
        sampler: from ``build_sampler``.
        seed: seed of the search.
        number: number of the trial in the search.
    """
    seeds = np.random.SeedSequence((seed % 2**32, number))
    for generator in _list_generators(sampler):
        generator.rng.seed(int(seeds.spawn(1)[0].generate_state(1)[0]))


def _list_generators(sampler: BaseSampler) -> Iterator[LazyRandomState]:
    """Yield a sampler's generators, its random sampler's first, so that all samplers begin with the same draws."""
    parts = vars(sampler).values()
    for part in parts:
        if isinstance(part, BaseSampler):
            yield from _list_generators(part)
    yield from (part for part in parts if isinstance(part, LazyRandomState))


def _build_gp(space: SearchSpace, seed: int, num_samples: int) -> BaseSampler:
    """Return Bayesian optimization with a Gaussian process, for training results, which are noisy.

    It models the parameters that all trials have in common. Optuna would draw the others at random, with a line of
    warning for each, so conditional spaces are refused.
    """
    if space.is_conditional:
        raise InputError(f"--sampler: gp cannot model conditions, got `when` for {_list_conditional(space)}")
    # They warn of how the acquisition function is optimized: without the package greenlet at 0.2 to 0.5 s a suggestion,
    # and close to convergence from fewer starting points. Neither changes what a user could do.
    for module in ("batched_lbfgsb", "optim_mixed"):
        logging.getLogger(f"optuna._gp.{module}").setLevel(logging.ERROR)
    startup = min(10, max(4, num_samples // 4))
    return FeasibleGPSampler(
        seed=seed,
        n_startup_trials=startup,
        deterministic_objective=False,
        warn_independent_sampling=False,  # it would warn of random draws until some trial is feasible
    )


def _build_cmaes(space: SearchSpace, seed: int) -> BaseSampler:
    """Return CMA-ES with margin (Hamano et al. 2022, arXiv:2205.13482), as powers of two are integers of few values.

    Beside CMA-ES, Optuna draws choices, and parameters that some trials lack, at random. Then a generation is ranked by
    what CMA-ES does not see, and half of the search is random, which the user did not ask for. So both are refused.

    Stopped trials count with their last value, by which they rank among the completed ones. Otherwise CMA-ES, which
    needs results of a full generation, would wait for another trial in place of each of them. It ignores constraints,
    but it uses only ranks, so the worst value has the same effect. The study holds its state as a pickle: continue only
    studies of trusted origin.
    """
    if space.is_conditional:
        raise InputError(f"--sampler: cmaes cannot handle conditions, got `when` for {_list_conditional(space)}")
    chosen = [parameter.name for parameter in space.parameters if len(parameter.choices) > 1]
    if chosen:
        raise InputError(f"--sampler: cmaes needs low and high, got choices for {', '.join(chosen)}")
    ranges = [parameter.name for parameter in space.parameters if not parameter.choices]
    if len(ranges) < 2:
        raise InputError(f"--sampler: cmaes needs at least two ranges to search, got {', '.join(ranges) or 'none'}")
    return CmaEsSampler(seed=seed, with_margin=True, consider_pruned_trials=True)


def _build_nsga2(space: SearchSpace, seed: int, num_samples: int) -> BaseSampler:
    """Return NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017), also for one objective.

    On average one setting of a child is drawn afresh: if only one is searched, nothing is inherited. In a conditional
    space, parameters that some trials lack are not inherited either.
    """
    if len(space.parameters) < 2:
        raise InputError(f"--sampler: nsga2 needs at least two parameters to search, got {space.parameters[0].name}")
    # Only from the second generation on has a child parents: with Optuna's default of 50 for the population, a search
    # of 32 trials would be random.
    return NSGAIISampler(population_size=min(50, max(4, num_samples // 4)), seed=seed)


def _list_conditional(space: SearchSpace) -> str:
    return ", ".join(parameter.name for parameter in space.parameters if parameter.when)
