"""Steps 3, 5, 7 and 8: an engine against the learner, asleep and awake, its speed, its seeds."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from actors.generator import Generator
from actors.policy_learner import PolicyLearner
from gpu_checks.lines import Line, Number, Place, checked, goal
from gpu_checks.models import MAX_LENGTH, TEXTS, large, small
from rlhf_ray.cluster.learner_groups import PolicyClient
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.config import Config, resolve
from rlhf_ray.driver.weight_sync import WeightSync, probe_requests, publish_to
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.engines.protocols import GenerationEngine, Sampled
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.load_arguments import own_device
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.types import AdapterUpdate, Prompt, SampleRequest, ServedAdapter, ShardRequest

PROBE_TOKENS = 260
"""Tokens of a probe prompt: over two blocks of any prefix cache."""
PAUSE_GOAL_S, SPEED_GOAL = 0.1, 0.7
"""Median pause of a publication; tokens/s with the policy as a share of bare vLLM's."""
RUNNERS = {"V1": "0", "V2": "1"}
KV_CACHE_BYTES = 2**30


class Forgetful:
    """An engine that keeps its first adapter, and reports the ones that it was sent."""

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine = engine
        self._first: AdapterUpdate | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve the first adapter again."""
        self._first = self._first or update
        served = await self._engine.serve(self._first)
        return replace(served, version=update.version, digest=update.digest)


@dataclass(frozen=True)
class Served:
    """An engine, the learner that it is held against, and the driver's checks between them."""

    engine: GenerationEngine
    generator: GeneratorClient
    learner: PolicyLearner
    policy: PolicyClient
    sync: WeightSync

    async def publish(self, version: int) -> AdapterUpdate:
        """Send the learner's adapter to the generator."""
        update = await self.policy.adapter(version)
        await publish_to(self.generator, update)
        return update


