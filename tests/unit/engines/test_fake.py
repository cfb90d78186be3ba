import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.engines.fake import STOP_TOKEN, VOCAB_SIZE, FakeEngine, adapted_logits
from rlhf_ray.engines.served_adapters import digest, tensors_to_bytes
from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.types import AdapterUpdate, Prompt, SampleRequest

TENSORS = {
    "m.lora_A.weight": torch.tensor([[1.0, 2.0]]),
    "m.lora_B.weight": torch.linspace(-1, 1, VOCAB_SIZE)[:, None],
}
UPDATE = AdapterUpdate(3, digest(TENSORS), {}, tensors_to_bytes(TENSORS))
REQUESTS = [SampleRequest(i, Prompt(str(i), "", (1, 2)), seed=i) for i in range(4)]


def ready(**settings: Any) -> FakeEngine:
    engine = FakeEngine(**settings)
    asyncio.run(engine.start())
    asyncio.run(engine.serve(UPDATE))
    return engine


def test_it_samples_from_the_adapted_distribution_by_seed() -> None:
    engine = ready(rule=SamplingRule(0.5, stop_token_ids=(STOP_TOKEN,)))
    logits_V = (np.sin(np.arange(32)) + 3 * np.linspace(-1, 1, 32)) / 0.5
    np.testing.assert_allclose(adapted_logits(TENSORS), logits_V * 0.5, atol=1e-6)
    logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
    together = asyncio.run(engine.sample(REQUESTS))
    for request, result in zip(REQUESTS, together, strict=True):
        np.testing.assert_allclose(result.logprobs, logprobs_V[result.token_ids], atol=1e-5)
        assert (result.finish_reason == "stop") == (result.token_ids[-1] == STOP_TOKEN)
        (alone,) = asyncio.run(engine.sample([request]))
        assert alone.token_ids.tolist() == result.token_ids.tolist()
    assert engine.calls == {"start": 1, "serve": 1, "sample": 5}


def test_it_ends_responses_as_it_is_told() -> None:
    rule = SamplingRule(min_tokens=3, stop_token_ids=tuple(range(0, 32, 2)))
    stop_conditions = StopConditions(max_tokens=12, strings=("7",), limits=(4, 10))
    engine = ready(rule=rule, stop_conditions=stop_conditions)
    requests = [SampleRequest(i, Prompt(str(i), "", (1, 2)), seed=i) for i in range(60)]
    logits_V = adapted_logits(TENSORS)
    early = np.log(np.exp(logits_V[1::2]).sum())  # odd tokens are no stop tokens
    reasons = set()
    for request, result in zip(requests, asyncio.run(engine.sample(requests)), strict=True):
        tokens, limit = result.token_ids.tolist(), stop_conditions.limit(request.seed)
        assert all(token % 2 for token in tokens[:3])
        np.testing.assert_allclose(result.logprobs[:3], logits_V[tokens[:3]] - early, atol=1e-5)
        ends = [
            place > 2 and (token % 2 == 0 or "7" in str(token))
            for place, token in enumerate(tokens)
        ]
        assert not any(ends[:-1])
        assert result.finish_reason == ("stop" if ends[-1] else "length")
        assert ends[-1] or len(tokens) == limit
        reasons.add((result.finish_reason, tokens[-1] % 2))
    assert reasons == {("stop", 0), ("stop", 1), ("length", 1)}


def test_it_reads_back_what_it_holds() -> None:
    engine = FakeEngine()
    asyncio.run(engine.start())
    served = asyncio.run(engine.serve(UPDATE))
    assert (served.version, served.digest, served.num_modules) == (3, UPDATE.digest, 1)


def test_it_checks_what_it_is_given() -> None:
    engine = FakeEngine()
    with pytest.raises(RuntimeError, match="before start"):
        asyncio.run(engine.sample(REQUESTS))
    asyncio.run(engine.start())
    with pytest.raises(WeightSyncError, match="must serve an adapter before it samples"):
        asyncio.run(engine.sample(REQUESTS))
    with pytest.raises(WeightSyncError, match="sent with digest 0000"):
        asyncio.run(engine.serve(AdapterUpdate(3, "0000", {}, UPDATE.tensors)))
    asyncio.run(engine.serve(UPDATE))
    with pytest.raises(ValueError, match="no request"):
        asyncio.run(engine.sample([]))
    with pytest.raises(ValueError, match=r"positions \[5\] are empty"):
        asyncio.run(engine.sample([*REQUESTS, SampleRequest(5, Prompt("", "", ()), 0)]))
    asyncio.run(engine.stop())
    with pytest.raises(RuntimeError, match="after stop"):
        asyncio.run(engine.serve(UPDATE))


def test_it_fails_on_the_call_that_it_was_told() -> None:
    engine = ready(fail_on_call=2)
    asyncio.run(engine.sample(REQUESTS))
    with pytest.raises(ActorFailure, match="fails on call 2"):
        asyncio.run(engine.sample(REQUESTS))
    asyncio.run(engine.sample(REQUESTS))
