import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.logprobs import SamplingRule, entropy, token_logprobs


def test_token_logprobs_by_hand() -> None:
    # Position 0: logits are log(1), log(3), so p = 1/4, 3/4. Position 1: uniform over two.
    logits_BTV = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]])
    logprobs_BT = token_logprobs(logits_BTV, torch.tensor([[1, 0]]))
    torch.testing.assert_close(logprobs_BT, torch.tensor([[math.log(0.75), math.log(0.5)]]))


def test_temperature_divides_the_logits() -> None:
    # At temperature 2, log(9) becomes log(3): p = 1/4, 3/4. At .5, log(3) becomes log(9): 9/10.
    tokens_BT = torch.tensor([[1]])
    hot = token_logprobs(torch.tensor([[[0.0, math.log(9)]]]), tokens_BT, temperature=2.0)
    cold = token_logprobs(torch.tensor([[[0.0, math.log(3)]]]), tokens_BT, temperature=0.5)
    assert hot.item() == pytest.approx(math.log(3 / 4), abs=1e-6)
    assert cold.item() == pytest.approx(math.log(9 / 10), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.3, 1.0, 1.7]))
def test_token_logprobs_equal_a_full_log_softmax(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = 20 * torch.randn(2, 3, 7, generator=generator)
    tokens_BT = torch.randint(7, (2, 3), generator=generator)
    full_BTV = torch.log_softmax(logits_BTV.double() / temperature, dim=-1)
    expected_BT = full_BTV.gather(-1, tokens_BT[..., None])[..., 0].float()
    logprobs_BT = token_logprobs(logits_BTV, tokens_BT, temperature)
    torch.testing.assert_close(logprobs_BT, expected_BT, rtol=1e-5, atol=1e-4)


def test_gradient_is_one_hot_minus_probability_over_temperature() -> None:
    logits_BTV = torch.tensor([[[0.0, math.log(9)]]], requires_grad=True)
    token_logprobs(logits_BTV, torch.tensor([[0]]), temperature=2.0).sum().backward()
    # p = (1/4, 3/4) at temperature 2: (1 - 1/4, 0 - 3/4) / 2.
    torch.testing.assert_close(logits_BTV.grad, torch.tensor([[[0.375, -0.375]]]))


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    logits_BTV = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens_BT = torch.zeros(2, 3, dtype=torch.int64)
    logprobs_BT = token_logprobs(logits_BTV, tokens_BT)
    assert logprobs_BT.dtype == torch.float32
    torch.testing.assert_close(logprobs_BT, token_logprobs(logits_BTV.float(), tokens_BT))
    assert entropy(logits_BTV).dtype == torch.float32


def test_entropy_golden() -> None:
    # Uniform over 4 is log 4; (1, 2, 3, 4) is .9475; a certain token has none.
    logits_BTV = torch.tensor([[[0.0, 0, 0, 0], [1.0, 2, 3, 4], [0.0, 0, 0, 200]]])
    torch.testing.assert_close(
        entropy(logits_BTV), torch.tensor([[1.386294, 0.9475, 0.0]]), rtol=0, atol=5e-5
    )


def test_entropy_scales_with_temperature() -> None:
    # At temperature 2 the logits (2, 4, 6, 8) are (1, 2, 3, 4).
    hot = entropy(torch.tensor([[[2.0, 4, 6, 8]]]), temperature=2.0)
    assert hot.item() == pytest.approx(0.9475, abs=5e-5)


def test_forbidden_tokens_add_no_entropy_and_no_nan_gradient() -> None:
    logits_BTV = torch.tensor([[[1.0, 2.0, -torch.inf]]], requires_grad=True)
    value = entropy(logits_BTV)
    torch.testing.assert_close(value.detach(), entropy(torch.tensor([[[1.0, 2.0]]])))
    value.sum().backward()
    assert logits_BTV.grad is not None
    assert logits_BTV.grad.isfinite().all()


def test_entropy_gradient_matches_the_textbook_form() -> None:
    logits = torch.tensor([[[1.0, -2.0, 0.5]]], requires_grad=True)
    entropy(logits).sum().backward()
    # dH/dz_v = -p_v (log p_v + H)
    logp = torch.log_softmax(logits.detach(), -1)
    expected = -logp.exp() * (logp + entropy(logits.detach())[..., None])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    logits_BTV = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        token_logprobs(logits_BTV, torch.zeros(1, 1, dtype=torch.int64), temperature)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        entropy(logits_BTV, temperature)


PROBS = (0.15, 0.5, 0.05, 0.3)
LOGITS = torch.tensor([PROBS]).log() + 7  # a constant shifts nothing


def probabilities(rule: SamplingRule, token: int | None = None) -> list[float]:
    tokens = None if token is None else torch.tensor([token])
    return rule.logits(LOGITS, tokens).softmax(-1)[0].tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, PROBS),
        ({"top_k": 4}, PROBS),
        ({"top_k": 100}, PROBS),
        ({"top_k": 2}, (0, 0.625, 0, 0.375)),  # of .5 and .3
        # The likeliest that hold the share: .5 alone is short of .6, .5 and .3 are not.
        ({"top_p": 0.6}, (0, 0.625, 0, 0.375)),
        ({"top_p": 0.4}, (0, 1, 0, 0)),
        ({"top_p": 1e-6}, (0, 1, 0, 0)),  # one stays
        ({"top_p": 0.84}, (3 / 19, 10 / 19, 0, 6 / 19)),
        # Of the three likeliest, which hold .95, two hold .8 / .95 = .842.
        ({"top_k": 3, "top_p": 0.84}, (0, 0.625, 0, 0.375)),
    ],
)
def test_only_the_likeliest_are_drawn(rule: dict[str, float], expected: tuple[float, ...]) -> None:
    found = probabilities(SamplingRule(**rule))  # type: ignore[arg-type]
    assert found == pytest.approx(expected, abs=1e-6)
    assert [p == 0 for p in found] == [p == 0 for p in expected]


