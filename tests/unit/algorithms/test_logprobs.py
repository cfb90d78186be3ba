import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.logprobs import entropy, token_logprobs


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
