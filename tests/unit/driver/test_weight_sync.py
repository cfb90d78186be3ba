"""Tests that the right check refuses a generator that does not serve what it was sent."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from fakes import FakePolicy, Tokenizer

from actors.generator import Generator
from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.driver.weight_sync import NUM_PROBE_PROMPTS, WeightSync, probe_requests, publish_to
from rlhf_ray.engines.fake import STOP_TOKEN, VOCAB_SIZE, FakeEngine
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.engines.served_adapters import digest
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.types import AdapterUpdate, Prompt, SampleRequest, ServedAdapter

PROMPTS = [Prompt(f"p{i}", "", (i, i + 1, i + 2)) for i in range(5)]
CANARIES = probe_requests(PROMPTS, 6, seed=0)


def drawing(max_tokens: int = 8, temperature: float = 1.0) -> FakeEngine:
    """Make an engine with another length limit or temperature."""
    return FakeEngine(
        rule=SamplingRule(temperature, stop_token_ids=(STOP_TOKEN,)),
        stop_conditions=StopConditions(max_tokens),
    )


class Unapplied(FakeEngine):
    """Applies nothing, and its read-back shows it."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        await super().serve(update)
        self.held = {}
        served = await FakeEngine.serve(self, update)
        self.held = {}
        return replace(served, num_modules=0, digest=digest({}))


class Echo(FakeEngine):
    """Applies nothing, and echoes what it received."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        served = await super().serve(update)
        self.held = {}
        return served


class Halved(FakeEngine):
    """Applies half of every update, and echoes what it received."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        served = await super().serve(update)
        assert self.held is not None
        self.held = {n: t / 2 if "lora_B" in n else t for n, t in self.held.items()}
        return served


class HalfRead(FakeEngine):
    """Leaves out a tensor, and its read-back shows it."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        served = await super().serve(update)
        assert self.held is not None
        self.held = {n: t for n, t in self.held.items() if "lora_A" not in n}
        return replace(served, num_modules=0, digest=digest(self.held))


class Twice(FakeEngine):
    """Applies an adapter on top of itself (alpha / r taken twice)."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        served = await super().serve(update)
        assert self.held is not None
        self.held = {n: t * 2 if "lora_B" in n else t for n, t in self.held.items()}
        return served


class Behind(FakeEngine):
    """Serves the adapter before the last one, and its read-back shows it."""

    before: AdapterUpdate | None = None

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        old, self.before = self.before or update, update
        return replace(await super().serve(old), version=update.version)


class OldVersion(FakeEngine):
    """Serves the right tensors under the previous version."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        return replace(await super().serve(update), version=update.version - 1)


class Cached(FakeEngine):
    """An engine that does not clear its prefix cache, and reports it."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        return replace(await super().serve(update), caches_cleared=False)


class StaleCache(FakeEngine):
    """Answers from a cache that the first adapter filled, and reports it as cleared."""

    cached: list[Sampled] | None = None

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        self.cached = self.cached or await super().sample(requests)
        return self.cached


@dataclass
class WeakProbe(FakePolicy):
    """A policy whose probe hardly moves the log-probs, so it proves nothing."""

    async def probe(self, version: int, canaries: Sequence[SampleRequest]) -> AdapterUpdate:
        return self._update(version, np.linspace(0, 0.1, VOCAB_SIZE))


