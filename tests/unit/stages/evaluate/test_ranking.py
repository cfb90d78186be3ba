"""Win rates and Elo against numbers worked by hand."""

import math

import numpy as np
import pytest

from rlhf_ray.stages.evaluate.ranking import (
    ELO_SCALE,
    bradley_terry,
    elo,
    outcomes_of_pairs,
    outcomes_of_scores,
    win_rates,
)


def won(share: float, num: int) -> np.ndarray:
    """Outcomes of two models, of which the second wins the given share of ``num`` prompts."""
    of_second = [1.0] * round(share * num) + [0.0] * (num - round(share * num))
    return outcomes_of_pairs(2, [(1, 0, of_second)])


def test_the_higher_score_wins_ties_are_halves_and_missing_ones_unknown() -> None:
    outcomes = outcomes_of_scores(np.array([[1.0, 2.0, 0.0, np.nan], [2.0, 2.0, -1.0, 1.0]]))
    assert outcomes[1, 0][:3].tolist() == [1.0, 0.5, 0.0]
    assert outcomes[0, 1][:3].tolist() == [0.0, 0.5, 1.0]
    assert np.isnan(outcomes[:, :, 3][0, 1])
    rates = win_rates(outcomes, 100, 0)
    assert rates.value[1, 0] == rates.value[0, 1] == 0.5  # (1 + .5 + 0) / 3


def test_two_hundred_points_are_a_win_probability_of_76_percent() -> None:
    probability = 1 / (1 + np.exp(-200 / ELO_SCALE))
    assert probability == pytest.approx(0.7597, abs=1e-4)  # 1 / (1 + 10 ** -.5)
    found = elo(won(0.76, 50_000), 100, 0)
    assert found.value[0] == 1000
    # 400 log10(.76 / .24) = 200.24; the half win of each side takes .003 off.
    assert found.value[1] == pytest.approx(1200.24, abs=0.01)
    assert found.low[0] == found.high[0] == 1000
    assert found.low[1] < 1200.24 < found.high[1]


def test_strengths_of_three_models_are_recovered_from_their_games() -> None:
    """P(i beats j) = p_i / (p_i + p_j) with p = 1, 2, 4; a likelihood that is met exactly."""
    p = np.array([1.0, 2.0, 4.0])
    wins = 1e9 * p[:, None] / (p[:, None] + p)
    strengths = bradley_terry(wins[None])[0]
    assert np.diff(strengths) == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_a_model_that_always_wins_has_a_finite_rating() -> None:
    found = elo(won(1.0, 100), 100, 0)
    # 400 log10(100.5 / .5)
    assert found.value[1] == pytest.approx(1000 + 921.28, abs=0.01)


def test_identical_models_are_equal_and_half_lies_in_the_interval() -> None:
    """The same texts get the same scores: every prompt is a tie."""
    same = outcomes_of_scores(np.tile(np.random.default_rng(0).normal(size=50), (3, 1)))
    assert elo(same, 100, 0).value.tolist() == [1000.0] * 3
    assert win_rates(same, 100, 0).value[0, 1] == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_two_samples_of_one_model_have_overlapping_intervals(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(2, 400))
    outcomes = outcomes_of_scores(scores)
    rates, ratings = win_rates(outcomes, 1000, 0), elo(outcomes, 1000, 0)
    assert rates.low[1, 0] <= 0.5 <= rates.high[1, 0]
    assert ratings.low[1] <= 1000 <= ratings.high[1]
    # The interval is as wide as a binomial's: 1.96 * sqrt(.25 / 400) on either side.
    assert rates.high[1, 0] - rates.low[1, 0] == pytest.approx(2 * 0.049, abs=0.008)


