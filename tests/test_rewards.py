"""What counts as a match, and what the generator is paid."""

import doctest
import math

import pytest

import rewards
from rewards import INVALID_MASK_REWARD, answerable, caseless_match, exact_match, generator_reward


def test_examples_in_the_docstrings():
    results = doctest.testmod(rewards)
    assert results.attempted >= 8 and results.failed == 0


def test_case_counts_for_the_reward_but_not_for_the_log():
    assert exact_match("paris", "Paris") == 0.0 and caseless_match("paris", "Paris") == 1.0
    assert caseless_match("STRASSE", "Straße") == 1.0
    assert caseless_match("Lyon", "Paris") == 0.0
    assert caseless_match("", ".") == 0.0 and caseless_match(None, "") == 0.0


def test_answerable():
    assert all(map(answerable, ["a", "7", "é", "北", "д", "ह", "ع", "½", '"x"', r"\text{a}", "…a", "_1_"]))
    assert not any(map(answerable, ["", " ", ".", "–", "(...)", '""', "$%&", r"\text{}", "~", "_", "、", "🙂"]))


def test_generator_reward_by_hand():
    by_right_answers = [0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert [generator_reward(right / 8) for right in range(9)] == by_right_answers
    assert generator_reward(0) == generator_reward(1) == INVALID_MASK_REWARD == 0.0


def expected_reward(p: float, group: int) -> float:
    """Sum over the number of right answers, which is binomial."""
    return sum(
        math.comb(group, right) * p**right * (1 - p) ** (group - right) * generator_reward(right / group)
        for right in range(group + 1)
    )


@pytest.mark.parametrize(("group", "best"), [(4, 0.37), (8, 0.26), (16, 0.17)])
def test_generator_reward_is_largest_for_hard_but_solvable_masks(group, best):
    grid = [number / 1000 for number in range(1001)]
    values = [expected_reward(p, group) for p in grid]
    assert values == pytest.approx([(1 - p) - (1 - p) ** group for p in grid])
    argmax = grid[values.index(max(values))]
    assert argmax == pytest.approx(1 - group ** (-1 / (group - 1)), abs=1e-3)
    assert argmax == pytest.approx(best, abs=5e-3)
    assert expected_reward(0.05, 8) == pytest.approx(0.29, abs=5e-3)  # noise is discouraged only weakly