def proof(place: Place, dtype: str, serving: str, runner: str) -> Iterator[Line]:
    """Pass the proof of service; then plant a fault, which must not pass."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = RUNNERS[runner] if place.has_gpu else "0"
    yield from asyncio.run(
        _proof(_config(place, small(place), dtype=dtype, serving=serving), runner)
    )


async def _proof(config: Config, runner: str) -> list[Line]:
    async with _served(config) as served:
        facts = await _facts(served)
        started = time.perf_counter()
        await (await served.sync.proof())(served.generator)
        seconds = time.perf_counter() - started
        probe = await served.policy.probe(1, served.sync.probe_prompts)
        await publish_to(served.generator, probe)
        request = ShardRequest(0, tuple(served.sync.probe_prompts), version=1)
        shard = await served.generator.generate(request)
        found = await served.policy.compare(probe, shard)
        lines = [
            checked(
                "an engine proves that it serves the policy",
                facts["runner"] == (runner if facts["device"] != "cpu" else "V1"),
                mismatch_nats=found.error,
                shift_nats=found.shift,
                engine_shift_nats=found.engine_shift,
                digest=probe.digest,
                **facts,
                proof_s=seconds,
            )
        ]
        forgetful = Forgetful(served.engine)
        worker = Generator("forgetful-0", lambda: forgetful, lambda: load_tokenizer(_model(config)))
        client = GeneratorClient(InlineWorker("forgetful-0", worker, lambda *_: None))
        try:
            await (await served.sync.proof())(client)
            caught = ""
        except WeightSyncError as error:
            caught = str(error)
        what = "an engine that keeps its first adapter is refused"
        return [*lines, checked(what, bool(caught), error=caught[:200])]


async def _facts(served: Served) -> dict[str, str]:
    """Return what the engine computes with."""
    (facts, *_) = await served.engine._engine.collective_rpc("engine_facts")  # type: ignore[attr-defined]
    return facts | {"attention": " ".join(facts["attention"])}


def sleep(place: Place) -> Iterator[Line]:
    """Sample, sleep, wake and sample again under one adapter."""
    # Without a GPU transformers samples: vLLM cannot sleep there.
    config = _config(place, small(place), sleeps=True)
    yield from asyncio.run(_sleep(place, config))


async def _sleep(place: Place, config: Config) -> list[Line]:
    async with _served(config) as served:
        await served.publish(1)
        requests = _requests(config, 8)
        before, awake = await served.engine.sample(requests), place.gpu_gb_in_use()
        await served.generator.worker.call(Generator.sleep)
        asleep = place.gpu_gb_in_use()
        await served.generator.worker.call(Generator.wake)
        after = await served.engine.sample(requests)
        share, difference = _compare(before, after)
        return [
            checked(
                "an engine frees memory asleep, and serves the same adapter afterwards",
                share > 0.5 and difference < 0.05 and (asleep < awake or not place.has_gpu),
                engine=config.rollout.engine,
                same_responses=share,
                largest_difference_nats=difference,
                awake_gb=awake,
                asleep_gb=asleep,
            )
        ]


def seeds(place: Place, invariant: str) -> Iterator[Line]:
    """Sample under the same seeds twice, then in other batches."""
    os.environ["VLLM_BATCH_INVARIANT"] = invariant
    yield from asyncio.run(_seeds(place, _config(place, small(place)), invariant == "1"))


async def _seeds(place: Place, config: Config, invariant: bool) -> list[Line]:
    async with _served(config) as served:
        await served.publish(1)
        requests = _requests(config, 32 if place.has_gpu else 8)
        first = await served.engine.sample(requests)
        again = await served.engine.sample(requests)
        apart: list[Sampled] = []
        for start in range(0, len(requests), 3):
            apart += await served.engine.sample(requests[start : start + 3])
        lines = []
        for what, other in (("twice", again), ("in other batches", apart)):
            share, difference = _compare(first, other)
            # Without the mode nothing is promised on GPUs but that log-probs are close.
            holds = share == 1.0 if invariant or not place.has_gpu else difference < 0.1
            lines.append(
                checked(
                    f"the same seeds {what} sample the same",
                    holds,
                    batch_invariant=invariant,
                    same_responses=share,
                    largest_difference_nats=difference,
                )
            )
        return lines


def speed(place: Place) -> Iterator[Line]:
    """Measure tokens/s under an adapter, pauses of publications, and bare vLLM's tokens/s."""
    num, tokens = (128, 256) if place.has_gpu else (4, 16)
    config = _config(place, large(place), tokens=tokens, r=32, shares=0.45)
    ours, pauses, sync = asyncio.run(_speed(config, num))
    yield goal(
        place,
        "a publication pauses its engine shortly",
        median(pauses) < PAUSE_GOAL_S,
        median_pause_s=median(pauses),
        median_sync_s=median(sync),
        goal_s=PAUSE_GOAL_S,
    )
    on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    bare = _bare_speed(config, num, {} if place.has_gpu else on_cpu)
    yield goal(
        place,
        "sampling with the policy is about as fast as bare vLLM on the base",
        ours / bare > SPEED_GOAL,
        tokens_per_s=ours,
        bare_tokens_per_s=bare,
        share=ours / bare,
        goal=SPEED_GOAL,
    )


async def _speed(config: Config, num: int) -> tuple[float, list[float], list[float]]:
    async with _served(config) as served:
        pauses, syncs = [], []
        for version in range(6):
            update = await served.policy.adapter(version)
            started = time.perf_counter()
            tensors: Any = update.tensors
            pauses.append((await served.engine.serve(replace(update, tensors=tensors))).seconds)
            await publish_to(served.generator, update)
            syncs.append(time.perf_counter() - started)
        rates = []
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            sampled = await served.engine.sample(_requests(config, num))
            num_tokens = sum(len(each.token_ids) for each in sampled)
            rates.append(num_tokens / (time.perf_counter() - started))
        return max(rates), pauses[1:], syncs[1:]