def test_the_temperature_comes_first() -> None:
    # At temperature 1/2 probabilities are squared: .25 of .365 is more than .6.
    assert probabilities(SamplingRule(temperature=0.5, top_p=0.6)) == [0, 1, 0, 0]
    squares = [p * p / 0.365 for p in PROBS]
    assert probabilities(SamplingRule(temperature=0.5)) == pytest.approx(squares)


def test_a_token_that_was_drawn_is_kept() -> None:
    rule = SamplingRule(top_k=2)
    assert probabilities(rule, token=1) == pytest.approx([0, 0.625, 0, 0.375])
    assert probabilities(rule, token=0) == pytest.approx([3 / 19, 10 / 19, 0, 6 / 19])


def test_ties_with_the_last_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    kept = SamplingRule(top_k=2).logits(logits) > -torch.inf
    assert kept.tolist() == [[True, True, True, False]]


def test_positions_do_not_mix() -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(15).view(3, 5) % 11
    rule = SamplingRule(temperature=0.7, top_k=6, top_p=0.8)
    whole = rule.logits(logits, tokens)
    for b in range(3):
        for t in range(5):
            alone = rule.logits(logits[b, t][None], tokens[b, t][None])
            assert torch.equal(whole[b, t], alone[0])


def test_gradients_reach_what_may_be_drawn_alone() -> None:
    logits = LOGITS.clone().requires_grad_()
    token = torch.tensor([3])
    rule = SamplingRule(top_k=2)
    logprob = token_logprobs(rule.logits(logits, token), token)
    assert logprob.item() == pytest.approx(math.log(0.375))
    logprob.sum().backward()
    # d log p_3 / d z = 1[3] - p over the kept ones.
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0, -0.625, 0, 0.625])