@pytest.mark.parametrize("num", [20, 50, 200])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.95, 0.99, 0.01])
def test_a_win_rate_lies_in_its_interval_as_often_as_promised(p: float, num: int) -> None:
    """The coverage is exact: of all numbers of wins that n prompts may give, by their chance."""
    covered = covered_elo = 0.0
    log_odds = 1000 + ELO_SCALE * math.log(p / (1 - p))
    for wins in range(num + 1):
        chance = math.comb(num, wins) * p**wins * (1 - p) ** (num - wins)
        if chance < 1e-4:
            continue
        outcomes = won(wins / num, num)
        rates, ratings = win_rates(outcomes, 500, 0), elo(outcomes, 500, 0)
        covered += chance * (rates.low[1, 0] <= p <= rates.high[1, 0])
        covered_elo += chance * (ratings.low[1] <= log_odds <= ratings.high[1])
    assert covered > 0.92
    if num * min(p, 1 - p) >= 0.5:  # else half a win on either side decides the rating
        assert covered_elo > 0.92


def test_a_side_that_won_every_game_may_lose_another() -> None:
    rates = win_rates(won(1.0, 50), 100, 0)
    # Wilson's interval of 50 in 50: n / (n + z^2) to 1.
    assert (rates.low[1, 0], rates.high[1, 0]) == (pytest.approx(50 / 53.8415, abs=1e-5), 1.0)
    assert (rates.low[0, 1], rates.high[0, 1]) == (0.0, pytest.approx(3.8415 / 53.8415, abs=1e-5))
    ratings = elo(won(1.0, 50), 100, 0)
    assert ratings.low[1] < ratings.value[1] - 100
    assert ratings.low[0] == ratings.high[0] == 1000


def test_all_ties_leave_room_for_a_game_that_ends_otherwise() -> None:
    # Wilson: at most 3.8415 / 53.8415 of all games are no ties, all won or all lost.
    half = 3.8415 / 53.8415 / 2
    ties = outcomes_of_pairs(2, [(1, 0, [0.5] * 50)])
    for outcomes in (ties, outcomes_of_scores(np.zeros((2, 50)))):
        rates, ratings = win_rates(outcomes, 100, 0), elo(outcomes, 100, 0)
        assert rates.value[1, 0] == 0.5
        assert rates.low[1, 0] == pytest.approx(0.5 - half, abs=1e-5)
        assert rates.high[1, 0] == pytest.approx(0.5 + half, abs=1e-5)
        assert ratings.low[1] < 1000 - 10
        assert ratings.high[1] > 1000 + 10
        assert ratings.low[0] == ratings.high[0] == 1000


@pytest.mark.parametrize("num", [20, 100])
@pytest.mark.parametrize("decided", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("won_of_these", [0.5, 1.0])
def test_a_win_rate_among_ties_lies_in_its_interval(
    won_of_these: float, decided: float, num: int
) -> None:
    rate = 0.5 + decided * (won_of_these - 0.5)
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        is_decided, is_won = draw.random(num) < decided, draw.random(num) < won_of_these
        games = np.where(is_decided, is_won.astype(float), 0.5)
        rates = win_rates(outcomes_of_pairs(2, [(1, 0, games.tolist())]), 200, 0)
        covered += int(rates.low[1, 0] <= rate <= rates.high[1, 0])
    assert covered > 0.92 * 400


def test_a_rating_against_several_models_has_an_interval_where_one_always_wins() -> None:
    # The second beats both others always; these are even.
    always, even = [1.0] * 40, [1.0, 0.0] * 20
    found = elo(outcomes_of_pairs(3, [(1, 0, always), (1, 2, always), (0, 2, even)]), 200, 0)
    assert found.low[1] < found.value[1] - 100
    assert found.low[2] < 1000 < found.high[2]


def test_a_win_rate_mirrors_that_of_the_other_side() -> None:
    rates = win_rates(outcomes_of_scores(np.random.default_rng(1).normal(size=(3, 30))), 200, 0)
    off = ~np.eye(3, dtype=bool)
    assert rates.value[off] == pytest.approx((1 - rates.value.T)[off])
    assert rates.low[off] == pytest.approx((1 - rates.high.T)[off])


def test_a_pair_without_a_known_game_has_no_win_rate() -> None:
    outcomes = outcomes_of_pairs(3, [(0, 1, [1.0, None]), (0, 2, [None, None]), (1, 2, [0.5, 1])])
    rates = win_rates(outcomes, 100, 0)
    assert rates.value[0, 1] == 1.0
    assert np.isnan([rates.value[0, 2], rates.low[0, 2], rates.high[2, 0]]).all()
    assert np.isfinite(elo(outcomes, 100, 0).value).all()