def _bare_speed(config: Config, num: int, more: dict[str, Any]) -> float:
    """Return tokens/s of vLLM as anybody would use it: no adapter, seeds or log-probs."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        _model(config),
        dtype=config.engine_dtype,  # type: ignore[arg-type]
        max_model_len=config.model.max_length,
        disable_log_stats=True,
        **config.rollout.engine_args,
        **more,
    )
    params = SamplingParams(temperature=1.0, max_tokens=config.rollout.max_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(r.prompt.token_ids)} for r in _requests(config, num)]
    rates = []
    for _ in range(2):
        started = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates.append(num_tokens / (time.perf_counter() - started))
    return max(rates)


@asynccontextmanager
async def _served(config: Config) -> AsyncIterator[Served]:
    """Start the engine that the config names, and a learner of the same base beside it."""
    model = _model(config)
    engine = generation_engine(config, model, stop_token_ids(model, config.template, config.model))
    worker = Generator("generator-0", lambda: engine, lambda: load_tokenizer(model))
    generator = GeneratorClient(InlineWorker("generator-0", worker, lambda *_: None))
    await generator.worker.call(Generator.start)
    try:
        learner = PolicyLearner("policy-0", config, model, "deepspeed")
        learner.start(0, 1, "127.0.0.1", learner.free_port())
        policy = PolicyClient([InlineWorker("policy-0", learner, lambda *_: None)], zero_stage=2)
        probes = probe_requests(_prompts(model), PROBE_TOKENS, seed=0)
        # On GPUs fp32 products are rounded as well.
        is_exact = config.engine_is_exact and own_device().type == "cpu"
        sync = WeightSync(policy, probes, is_exact)
        yield Served(engine, generator, learner, policy, sync)
    finally:
        await generator.worker.call(Generator.stop)


def _config(
    place: Place,
    model: str,
    *,
    dtype: str = "bfloat16",
    serving: str = "auto",
    tokens: int = 32,
    r: int = 8,
    sleeps: bool = False,
    shares: float | None = None,
) -> Config:
    """Make a config; engines of several cases share a GPU unless ``shares`` gives one its part."""
    on_gpu: dict[str, Number] = {"kv_cache_memory_bytes": KV_CACHE_BYTES}
    if shares is not None:
        on_gpu = {"gpu_memory_utilization": shares}
    sleeping = sleeps and place.has_gpu
    return resolve(
        {
            "model": {"path": model, "dtype": dtype, "max_length": MAX_LENGTH},
            "lora": {"r": r},
            "placement": {"gpus": 0.2, "turns": True} if sleeping else {},
            "rollout": {
                "engine": "transformers" if sleeps and not place.has_gpu else "vllm",
                "serving": serving,
                "max_prompt_tokens": PROBE_TOKENS,
                "max_tokens": tokens,
                "ignore_eos": True,
                "engine_args": on_gpu if place.has_gpu else {},
            },
        }
    )


def _model(config: Config) -> str:
    assert config.model.path is not None
    return config.model.path


def _prompts(model: str) -> list[Prompt]:
    tokenizer = load_tokenizer(model)
    return [
        Prompt(str(i), text, tuple(tokenizer(text)["input_ids"])) for i, text in enumerate(TEXTS)
    ]


def _requests(config: Config, num: int) -> list[SampleRequest]:
    prompts = _prompts(_model(config))
    return [SampleRequest(i, prompts[i % len(prompts)], seed=i) for i in range(num)]


def _compare(ours: Sequence[Sampled], theirs: Sequence[Sampled]) -> tuple[float, float]:
    """Return the share of equal responses, and the largest difference of log-probs, nats.

    Responses are compared up to the first token that differs.
    """
    same, differences = 0, [0.0]
    for one, other in zip(ours, theirs, strict=True):
        length = min(len(one.token_ids), len(other.token_ids))
        unequal = np.flatnonzero(one.token_ids[:length] != other.token_ids[:length])
        common = int(unequal[0]) if len(unequal) else length
        same += common == len(one.token_ids) == len(other.token_ids)
        differences += np.abs(one.logprobs[:common] - other.logprobs[:common]).tolist()
    return same / len(ours), max(differences)
