from typing import Any

from rlhf_ray.data.reading.pairing import pairs_by_prompt


def answers(prompt: str = "p") -> list[dict[str, Any]]:
    """Four liked answers A to D and five disliked ones a to e."""
    return [{"prompt": prompt, "completion": text, "label": text < "a"} for text in "AaBbCcDde"]


def pairs(max_pairs: int, seed: int = 0, prompt: str = "p") -> list[str]:
    rows = pairs_by_prompt(answers(prompt), max_pairs, seed)
    return [row["chosen"] + row["rejected"] for row in rows]


EVERY = [one + other for one in "ABCD" for other in "abcde"]


def test_up_to_the_limit_there_is_every_pair_in_order() -> None:
    assert pairs(20) == EVERY
    assert pairs(21) == EVERY


def test_above_the_limit_the_seed_and_the_prompt_fix_the_draw() -> None:
    drawn = pairs(5)
    assert len(set(drawn)) == 5
    assert set(drawn) < set(EVERY)
    assert len({pair[0] for pair in drawn}) > 1
    assert pairs(5) == drawn
    assert pairs(5, seed=1) != drawn
    assert pairs(5, prompt="q") != drawn
    assert len(set(pairs(19))) == 19
