"""Win rates and Elo ratings of M models on N prompts, from who won. NumPy alone.

An outcome is 1 for a win, 0 for a loss, a half for a tie, NaN where it is not known. Intervals come
from resampling the prompts (Efron 1979, doi:10.1214/aos/1176344552), the same ones for every model:
models answer the same prompts. Where all games ended alike (one side won every one, or all are
ties), resampling shows nothing else, and the interval follows from Wilson's (1927,
doi:10.2307/2276774).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ELO_SCALE = 400 / np.log(10)
"""Elo points of one unit of log-odds: 400 points are odds of ten to one."""
VIRTUAL_WINS = 0.5
"""Wins added to each side of a pair (Haldane 1956): without them a model that never loses has no
finite rating."""
_Z2 = 1.959964**2
"""Square of the normal quantile of a 95% interval."""
_MOST_STEPS = 10_000
_CONVERGED = 1e-9


@dataclass(frozen=True)
class Estimate:
    """Numbers with the ends of their 95% intervals; arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def outcomes_of_scores(scores_MN: np.ndarray) -> np.ndarray:
    """Return each model's outcome against each other, `_MMN`: the higher score wins.

    Example:
        >>> outcomes_of_scores(np.array([[1.0, 2.0], [0.0, 2.0]]))[0, 1].tolist()
        [1.0, 0.5]
    """
    difference_MMN = scores_MN[:, None] - scores_MN[None]
    return np.where(np.isnan(difference_MMN), np.nan, (np.sign(difference_MMN) + 1) / 2)


