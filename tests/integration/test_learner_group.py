"""Learner groups as Ray actors over DeepSpeed: what is learnt does not depend on how many ranks.

One scenario runs every group over the same two batches; the tests look at what came of it. The
oracle is the same learner in this process, over plain PyTorch. That one rank goes on where two were
is for `test_deepspeed_engine.py`, and for `test_kill_and_resume.py` the other way round.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.cluster.learner_groups import CriticClient, LearnerGroupClient, PolicyClient
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.config import Config, resolve
from rlhf_ray.engines.served_adapters import tensors_from_bytes
from rlhf_ray.placement.layout import Demand
from rlhf_ray.types import Mismatch, Prompt, Rollout, ScoredShard, Shard, ShardInfo, StepReport

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_SHARDS, SHARD_SIZE = 2, 4
State = dict[str, torch.Tensor]


def make_config(**sections: Any) -> Config:
    return resolve(
        {
            "cluster": {"mode": "local", "dashboard": False},
            "model": {"max_length": 64, **sections.pop("model", {})},
            "lora": {"r": 4},
            "rollout": {"max_prompt_tokens": 16, "max_tokens": 16},
            "ppo": {
                "batch_size": NUM_SHARDS * SHARD_SIZE,
                "mini_batch_size": 4,
                "epochs": 2,
                "learning_rate": 1e-3,
                # Micro-batches of one or two rows, so that ranks must agree on their number.
                "max_tokens_per_micro_batch": 40,
            },
            "critic": {"learning_rate": 1e-3, "lora": {"r": 4}},
            **sections,
        }
    )


@dataclass
class Learnt:
    """The results of a group."""

    report: StepReport
    state: State
    """Weights and Adam's moments, by kind and parameter."""
    adapter: State
    """As its PEFT folder holds it."""


@pytest.fixture(scope="module")
def learnt(llama: str) -> Iterator[dict[str, Learnt]]:
    # Room for every rank of the scenario.
    session = make_config(policy={"num_ranks": 4}, critic={"num_ranks": 2}, generators={"num": 4})
    session.cluster.roles.critic.env["MARK"] = "mine"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ray_session(session):
        yield asyncio.run(scenario(session, llama))
    torch.set_num_threads(before)


async def scenario(session: Config, model: str) -> dict[str, Learnt]:
    plain, int8 = make_config(), make_config(model={"quantization": "int8"})
    sharded = make_config(policy={"zero_stage": 3})
    spawner = RoleSpawner(session, lambda *_: None)
    counts = {"two": 2, "sharded": 2, "int8": 1, "int8-again": 1, "critic": 2}
    await spawner.place([Demand(name, count, 1, is_group=True) for name, count in counts.items()])
    policies = {
        name: spawner.spawn(PolicyLearner, name, counts[name], config, model, "deepspeed")
        for name, config in (
            ("two", plain),
            ("sharded", sharded),
            ("int8", int8),
            ("int8-again", int8),
        )
    }
    critics = spawner.spawn(CriticLearner, "critic", 2, plain, model, "deepspeed")
    marks = [await rank.actor.__ray_call__.remote(_mark) for rank in (*critics, *policies["two"])]
    assert marks == ["mine", "mine", None, None]
    groups: dict[str, LearnerGroupClient] = {
        name: PolicyClient(ranks, 3 if name == "sharded" else 2) for name, ranks in policies.items()
    }
    groups["critic"] = CriticClient(critics, 2)
    try:
        await spawner.start_all([*groups.values()])
        return await learn_two_batches(
            groups,
            {
                "oracle": inline(PolicyLearner, plain, model),
                "critic-oracle": inline(CriticLearner, plain, model),
            },
        )
    finally:
        await spawner.stop_all()


def _mark(_: object) -> str | None:
    return os.environ.get("MARK")


def inline(role_class: type, config: Config, model: str) -> LearnerGroupClient:
    learner = role_class("inline", config, model, "torch")
    learner.start()
    return LearnerGroupClient([InlineWorker("inline", learner, lambda *_: None)], zero_stage=2)


async def learn_two_batches(
    groups: dict[str, LearnerGroupClient], oracles: dict[str, LearnerGroupClient]
) -> dict[str, Learnt]:
    """Let all learn both; between them, `int8-again` continues from the state of `int8`."""
    first = {name: await learn(oracle, batch(0)) for name, oracle in oracles.items()}
    first |= {
        name: await learn(group, batch(0, ray.put))
        for name, group in groups.items()
        if name != "int8-again"
    }
    await groups["int8-again"].load(await groups["int8"].state())
    second = {name: await learn(oracle, batch(1)) for name, oracle in oracles.items()}
    second |= {name: await learn(group, batch(1, ray.put)) for name, group in groups.items()}
    return {f"{name}/1": result for name, result in first.items()} | {
        f"{name}/2": result for name, result in second.items()
    }


