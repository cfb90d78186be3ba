import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.algorithms.experience import (
    Assembler,
    Collected,
    Experience,
    pad,
    response_logits,
)
from rlhf_ray.algorithms.logprobs import token_logprobs


def experience_of(prompts: list[list[int]], responses: list[list[int]]) -> Experience:
    """Every float field holds the response's own tokens plus a constant, so rows are traceable."""
    sequences_BS, attention_BS = pad(
        [torch.tensor(p + r, dtype=torch.int64) for p, r in zip(prompts, responses, strict=True)]
    )
    responses_BT, mask_BT = pad([torch.tensor(r, dtype=torch.int64) for r in responses])
    floats_BT = responses_BT.float()
    return Experience(
        sequences_BS=sequences_BS,
        attention_BS=attention_BS,
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts]),
        responses_BT=responses_BT,
        mask_BT=mask_BT,
        rollout_logprobs_BT=floats_BT + 0.1,
        old_logprobs_BT=floats_BT + 0.2,
        ref_logprobs_BT=floats_BT + 0.3,
        values_BT=floats_BT + 0.4,
        advantages_BT=floats_BT + 0.5,
        returns_BT=floats_BT + 0.6,
    )


def test_pad_by_hand() -> None:
    tensor_BT, mask_BT = pad([np.array([1, 2, 3], np.int32), torch.tensor([4])], fill=-1)
    assert torch.equal(tensor_BT, torch.tensor([[1, 2, 3], [4, -1, -1]]))
    assert torch.equal(mask_BT, torch.tensor([[True, True, True], [True, False, False]]))
    assert tensor_BT.dtype == torch.int64


def test_pad_keeps_kinds_apart() -> None:
    for dtype in (np.float64, np.float16):
        tensor_BT, _ = pad([np.array([0.5, 1.5], dtype), np.array([2.5], dtype)])
        assert tensor_BT.dtype == torch.float32
        assert tensor_BT.tolist() == [[0.5, 1.5], [2.5, 0.0]]
    # An empty numpy array is float64 by default; beside token ids it must not decide.
    tensor_BT, mask_BT = pad([np.array([]), np.array([7, 8])])
    assert tensor_BT.dtype == torch.int64
    assert torch.equal(mask_BT, torch.tensor([[False, False], [True, True]]))


@pytest.mark.filterwarnings("error")
def test_pad_copies_read_only_arrays() -> None:
    row = np.array([1.0, 2.0])
    row.flags.writeable = False
    tensor_BT, _ = pad([row])
    tensor_BT[0, 0] = 9
    assert row.tolist() == [1.0, 2.0]


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.lists(st.integers(-9, 9), max_size=5), min_size=1, max_size=5))
def test_pad_loses_nothing(rows: list[list[int]]) -> None:
    tensor_BT, mask_BT = pad([np.array(row, np.int64) for row in rows], fill=99)
    assert tensor_BT.shape == mask_BT.shape == (len(rows), max(len(row) for row in rows))
    assert [x[m].tolist() for x, m in zip(tensor_BT, mask_BT, strict=True)] == rows
    assert (tensor_BT[~mask_BT] == 99).all()


def test_pad_names_bad_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        pad([])
    with pytest.raises(ValueError, match=r"row 1 has shape \(1, 2\)"):
        pad([torch.tensor([1]), torch.tensor([[1, 2]])])


def test_rows_trims_sequences_and_responses_apart() -> None:
    # Row 0 has the longest sequence, row 1 the longest response.
    experience = experience_of([[1, 2, 3, 4], [5], [6]], [[7, 8], [9, 10, 11], [12]])
    first = experience.rows(torch.tensor([0]))
    assert first.sequences_BS.tolist() == [[1, 2, 3, 4, 7, 8]]
    assert first.responses_BT.tolist() == [[7, 8]]
    rest = experience.rows(slice(1, 3))
    assert rest.sequences_BS.tolist() == [[5, 9, 10, 11], [6, 12, 0, 0]]
    assert rest.attention_BS.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert rest.responses_BT.tolist() == [[9, 10, 11], [12, 0, 0]]
    assert rest.prompt_lengths_B.tolist() == [1, 1]
    assert [experience.num_tokens, first.num_tokens, rest.num_tokens] == [6, 2, 4]


