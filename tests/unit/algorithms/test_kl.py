import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.kl import KLKind, kl_estimate
from rlhf_ray.algorithms.logprobs import token_logprobs
from rlhf_ray.algorithms.whitening import masked_mean

# Row 1 of the golden batch: d = lp - ref = -1+1.1, -2+1.5, -.5+.9, -3+2.5. Row 2: 0, -.2, .3, pad.
GOLDEN = {
    "k1": [0.1, -0.5, 0.4, -0.5],
    "k2": [0.005, 0.125, 0.08, 0.125],
    "k3": [0.004837, 0.148721, 0.070320, 0.148721],
}


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_golden(golden: Any, kind: KLKind) -> None:
    kl_BT = kl_estimate(golden.logprobs_BT, golden.ref_logprobs_BT, kind)
    torch.testing.assert_close(kl_BT[0], torch.tensor(GOLDEN[kind]), rtol=0, atol=1e-6)


def test_second_golden(second_golden: Any) -> None:
    # d = .2, -.1, -.5 | .2, -.2: k2 = (.04 + .01 + .25 + .04 + .04) / 2 / 5 = .038
    pair = second_golden.logprobs_BT, second_golden.ref_logprobs_BT
    k2 = masked_mean(kl_estimate(*pair, "k2"), second_golden.mask_BT)
    k3 = masked_mean(kl_estimate(*pair, "k3"), second_golden.mask_BT)
    assert k2.item() == pytest.approx(0.038, abs=1e-6)
    assert k3.item() == pytest.approx(0.042551, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31))
def test_k1_and_k3_are_unbiased_and_k3_never_negative(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, ref = torch.log_softmax(torch.randn(2, 6, generator=generator), dim=-1)
    exact = (policy.exp() * (policy - ref)).sum()
    for kind in ("k1", "k3"):
        mean = (policy.exp() * kl_estimate(policy, ref, kind)).sum()
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-6)
    assert (kl_estimate(policy, ref, "k3") >= 0).all()


def test_k3_keeps_its_digits_where_the_models_are_close() -> None:
    # e^-d - 1 + d = d^2/2 - d^3/6 + ...; in naive fp32 it would be 0 or 6e-8 for d = 1e-4.
    k3 = kl_estimate(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    assert k3.item() == pytest.approx(5e-9, rel=0.01)


def test_suppressed_eos_makes_k1_negative_in_closed_form() -> None:
    # Token 0 is EOS: policy .5, reference .1; the other two share the rest 3:1 in both models.
    # Any other token: log(.5 q) - log(.9 q) = log(.5 / .9), so forbidding EOS gives just that.
    policy = torch.tensor([0.5, 0.375, 0.125]).log()
    ref = torch.tensor([0.1, 0.675, 0.225]).log()
    tokens_BT = torch.tensor([[0, 1, 2]])
    k1_BT = kl_estimate(
        token_logprobs(policy.expand(1, 3, 3), tokens_BT),
        token_logprobs(ref.expand(1, 3, 3), tokens_BT),
        "k1",
    )
    suppressed = torch.softmax(
        policy.masked_fill(torch.tensor([True, False, False]), -torch.inf), 0
    )
    forced_mean = (suppressed * k1_BT[0]).sum().item()
    assert forced_mean == pytest.approx(math.log(0.5 / 0.9), abs=1e-6)
    assert forced_mean == pytest.approx(-0.5878, abs=1e-4)
    # Honest sampling of the same models: .5 log 5 + .5 log(5/9), never negative.
    honest_mean = (policy.exp() * k1_BT[0]).sum().item()
    assert honest_mean == pytest.approx(0.5 * math.log(5) + 0.5 * math.log(5 / 9), abs=1e-6)


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3, got 'k4'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")  # pyright: ignore[reportArgumentType]