def resampled_prompts(num_prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each prompt is drawn in each of R resamples of the same size, `_RN`."""
    picks_RN = np.random.default_rng(seed).integers(0, num_prompts, size=(resamples, num_prompts))
    cells = picks_RN + num_prompts * np.arange(resamples)[:, None]
    drawn = np.bincount(cells.ravel(), minlength=resamples * num_prompts)
    return drawn.reshape(resamples, num_prompts)


def win_rates(outcomes_MMN: np.ndarray, resamples: int, seed: int) -> Estimate:
    """Return each model's mean outcome against each other, `_MM`; NaN where none is known."""
    whole = _rates(*_tallies(outcomes_MMN, np.ones((1, outcomes_MMN.shape[-1]))))[0]
    drawn_RN = resampled_prompts(outcomes_MMN.shape[-1], resamples, seed)
    estimate = _with_interval(whole, _rates(*_tallies(outcomes_MMN, drawn_RN)))
    is_uniform_MM, low_MM, high_MM = _bounds_of_uniform(outcomes_MMN)
    return Estimate(
        whole,
        np.where(is_uniform_MM, low_MM, estimate.low),
        np.where(is_uniform_MM, high_MM, estimate.high),
    )


def elo(
    outcomes_MMN: np.ndarray, resamples: int, seed: int, anchor: int = 0, anchored_at: float = 1000
) -> Estimate:
    """Return the Elo rating of each model, `_M`; the anchor's is fixed, so it has no interval.

    The rating of a model that won, or lost, every game has no bound on that side: its interval ends
    at the estimate there.
    """

    def ratings(wins_RMM: np.ndarray) -> np.ndarray:
        strengths_RM = bradley_terry(wins_RMM)
        return anchored_at + ELO_SCALE * (strengths_RM - strengths_RM[:, anchor, None])

    num_models, num_prompts = outcomes_MMN.shape[1:]
    wins_1MM, games_1MM = _tallies(outcomes_MMN, np.ones((1, num_prompts)))
    drawn_RN = resampled_prompts(num_prompts, resamples, seed)
    estimate = _with_interval(ratings(wins_1MM)[0], ratings(_tallies(outcomes_MMN, drawn_RN)[0]))
    is_uniform_MM, low_MM, high_MM = _bounds_of_uniform(outcomes_MMN)
    for model in range(num_models):
        if model == anchor or not (is_uniform_MM[model] | is_uniform_MM[anchor]).any():
            continue
        # The ratings if the shares of wins, its own and the anchor's, were at their ends.
        ends = []
        for own_MM, anchors_MM in ((low_MM, high_MM), (high_MM, low_MM)):
            wins_MM = wins_1MM[0].copy()
            for side, rates_MM in ((anchor, anchors_MM), (model, own_MM)):
                others = is_uniform_MM[side] & (np.arange(num_models) != side)
                wins_MM[side, others] = (rates_MM * games_1MM[0])[side, others]
                wins_MM[others, side] = games_1MM[0][side, others] - wins_MM[side, others]
            ends.append(ratings(wins_MM[None])[0, model])
        estimate.low[model] = min(estimate.low[model], ends[0])
        estimate.high[model] = max(estimate.high[model], ends[1])
    return estimate


def bradley_terry(wins_RMM: np.ndarray) -> np.ndarray:
    """Return maximum-likelihood strengths of M models in R tables of wins, `_RM`, as log-odds.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley and Terry 1952, doi:10.2307/2334029). The
    mean of s is 0. Solved by the MM algorithm (Hunter 2004, doi:10.1214/aos/1079120141, eq. 3).

    Args:
        wins_RMM: how often the row's model beat the column's; a tie is half a win for both. Each
            side gets `VIRTUAL_WINS` more.
    """
    num_models = wins_RMM.shape[-1]
    virtual_MM = VIRTUAL_WINS * (1 - np.eye(num_models))
    wins_RMM = wins_RMM * (1 - np.eye(num_models)) + virtual_MM
    games_RMM = wins_RMM + wins_RMM.transpose(0, 2, 1)
    total_RM = wins_RMM.sum(2)
    strengths_RM = np.zeros_like(total_RM)
    for _ in range(_MOST_STEPS):
        odds_RM = np.exp(strengths_RM)
        shares_RM = (games_RMM / (odds_RM[:, :, None] + odds_RM[:, None])).sum(2)
        new_RM = np.log(total_RM / shares_RM)
        new_RM -= new_RM.mean(1, keepdims=True)
        change = np.abs(new_RM - strengths_RM).max()
        strengths_RM = new_RM
        if change < _CONVERGED:
            break
    return strengths_RM


def outcomes_of_pairs(
    num_models: int, pairs: Sequence[tuple[int, int, Sequence[float | None]]]
) -> np.ndarray:
    """Arrange outcomes that a judge gave pair by pair as `_MMN`."""
    num_prompts = len(pairs[0][2])
    outcomes_MMN = np.full((num_models, num_models, num_prompts), np.nan)
    for first, second, of_first in pairs:
        outcomes_MMN[first, second] = np.array(of_first, dtype=float)
        outcomes_MMN[second, first] = 1 - outcomes_MMN[first, second]
    return outcomes_MMN


def _tallies(outcomes_MMN: np.ndarray, drawn_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the wins and the known games of each pair in each resample, `_RMM`."""
    num_models, _, num_prompts = outcomes_MMN.shape
    flat = outcomes_MMN.reshape(-1, num_prompts)
    known = ~np.isnan(flat)
    shape = (len(drawn_RN), num_models, num_models)
    wins = drawn_RN @ np.where(known, flat, 0).T
    return wins.reshape(shape), (drawn_RN @ known.T.astype(float)).reshape(shape)


def _rates(wins_RMM: np.ndarray, games_RMM: np.ndarray) -> np.ndarray:
    rates_RMM = np.full_like(wins_RMM, np.nan)
    np.divide(wins_RMM, games_RMM, out=rates_RMM, where=games_RMM > 0)
    return rates_RMM


def _bounds_of_uniform(outcomes_MMN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return in which pairs all known games ended alike, and the bounds of rates, `_MM` each.

    At most z^2 / (n + z^2) of all games end otherwise, by Wilson's interval of none in n; whether
    these are won or lost is not known.
    """
    is_known_MMN = ~np.isnan(outcomes_MMN)
    games_MM = is_known_MMN.sum(-1)
    least_MM = np.min(outcomes_MMN, -1, where=is_known_MMN, initial=1.0)
    most_MM = np.max(outcomes_MMN, -1, where=is_known_MMN, initial=0.0)
    is_uniform_MM = (least_MM == most_MM) & (games_MM > 0) & ~np.eye(len(games_MM), dtype=bool)
    outcome_MM = np.where(is_uniform_MM, least_MM, 0.0)
    others_MM = _Z2 / (games_MM + _Z2)
    low_MM = outcome_MM * (1 - others_MM)
    return is_uniform_MM, low_MM, np.minimum(1.0, low_MM + others_MM)


def _with_interval(value: np.ndarray, resampled: np.ndarray) -> Estimate:
    """Add the 95% percentile interval, over the resamples that know a game of the pair."""
    known = ~np.isnan(value)
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    if known.any():
        low[known], high[known] = np.nanpercentile(resampled[:, known], [2.5, 97.5], axis=0)
    return Estimate(value, low, high)