class NoProbe(FakePolicy):
    """A policy whose probe is the zero adapter."""

    async def probe(self, version: int, canaries: Sequence[SampleRequest]) -> AdapterUpdate:
        return await self.zero_adapter(version)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Unapplied(), r"generator-0 does not serve version -1 .* holds 0 modules with digest"),
        (Echo(), r"does not apply the probe adapter: .* the engine's by -?0\.000 \(more than"),
        (Halved(), r"does not apply the probe adapter: .* within 5% of each other"),
        (HalfRead(), r"does not serve version -1 .* holds 0 modules with digest"),
        (Twice(), r"does not apply the probe adapter"),
        (Behind(), r"does not serve version -1 .* holds 1 modules with digest"),
        (OldVersion(), r"does not serve version -1 .* it reports version -2"),
        (Cached(), r"does not serve version -1 .* its prefix cache was not cleared"),
        (StaleCache(), r"does not apply the probe adapter"),
        (drawing(temperature=0.8), r"samples from another distribution .* temperature"),
        (drawing(temperature=1.1), r"samples from another distribution .* temperature"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, FakeEngine) else "",
)
def test_the_proof_refuses(engine: FakeEngine, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        asyncio.run(prove(engine))


def test_a_gap_that_the_config_allows_is_no_other_distribution() -> None:
    """Engine and learner differ by at least a tenth of a nat at another temperature."""
    engine = drawing(max_tokens=32, temperature=1.04)
    with pytest.raises(WeightSyncError, match=r"another distribution .* rollout\.max_gap"):
        asyncio.run(prove(engine))
    asyncio.run(prove(engine, max_gap=0.2))


def test_the_proof_passes_an_honest_engine_at_its_temperature() -> None:
    asyncio.run(prove(drawing(max_tokens=32)))
    asyncio.run(prove(drawing(max_tokens=32, temperature=0.7), FakePolicy(temperature=0.7)))


def test_every_generator_is_proved() -> None:
    with pytest.raises(WeightSyncError, match=r"^generator-1 does not apply the probe"):
        asyncio.run(prove(FakeEngine(), engines=[FakeEngine(), Echo()]))


def test_a_probe_must_move_more_than_engine_and_learner_differ() -> None:
    """The probe moves .03 nats: 20 times the error of an exact engine, not that of this one."""
    asyncio.run(prove(drawing(max_tokens=32), WeakProbe()))
    with pytest.raises(WeightSyncError, match=r"does not apply the probe .* move by 0\.029"):
        asyncio.run(prove(drawing(max_tokens=32, temperature=1.005), WeakProbe()))


def test_a_probe_that_moves_nothing_proves_nothing() -> None:
    with pytest.raises(WeightSyncError, match=r"move by 0\.000 nats a token"):
        asyncio.run(prove(FakeEngine(), NoProbe()))


def test_engines_that_round_may_differ_more() -> None:
    """T 1.1 moves log-probs by about .07 nats: under .1 for bf16, over .01 for fp32."""
    asyncio.run(prove(drawing(temperature=1.05), exact=False))
    with pytest.raises(WeightSyncError, match=r"0\.01 is allowed"):
        asyncio.run(prove(drawing(temperature=1.05)))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Unapplied(), "holds 0 modules"),
        (HalfRead(), "holds 0 modules"),
        (OldVersion(), "reports version 4"),
        (Cached(), "prefix cache was not cleared"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, FakeEngine) else "",
)
def test_a_publication_refuses(engine: FakeEngine, message: str) -> None:
    with pytest.raises(WeightSyncError, match=rf"generator-0 does not serve version 5.*{message}"):
        asyncio.run(publish([engine], FakePolicy(), 5))


def test_a_publication_refuses_the_version_before() -> None:
    async def twice() -> None:
        policy, engine = FakePolicy(), Behind()
        await publish([engine], policy, 1)
        policy.b_V = np.ones(VOCAB_SIZE)
        await publish([engine], policy, 2)

    with pytest.raises(WeightSyncError, match=r"does not serve version 2 .* with digest"):
        asyncio.run(twice())


def test_a_publication_reaches_every_generator() -> None:
    engines = [FakeEngine(), FakeEngine()]
    update = asyncio.run(publish(engines, FakePolicy(b_V=np.arange(32.0)), 3))
    assert update.version == 3
    for engine in engines:
        assert engine.held is not None
        assert digest(engine.held) == update.digest


def test_canaries_are_long_prompts_of_the_runs_own_text() -> None:
    canaries = probe_requests(PROMPTS, 7, seed=3)
    assert len(canaries) == NUM_PROBE_PROMPTS
    stream = [token for prompt in PROMPTS for token in prompt.token_ids] * 2
    assert [token for c in canaries for token in c.prompt.token_ids] == stream[:28]
    assert len({canary.seed for canary in canaries}) == 4
    assert probe_requests(PROMPTS, 7, seed=3) == canaries
    assert {c.seed for c in probe_requests(PROMPTS, 7, seed=4)}.isdisjoint(
        {c.seed for c in canaries}
    )


async def prove(
    engine: FakeEngine,
    policy: FakePolicy | None = None,
    *,
    engines: Sequence[FakeEngine] = (),
    exact: bool = True,
    max_gap: float | None = None,
) -> None:
    """Prove fresh generators over engines."""
    generators = await _generators(engines or [engine])
    proof = await WeightSync(policy or FakePolicy(), CANARIES, exact, max_gap).proof()
    for generator in generators:
        await proof(generator)


async def publish(engines: Sequence[FakeEngine], policy: FakePolicy, version: int) -> AdapterUpdate:
    """Publish to fresh generators over engines, without a proof."""
    update = await policy.adapter(version)
    for generator in await _generators(engines):
        await publish_to(generator, update)
    return update


async def _generators(engines: Sequence[FakeEngine]) -> list[GeneratorClient]:
    clients = []
    for number, engine in enumerate(engines):
        name = f"generator-{number}"
        generator = Generator(name, lambda engine=engine: engine, Tokenizer)
        await generator.start()
        clients.append(GeneratorClient(InlineWorker(name, generator, lambda *_: None)))
    return clients
