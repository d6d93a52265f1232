import pytest

from tune_amp.trial.config import CURRICULA
from tune_amp.trial.curricula import PACING, count_drawn_images, curriculum_fraction


@pytest.mark.parametrize(
    ("curriculum", "max_epochs", "expected"),
    [
        ("linear", 1, [1]),
        ("linear", 2, [0.5, 1]),
        ("linear", 3, [0.5, 1, 1]),
        ("linear", 4, [0.5, 0.75, 1, 1]),
        ("linear", 5, [0.5, 0.75, 1, 1, 1]),
        ("linear", 10, [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1]),
        ("root", 1, [1]),
        ("root", 3, [0.5, 1, 1]),
        ("root", 4, [0.5, 0.625**0.5, 1, 1]),
        ("root", 6, [0.5, 0.5**0.5, 0.75**0.5, 1, 1, 1]),
        ("step", 1, [1]),
        ("step", 2, [0.5, 1]),
        ("step", 5, [0.5, 0.5, 1, 1, 1]),
        ("step", 8, [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1]),
        ("none", 4, [1, 1, 1, 1]),
    ],
)
def test_curricula_grow_from_a_half_at_their_pace_to_all_for_the_last_half(
    curriculum: str, max_epochs: int, expected: list[float]
) -> None:
    fractions = [curriculum_fraction(curriculum, epoch, max_epochs) for epoch in range(max_epochs)]
    assert fractions == pytest.approx(expected)


def test_every_curriculum_that_can_be_asked_for_has_its_pace() -> None:
    assert ("none", *PACING) == CURRICULA


def test_root_is_ahead_of_linear_and_step_behind_it() -> None:
    for epoch in range(1, 10):
        step, linear, root = (curriculum_fraction(name, epoch, 20) for name in ("step", "linear", "root"))
        assert step < linear < root < 1


def test_an_epoch_draws_from_a_batch_at_least_and_from_no_more_than_there_are() -> None:
    def count(**sizes: int) -> list[int]:
        return [count_drawn_images("linear", epoch, 4, **sizes) for epoch in range(4)]

    assert count(batch_size=1, train_images=23) == [12, 18, 23, 23]
    assert count(batch_size=15, train_images=23) == [15, 18, 23, 23]
    assert count(batch_size=24, train_images=23) == [23, 23, 23, 23]
