import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.engines.served_adapters import TensorDict, digest, tensors_to_bytes
from rlhf_ray.engines.transformers_engine import TransformersEngine, TransformersSettings
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.adapters import adapter_state, attach, peft_config
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.types import AdapterUpdate, Prompt, SampleRequest

NUM_TOKENS = 10
STOP = (7, 11)
REQUESTS = [
    SampleRequest(i, Prompt(str(i), "", tuple(range(20 + i, 24 + 3 * i))), seed=100 + i)
    for i in range(6)
]


class Served:
    """An engine with a random adapter of deviation ``scale``, and the same model beside it."""

    def __init__(
        self,
        base: str,
        rule: SamplingRule | None = None,
        *,
        stop: tuple[int, ...] = STOP,
        stop_conditions: StopConditions | None = None,
    ) -> None:
        self.rule = dataclasses.replace(rule or SamplingRule(), stop_token_ids=stop)
        settings = TransformersSettings(
            base, ModelConfig(), self.rule, stop_conditions or StopConditions(NUM_TOKENS)
        )
        self.engine = TransformersEngine(settings)
        self.model = attach(
            load_causal_lm(base, ModelConfig()), LoraConfig(r=4), "CAUSAL_LM", seed=0, dropout=0.0
        ).eval()
        asyncio.run(self.engine.start())

    def state(self, scale: float, seed: int = 0) -> TensorDict:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(tensor.shape, generator=generator) * scale
            for name, tensor in adapter_state(self.model).items()
        }

    def serve(self, state: TensorDict, version: int = 1):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                key = name.replace(".default", "")
                if key in state:
                    parameter.copy_(state[key])
        update = AdapterUpdate(
            version, digest(state), peft_config(self.model), tensors_to_bytes(state)
        )
        return asyncio.run(self.engine.serve(update))

    def sample(self, requests: list[SampleRequest]) -> list[Sampled]:
        return asyncio.run(self.engine.sample(requests))

    @torch.no_grad()
    def logprobs(self, prompt: tuple[int, ...], tokens: np.ndarray) -> np.ndarray:
        """[T] of a plain forward over one unpadded row."""
        ids = torch.tensor([[*prompt, *tokens.tolist()]])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        return (
            self.rule.logits(logits, steps_BT=torch.arange(len(tokens)))
            .log_softmax(-1)
            .gather(1, ids[0, len(prompt) :, None])[:, 0]
            .numpy()
        )


@pytest.fixture(scope="module")
def served(base: str) -> Served:
    """Serves an adapter that matters."""
    served = Served(base)
    served.serve(served.state(0.3))
    return served


@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(),
        SamplingRule(0.6),
        SamplingRule(top_k=4),
        SamplingRule(0.6, 40, 0.5),
        SamplingRule(min_tokens=4),
        SamplingRule(0.6, 40, 0.9, min_tokens=NUM_TOKENS),
    ],
)
def test_logprobs_are_those_of_a_plain_forward(base: str, rule: SamplingRule) -> None:
    served = Served(base, rule)
    served.serve(served.state(0.3))
    for request, result in zip(REQUESTS, served.sample(REQUESTS), strict=True):
        expected = served.logprobs(request.prompt.token_ids, result.token_ids)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)
        assert result.logprobs.dtype == np.float32
        assert result.token_ids.dtype == np.int64


def test_seeds_reproduce_and_batches_change_nothing(served: Served) -> None:
    together = served.sample(REQUESTS)
    reversed_ = served.sample(REQUESTS[::-1])[::-1]
    alone = [served.sample([request])[0] for request in REQUESTS]
    for one, other, single in zip(together, reversed_, alone, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() == single.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, single.logprobs, atol=1e-5)
    assert len({tuple(result.token_ids) for result in together}) > 1


def test_another_seed_gives_another_response(served: Served) -> None:
    prompt = REQUESTS[0].prompt
    results = served.sample([SampleRequest(i, prompt, seed=i) for i in range(8)])
    assert len({tuple(result.token_ids) for result in results}) == 8


def test_tokens_are_drawn_as_often_as_their_probability_says(base: str) -> None:
    served = Served(base, SamplingRule(0.1))
    served.serve(served.state(0.8))
    prompt = REQUESTS[0].prompt
    results = served.sample([SampleRequest(i, prompt, seed=i) for i in range(1500)])
    firsts = np.array([result.token_ids[0] for result in results])
    with torch.no_grad():
        logits_V = served.model(torch.tensor([prompt.token_ids])).logits[0, -1] / 0.1
    probs_V = logits_V.softmax(-1).numpy()
    for token in np.argsort(-probs_V)[:3]:
        p = float(probs_V[token])
        assert p > 0.01, "the test needs tokens that are drawn often"
        # Four standard deviations of a share of 1500.
        assert np.mean(firsts == token) == pytest.approx(p, abs=4 * (p * (1 - p) / 1500) ** 0.5)


def test_only_the_likeliest_tokens_are_drawn(base: str) -> None:
    served = Served(base, SamplingRule(top_k=3))
    served.serve(served.state(0.3))
    prompt = REQUESTS[0].prompt
    results = served.sample([SampleRequest(i, prompt, seed=i) for i in range(200)])
    with torch.no_grad():
        logits_V = served.model(torch.tensor([prompt.token_ids])).logits[0, -1]
    assert {result.token_ids[0] for result in results} == set(logits_V.topk(3).indices.tolist())