def test_rows_keeps_a_masked_gap_and_cuts_only_the_tail() -> None:
    experience = experience_of([[1]], [[7, 8, 9]])
    gap = dataclasses.replace(experience, mask_BT=torch.tensor([[1, 0, 1]]))
    assert gap.rows(slice(None)).responses_BT.tolist() == [[7, 8, 9]]
    assert gap.num_tokens == 2
    none = dataclasses.replace(experience, mask_BT=torch.tensor([[0, 0, 0]]))
    assert none.rows(slice(None)).responses_BT.tolist() == [[7]]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rows_takes_every_field_along(data: st.DataObject) -> None:
    tokens = st.lists(st.integers(1, 50), min_size=1, max_size=4)
    num_rows = data.draw(st.integers(1, 4))
    prompts = [data.draw(tokens) for _ in range(num_rows)]
    responses = [data.draw(tokens) for _ in range(num_rows)]
    index = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=5))
    selected = experience_of(prompts, responses).rows(torch.tensor(index))
    expected = experience_of([prompts[i] for i in index], [responses[i] for i in index])
    for field in dataclasses.fields(Experience):
        got: Tensor = getattr(selected, field.name)
        assert torch.equal(got, getattr(expected, field.name)), field.name


@pytest.mark.parametrize(("logprob", "kl_coef"), [(-2.0, 0.05), (-2.0, 20.0), (-1e-3, 20.0)])
@pytest.mark.parametrize(("noise", "advantage"), [(1e-6, 0.0), (3e-6, 0.0), (1e-3, 1.5)])
def test_the_kl_of_log_probs_that_agree_up_to_rounding_is_no_advantage(
    noise: float, advantage: float, logprob: float, kl_coef: float
) -> None:
    # Four identical answers, all scored 0; the first one's log-probs differ from the reference's.
    config = {"gamma": 1.0, "lam": 1.0, "group_size": 4, "kl_kind": "k1", "kl_in": "reward"}
    assemble = Assembler(resolve("grpo"), position="last_token", max_tokens=9, **config)  # type: ignore[arg-type]
    ref = [np.full(3, logprob, np.float32) for _ in range(4)]
    old = [ref[0] - np.float32(noise), *ref[1:]]
    tokens = [np.arange(3) for _ in range(4)]
    batch = Collected(tokens, [1] * 4, tokens, old, old, ref, None, torch.zeros(4))
    advantages_BT = assemble(batch, kl_coef=kl_coef).experience.advantages_BT
    assert advantages_BT[0].tolist() == pytest.approx([advantage] * 3, rel=1e-3)


def test_response_logits_by_hand() -> None:
    # logits_BSV[b, s] = (10 b + s, 0): the first entry tells where a row came from.
    # Row 0: prompt of 2, so response token 0 lies at 2 and position 1 predicts it.
    # Row 1: prompt of 4, response of 1; its second and third tokens are padding, clamped to 4.
    logits_BSV = torch.zeros(2, 5, 2)
    logits_BSV[..., 0] = 10 * torch.arange(2)[:, None] + torch.arange(5)
    aligned_BTV = response_logits(logits_BSV, torch.tensor([2, 4]), num_response_tokens=3)
    assert aligned_BTV.shape == (2, 3, 2)
    assert aligned_BTV[..., 0].tolist() == [[1, 2, 3], [13, 14, 14]]


def test_values_of_a_critic_are_aligned_the_same_way() -> None:
    values_BS = torch.arange(10.0).view(2, 5)
    aligned_BT = response_logits(values_BS, torch.tensor([1, 3]), num_response_tokens=2)
    assert aligned_BT.tolist() == [[0, 1], [7, 8]]


def test_logprob_t_is_of_token_t_plus_one() -> None:
    """A model that always bets on (token + 1) is certain of a response that counts upwards."""
    vocabulary = 12
    experience = experience_of([[1, 2], [4, 5, 6]], [[3, 4, 5], [7]])
    following_BS = (experience.sequences_BS + 1) % vocabulary
    logits_BSV = 50.0 * torch.nn.functional.one_hot(following_BS, vocabulary)
    aligned_BTV = response_logits(logits_BSV, experience.prompt_lengths_B, 3)
    logprobs_BT = token_logprobs(aligned_BTV, experience.responses_BT)
    torch.testing.assert_close(logprobs_BT[experience.mask_BT], torch.zeros(4))


def test_response_logits_sends_gradients_to_predicting_positions_alone() -> None:
    logits_BSV = torch.zeros(1, 5, 1, requires_grad=True)
    response_logits(logits_BSV, torch.tensor([2]), num_response_tokens=2).sum().backward()
    assert logits_BSV.grad is not None
    assert logits_BSV.grad.flatten().tolist() == [0, 1, 1, 0, 0]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        response_logits(torch.zeros(2, 3, 1), torch.tensor([1, 0]), 2)
