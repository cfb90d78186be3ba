import math

import numpy as np

from rlhf_ray.report.activity import phase_colours
from rlhf_ray.report.plots import Curve, curves, smooth


def test_smoothing_is_a_centred_mean_that_shrinks_at_the_ends_and_skips_gaps():
    # Half-width 1 (fewer than 40 values): (1+2)/2, (1+2+6)/3, (2+6)/2 without the gap, 6, nan.
    values = [1.0, 2.0, 6.0, math.nan, math.nan, math.nan]
    expected = [1.5, 3.0, 4.0, 6.0, math.nan, math.nan]
    np.testing.assert_allclose(smooth(values), expected)


def test_colours_go_to_the_longest_phases_and_the_rest_share_one():
    totals = {"a": {f"phase{i}": 10.0 - i for i in range(9)}, "b": {"phase8": 100.0}}
    colours = phase_colours(totals)
    assert list(colours) == ["phase8", *(f"phase{i}" for i in range(6)), "other"]
    assert len(set(colours.values())) == 8


def test_a_chart_takes_its_colours_from_the_page_and_its_text_stays_text():
    svg = curves("Reward", [Curve("rollouts", range(9), range(9))], "iteration")
    assert "var(--c1)" in svg
    assert "#0" not in svg.replace('href="#', "").replace("url(#", "")
    assert ">iteration</text>" in svg


def test_the_same_data_draws_the_same_bytes():
    lines = [Curve("rollouts", range(9), range(9))]
    assert curves("Reward", lines, "iteration") == curves("Reward", lines, "iteration")


def test_a_dashed_line_stands_where_the_config_was_changed() -> None:
    lines = [Curve("rollouts", range(9), range(9))]
    plain, marked = (curves("Reward", lines, "iteration", marks) for marks in ((), (3, 5)))
    assert marked.count("stroke-dasharray") == plain.count("stroke-dasharray") + 2