def test_stop_tokens_end_a_response_and_belong_to_it(base: str) -> None:
    """Every token of half the vocabulary is a stop token: most responses end soon."""
    stop = tuple(range(0, 300, 2))
    served = Served(base, stop=stop)
    served.serve(served.state(0.3))
    results = served.sample([SampleRequest(i, REQUESTS[0].prompt, seed=i) for i in range(64)])
    for result in results:
        stops = [token in stop for token in result.token_ids]
        assert not any(stops[:-1])
        assert result.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(stops) == NUM_TOKENS
        assert len(result.logprobs) == len(stops)
    assert {len(result.token_ids) for result in results} > {1, 2, 3}


def many(count: int) -> list[SampleRequest]:
    """Requests that differ by their seed alone."""
    return [SampleRequest(i, REQUESTS[0].prompt, seed=i) for i in range(count)]


def test_no_stop_token_comes_before_its_time(base: str) -> None:
    """Half the vocabulary are stop tokens, which would end half of the responses at once."""
    stop = tuple(range(0, 300, 2))
    served = Served(base, SamplingRule(min_tokens=4), stop=stop)
    served.serve(served.state(0.3))
    results = served.sample(many(64))
    assert all(token not in stop for result in results for token in result.token_ids[:4])
    assert {len(result.token_ids) for result in results} > {5, 6, 7}
    assert all(len(result.token_ids) > 4 for result in results)


def test_each_response_has_a_limit_of_its_own_and_no_more_than_that(base: str) -> None:
    stop_conditions = StopConditions(NUM_TOKENS, limits=(3, 8))
    served = Served(base, stop=(), stop_conditions=stop_conditions)
    served.serve(served.state(0.3))
    results = served.sample(many(40))
    lengths = [len(result.token_ids) for result in results]
    assert lengths == [stop_conditions.limit(seed) for seed in range(40)]
    assert set(lengths) == {3, 4, 5, 6, 7}
    assert {result.finish_reason for result in results} == {"length"}
    (alone,) = served.sample(many(40)[-1:])
    assert alone.token_ids.tolist() == results[-1].token_ids.tolist()


def test_without_stop_tokens_an_end_is_a_token_like_others(base: str) -> None:
    whole, stopping = Served(base, stop=()), Served(base, stop=tuple(range(0, 300, 2)))
    for served in (whole, stopping):
        served.serve(served.state(0.3))
    pairs = zip(whole.sample(many(16)), stopping.sample(many(16)), strict=True)
    for result, cut in pairs:
        length = len(cut.token_ids)
        assert len(result.token_ids) == NUM_TOKENS
        assert result.finish_reason == "length"
        assert result.token_ids[:length].tolist() == cut.token_ids.tolist()
        np.testing.assert_allclose(result.logprobs[:length], cut.logprobs, atol=1e-6)


def test_a_stop_string_ends_a_response_and_stays_in_it(base: str) -> None:
    stop_conditions = StopConditions(NUM_TOKENS, strings=("e", "list"))
    whole = Served(base, stop=())
    served = Served(base, SamplingRule(min_tokens=2), stop=(), stop_conditions=stop_conditions)
    for engine in (whole, served):
        engine.serve(engine.state(0.3))
    spell = load_tokenizer(base).decode
    reasons = set()
    for result, uncut in zip(served.sample(many(64)), whole.sample(many(64)), strict=True):
        length = len(result.token_ids)
        assert uncut.token_ids[:length].tolist() == result.token_ids.tolist()
        np.testing.assert_allclose(uncut.logprobs[:length], result.logprobs, atol=1e-6)
        late = [spell(result.token_ids[2:end].tolist()) for end in (length - 1, length)]
        assert not any("e" in text or "list" in text for text in late[:1])
        completed = "e" in late[1] or "list" in late[1]
        assert result.finish_reason == ("stop" if completed else "length")
        assert completed or length == NUM_TOKENS
        reasons.add(result.finish_reason)
    assert reasons == {"stop", "length"}


def test_the_adapter_is_read_back_from_the_model(base: str) -> None:
    served = Served(base)
    state = served.state(0.3)
    told = served.serve(state, version=4)
    assert (told.version, told.digest, told.num_modules) == (4, digest(state), 7)
    assert told.caches_cleared
    other = served.state(0.3, seed=1)
    first = served.sample(REQUESTS)
    assert served.serve(other, version=5).digest == digest(other) != digest(state)
    second = served.sample(REQUESTS)
    assert any(
        a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, second, strict=True)
    )


def test_a_zero_adapter_is_the_base(base: str) -> None:
    served = Served(base)
    zero = {name: tensor * 0 for name, tensor in served.state(1.0).items()}
    served.serve(zero)
    (result,) = served.sample(REQUESTS[:1])
    with torch.no_grad(), served.model.disable_adapter():
        expected = served.logprobs(REQUESTS[0].prompt.token_ids, result.token_ids)
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)


def test_sampling_before_an_adapter_is_refused(base: str) -> None:
    with pytest.raises(WeightSyncError, match="must serve an adapter before it samples"):
        Served(base).sample(REQUESTS)


def test_an_adapter_of_a_bfloat16_learner_is_read_back_as_it_was_sent(base: str) -> None:
    served = Served(base)
    state = {name: tensor.bfloat16() for name, tensor in served.state(scale=0.1).items()}
    assert served.serve(state).digest == digest(state)
