"""Random numbers of a run: seeded alike in three libraries, continued where they were left, and kept from others."""

import random

import numpy as np
import pytest
import torch

from tune_amp.training.generators import Generators, keep_generators, seed_generators

CPU = torch.device("cpu")


def draw() -> list[float]:
    """A number of every library, and of those that come in pairs the first: the second waits in the state."""
    drawn = random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(()).item()  # noqa: NPY002
    return list(drawn)


def test_a_seed_gives_the_same_numbers_and_another_seed_others_in_every_library() -> None:
    with keep_generators(CPU):
        seed_generators(5)
        first = draw()
        seed_generators(5)
        assert draw() == first
        seed_generators(6)
        assert all(a != b for a, b in zip(draw(), first, strict=True))
        seed_generators(2**63 - 1)  # the largest of a trial: NumPy takes 32 bits


def test_generators_in_turn_give_what_each_gives_alone() -> None:
    alone = Generators(3, CPU)
    with alone.in_use():
        expected = [draw(), draw()]
    mine, other = Generators(3, CPU), Generators(4, CPU)
    found = []
    for _ in range(2):
        with mine.in_use():
            found.append(draw())
        with other.in_use():
            draw()
        draw()
    assert found == expected


def test_generators_of_the_process_are_as_they_were_after_an_error_too() -> None:
    with keep_generators(CPU):
        seed_generators(1)
        expected = draw()
        seed_generators(1)
        generators = Generators(2, CPU)

        def fail() -> None:
            with generators.in_use():
                draw()
                raise ValueError("within")

        with pytest.raises(ValueError, match="within"):
            fail()
        assert draw() == expected