def test_entropy_and_its_gradient_are_of_the_truncated_distribution() -> None:
    def of(logits: Tensor) -> Tensor:
        return entropy(SamplingRule(top_k=2).logits(logits)).sum()

    logits = LOGITS.clone().requires_grad_()
    value = of(logits)
    assert value.item() == pytest.approx(-0.625 * math.log(0.625) - 0.375 * math.log(0.375))
    value.backward()
    # dH / dz_v = -p_v (log p_v + H)
    expected = [0.0, -0.625 * (math.log(0.625) + value.item()), 0.0]
    expected.append(-0.375 * (math.log(0.375) + value.item()))
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_smaller_share_keeps_fewer() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(1))
    kept = [SamplingRule(top_p=p).logits(logits) > -torch.inf for p in (1.0, 0.9, 0.5, 0.1)]
    for larger, smaller in pairwise(kept):
        assert bool((smaller <= larger).all())
        assert int(smaller.sum()) < int(larger.sum())
    # The kept ones hold the share, and without the least of them do not.
    for rows, share in zip(kept[1:], (0.9, 0.5, 0.1), strict=True):
        probs = logits.softmax(-1).where(rows, torch.tensor(0.0))
        least = probs.where(rows, torch.tensor(2.0)).min(-1).values
        assert bool((probs.sum(-1) >= share - 1e-6).all())
        assert bool((probs.sum(-1) - least < share + 1e-6).all())


STOPS = (1, 3)
EARLY = SamplingRule(min_tokens=2, stop_token_ids=STOPS)
STEPS = torch.arange(3)


def test_stop_tokens_are_not_drawn_before_their_time() -> None:
    logits = LOGITS.expand(3, -1)
    first, second, third = EARLY.logits(logits, steps_BT=STEPS).softmax(-1).tolist()
    assert first == second == pytest.approx([0.75, 0, 0.25, 0])  # .15 and .05 of .2
    assert third == pytest.approx(PROBS)


def test_stop_tokens_go_before_the_likeliest_are_chosen() -> None:
    rule = SamplingRule(top_k=3, top_p=0.7, min_tokens=1, stop_token_ids=(1,))
    # Without the first, .3, .15 and .05 are the three likeliest: .6, .3, .1; two hold .7.
    found = rule.logits(LOGITS, steps_BT=torch.tensor([0])).softmax(-1)[0].tolist()
    assert found == pytest.approx([1 / 3, 0, 0, 2 / 3])


def test_an_early_stop_token_was_drawn_by_nobody() -> None:
    rule = SamplingRule(top_k=2, min_tokens=2, stop_token_ids=STOPS)
    tokens = torch.tensor([1, 0, 1])
    logits = rule.logits(LOGITS.expand(3, -1), tokens, STEPS)
    early, other, late = token_logprobs(logits, tokens).tolist()
    assert early == -math.inf
    assert math.isfinite(other)
    assert math.isfinite(late)


def test_the_place_of_a_token_must_be_known() -> None:
    with pytest.raises(ValueError, match="min_tokens 2 needs the place of each token"):
        EARLY.logits(LOGITS)


@pytest.mark.parametrize("others", [(0.5, 0.3, 0.1), (0.1, 0.7, 0.1)])
def test_suppressed_ends_bias_the_kl_unless_they_are_corrected(others: tuple[float, ...]) -> None:
    """The reference ends with probability .1, the policy with .5 (recipe, section 3)."""
    ref = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    policy = torch.tensor([[*(p * 0.5 / 0.9 for p in others), 0.5]])
    rule = SamplingRule(min_tokens=1, stop_token_ids=(3,))
    place = torch.zeros(1, dtype=torch.int64)
    own, theirs = (rule.logits(p.log(), steps_BT=place).log_softmax(-1) for p in (policy, ref))
    drawn = own.exp()
    k1 = kl_estimate(own, theirs, "k1")
    corrected = float((drawn * torch.where(drawn > 0, k1, torch.zeros(()))).sum())
    exact = sum(p / 0.9 * math.log(p / q) for p, q in zip(others, (0.5, 0.3, 0.1), strict=True))
    assert corrected == pytest.approx(exact, abs=1e-6)
    assert corrected >= -1e-6
    uncorrected = float((drawn * kl_estimate(policy.log(), ref.log(), "k1")).sum())
    assert uncorrected == pytest.approx(exact + math.log(0.5 / 0.9), abs=1e-6)
    if others == (0.5, 0.3, 0.1):
        assert uncorrected == pytest.approx(-0.5878, abs=1e-4)


@pytest.mark.parametrize(
    "rule",
    [{"min_tokens": -1}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_what_cannot_be_drawn_from_is_refused(rule: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no way to draw tokens"):
        SamplingRule(**rule)  # type: ignore[arg-type]