async def learn(group: LearnerGroupClient, scored: Sequence[ScoredShard]) -> Learnt:
    stats = await group.assemble(scored, 0.1)
    assert stats.num_samples == NUM_SHARDS * SHARD_SIZE
    moments = Moments(stats.num_tokens, stats.advantage_total, stats.advantage_total_sq)
    report = await group.learn(moments.mean, moments.std())
    handle: Any = await group.state()
    files = ray.get(handle) if isinstance(handle, ray.ObjectRef) else handle
    return Learnt(
        report,
        tensors_from_bytes(files["learner.safetensors"]),
        tensors_from_bytes(files["adapter_model.safetensors"]),
    )


def batch(seed: int, as_handle: Callable[[Any], Any] = lambda data: data) -> list[ScoredShard]:
    """Random prompts and responses of unequal lengths, with random numbers on them."""
    rng = np.random.default_rng(seed)
    shards = []
    for index in range(NUM_SHARDS):
        positions = range(index * SHARD_SIZE, (index + 1) * SHARD_SIZE)
        rollouts = [random_rollout(rng, position) for position in positions]
        lengths = tuple(len(rollout.response_ids) for rollout in rollouts)
        old, noise, values = (
            [rng.normal(size=n).astype(np.float32) for n in lengths] for _ in range(3)
        )
        old = [row * 0.3 - 5 for row in old]
        ref = [row + 0.1 * extra for row, extra in zip(old, noise, strict=True)]
        info = ShardInfo(index, tuple(positions), lengths, (False,) * SHARD_SIZE, (0,) * SHARD_SIZE)
        scores = tuple(rng.normal(size=SHARD_SIZE).tolist())
        shards.append(
            ScoredShard(
                shard=Shard(info, as_handle(rollouts)),
                raw_scores={"model": scores},
                scores=scores,
                old_logprobs=as_handle(old),
                ref_logprobs=as_handle(ref),
                values=as_handle([row * 0.1 for row in values]),
                mismatch=Mismatch(0.0, 0.0, sum(lengths)),
            )
        )
    return shards


def random_rollout(rng: np.random.Generator, position: int) -> Rollout:
    prompt = rng.integers(2, 300, size=rng.integers(3, 16)).tolist()
    response = rng.integers(2, 300, size=rng.integers(2, 16))
    return Rollout(
        position=position,
        prompt=Prompt(str(position), "", tuple(prompt)),
        response_ids=response,
        rollout_logprobs=np.full(len(response), -5, np.float32),
        finish_reason="length",
        version=0,
        text="",
    )


def largest_difference(found: State, expected: State) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def moved(state: State) -> float:
    """Return the adapter's distance from one that changes nothing."""
    return max(float(weight.abs().max()) for name, weight in state.items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["two/1", "two/2", "sharded/1", "sharded/2"])
def test_a_group_learns_what_one_process_learns(learnt: dict[str, Learnt], name: str) -> None:
    found, expected = learnt[name], learnt[f"oracle/{name[-1]}"]
    assert moved(expected.adapter) > 1e-3, "a learner that does nothing would pass"
    assert largest_difference(found.adapter, expected.adapter) < 1e-5
    assert largest_difference(found.state, expected.state) < 1e-5
    assert found.report.samples_learnt == NUM_SHARDS * SHARD_SIZE
    assert found.report.metrics == pytest.approx(dict(expected.report.metrics), abs=1e-4)


@pytest.mark.parametrize("name", ["critic/1", "critic/2"])
def test_a_critic_group_learns_what_one_process_learns(
    learnt: dict[str, Learnt], name: str
) -> None:
    found, expected = learnt[name], learnt[f"critic-oracle/{name[-1]}"]
    assert moved(expected.adapter) > 1e-3
    assert largest_difference(found.state, expected.state) < 1e-5
    assert found.report.metrics["loss/value_avg"] == pytest.approx(
        expected.report.metrics["loss/value_avg"], abs=1e-5
    )


def test_an_int8_base_learns_and_goes_on_elsewhere(learnt: dict[str, Learnt]) -> None:
    first, second, elsewhere = (learnt[name] for name in ("int8/1", "int8/2", "int8-again/2"))
    assert moved(first.adapter) > 1e-3
    assert largest_difference(first.adapter, learnt["oracle/1"].adapter) > 1e-6, (
        "the base is not int8"
    )
    assert largest_difference(second.adapter, first.adapter) > 1e-4
    assert largest_difference(elsewhere.state, second.state) < 1e-5
