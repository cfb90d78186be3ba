"""A generator that does not serve the adapter that it was sent is detected, whatever it reports.

One vLLM engine for each data type and way of serving (of adapters in float32 one of two workers,
which is all that one of a single worker is); faults are planted in it one after the other.
The learner is a PolicyLearner in this process, with the same base and data type.

vLLM's model runner V2, which runs on GPUs, needs Triton. Its kernels run on a CPU in Triton's
interpreter: TRITON_FOLDER names a folder with the package (`pip install --no-deps --target FOLDER
triton==3.7.1`; the CPU lock leaves it out).
"""

import asyncio
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from faulty_engine import LONG, FaultyEngine
from proof_setup import Setup, engine_settings, make_config, make_setup, move, pad_and_end, scored
from transformers import GenerationConfig

from actors.generator import Generator
from rlhf_ray.algorithms.logprobs import sampling_rule
from rlhf_ray.config import resolve
from rlhf_ray.driver.mismatch import MismatchGuard
from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stop_conditions import StopConditions, stop_token_ids
from rlhf_ray.types import ShardRequest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("vllm_here"),
]

TRITON_FOLDER = os.environ.get("TRITON_FOLDER")
NEEDS_TRITON = pytest.mark.skipif(not TRITON_FOLDER, reason="TRITON_FOLDER names no package")
COMBINATIONS = [
    pytest.param(
        (dtype, serving, 1, runner),
        id=f"{dtype}-{serving}" + ("" if runner == "V1" else f"-{runner}"),
        marks=[] if runner == "V1" else NEEDS_TRITON,
    )
    for runner in ("V1", "V2")
    for dtype in ("float32", "bfloat16")
    for serving in ("adapter", "merged")
    if (runner, dtype, serving) != ("V1", "float32", "adapter")
]
COMBINATIONS.append(pytest.param(("float32", "adapter", 2, "V1"), id="float32-adapter-parallel"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=COMBINATIONS)
async def running(
    request: pytest.FixtureRequest,
    llama: str,
    tmp_path_factory: pytest.TempPathFactory,
    vllm_here: None,
) -> AsyncIterator[Setup]:
    """The engine's folder also lists the pad id, which is never a stop token."""
    dtype, serving, parallel, runner = request.param
    folder = str(shutil.copytree(llama, tmp_path_factory.mktemp("models") / "served"))
    GenerationConfig(eos_token_id=pad_and_end(llama)).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.syspath_prepend(str(Path(__file__).parent))
        if runner == "V2":
            run_v2(patch)
        config = make_config(dtype, serving, parallel)
        setup = make_setup(config, llama, FaultyEngine(engine_settings(config, folder)))
        await setup.generator.worker.call(Generator.start)
        facts = await setup.engine._engine.collective_rpc("engine_facts")
        assert [fact["runner"] for fact in facts] == [runner] * parallel
    try:
        yield setup
    finally:
        await setup.generator.worker.call(Generator.stop)


def run_v2(patch: pytest.MonkeyPatch) -> None:
    """Have the next engine's processes use model runner V2, with Triton's interpreter."""
    folders = [str(TRITON_FOLDER), str(Path(__file__).parent / "triton_on_cpu")]
    patch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ["PYTHONPATH"]]))
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    patch.setattr("vllm.config.vllm.HAS_TRITON", True)  # of this process, where it is not needed


@pytest_asyncio.fixture(loop_scope="module")
async def setup(running: Setup) -> AsyncIterator[Setup]:
    """The engine without faults; what a test plants is removed after it."""
    yield running
    await running.engine.plant(None)


async def test_an_engine_that_never_applied_any_adapter_is_seen(setup: Setup) -> None:
    """Comes first: nothing was served before."""
    await setup.engine.plant("ignored")
    move(setup.learner, seed=0)
    with pytest.raises(WeightSyncError, match="its engine holds 0 modules"):
        await setup.publish(version=1)


async def test_an_honest_generator_passes(setup: Setup) -> None:
    await setup.prove()
    move(setup.learner, seed=1)
    update = await setup.publish(version=1)
    comparison = await setup.policy.compare(update, await setup.sample(version=1))
    exact = setup.config.engine_is_exact
    assert abs(comparison.shift) > 0.1, "the adapter must change something"
    assert comparison.error < (1e-4 if exact else 0.1)
    assert comparison.engine_shift == pytest.approx(comparison.shift, abs=1e-4 if exact else 0.05)
    await setup.check(MismatchGuard(setup.config.engine_is_exact), version=1)


@pytest.mark.parametrize("fault", ["ignored", "stale", "half"])
async def test_an_adapter_that_is_not_applied_is_seen_in_the_engine(
    setup: Setup, fault: str
) -> None:
    move(setup.learner, seed=2)
    await setup.publish(version=1)
    await setup.engine.plant(fault)
    move(setup.learner, seed=3)
    with pytest.raises(WeightSyncError, match=r"its engine holds \d+ modules with digest"):
        await setup.publish(version=2)


@pytest.mark.parametrize("fault", ["ignored", "stale", "half"])
async def test_an_adapter_that_is_not_applied_fails_the_probe(setup: Setup, fault: str) -> None:
    await setup.engine.plant(fault, lies=True)
    with pytest.raises(WeightSyncError, match=r"does not apply the probe|another distribution"):
        await setup.prove()


async def test_a_stale_adapter_is_not_learnt_from(setup: Setup) -> None:
    guard = MismatchGuard(setup.config.engine_is_exact)
    move(setup.learner, seed=4)
    await setup.publish(version=1)
    await setup.check(guard, version=1)
    await setup.engine.plant("stale", lies=True)
    move(setup.learner, seed=5)
    await setup.publish(version=2)
    with pytest.raises(WeightSyncError, match="did not sample from the policy"):
        await setup.check(guard, version=2)


async def test_a_prefix_cache_that_hides_the_adapter_fails_the_probe(setup: Setup) -> None:
    await setup.engine.plant("caches kept")
    with pytest.raises(WeightSyncError, match=r"does not apply the probe|another distribution"):
        await setup.prove()


async def test_a_prefix_cache_that_was_not_cleared_is_refused(setup: Setup) -> None:
    await setup.engine.plant("caches kept and it says so")
    with pytest.raises(WeightSyncError, match="its prefix cache was not cleared"):
        await setup.publish(version=1)


@pytest.mark.parametrize("fault", ["wrong temperature", "truncated", "raw logprobs"])
async def test_another_distribution_fails_the_proof(setup: Setup, fault: str) -> None:
    await setup.engine.plant(fault)
    with pytest.raises(WeightSyncError, match="samples from another distribution"):
        await setup.prove()


async def test_an_adapter_of_two_modules_is_served_right(setup: Setup, llama: str) -> None:
    config = make_config(
        setup.config.engine_dtype,
        setup.config.serving,
        setup.config.generators.tensor_parallel_size,
        target_modules=["q_proj", "v_proj"],
    )
    narrow = make_setup(config, llama, setup.engine)
    move(setup.learner, seed=7)
    await setup.publish(version=1)  # its other modules must be removed
    await narrow.prove()
    move(narrow.learner, seed=6)
    await narrow.publish(version=1)
    gap = await narrow.gap(version=1)
    assert gap.mean < (1e-4 if config.engine_dtype == "float32" else 0.05)


async def test_the_likeliest_tokens_are_the_same_on_both_sides(setup: Setup, llama: str) -> None:
    values = setup.config.model_dump()
    values["rollout"] |= {"top_k": 20, "top_p": 0.8}
    values["ppo"]["importance_cap"] = 2.0
    config = resolve(values)
    truncated = make_setup(config, llama, setup.engine)
    truncated.engine.draw_by(sampling_rule(config.rollout, stop_token_ids(llama)))
    await truncated.prove()
    move(truncated.learner, seed=8)
    await truncated.publish(version=1)
    gap = await truncated.gap(version=1)
    assert gap.mean < (1e-4 if config.engine_dtype == "float32" else 0.1)


async def test_ends_and_lengths_are_as_the_config_says_on_both_sides(
    setup: Setup, llama: str, tmp_path: Path
) -> None:
    """Every other token ends a response, of which the engine's own folder knows nothing."""
    model = str(shutil.copytree(llama, tmp_path / "model"))
    GenerationConfig(eos_token_id=list(range(2, 200, 2))).save_pretrained(model)
    values = setup.config.model_dump()
    values["rollout"] |= {"min_tokens": 5, "length_sampler": {"min": 6, "max": 32}, "stop": ["e"]}
    config = resolve(values)
    rule = sampling_rule(config.rollout, stop_token_ids(model))
    stop_conditions = StopConditions(LONG.max_tokens, strings=("e",), limits=(6, 32))
    late = make_setup(config, model, setup.engine)
    late.engine.draw_by(rule, stop_conditions)
    await late.prove()
    move(late.learner, seed=9)
    await late.publish(version=1)
    samples = [
        dataclasses.replace(canary, position=4 * row + place, seed=row)
        for row in range(4)
        for place, canary in enumerate(late.sync.probe_prompts)
    ]
    shard = await late.generator.generate(ShardRequest(0, tuple(samples), version=1))
    _, gap = await late.policy.logprobs(shard)
    assert gap.mean < (1e-4 if config.engine_dtype == "float32" else 0.05)
    MismatchGuard(config.engine_is_exact).check([scored(shard, gap)])
    tokenizer, reasons = load_tokenizer(llama), set()
    for sample, rollout in zip(samples, shard.rollouts, strict=True):
        tokens, limit = rollout.response_ids.tolist(), stop_conditions.limit(sample.seed)
        assert not set(tokens[:5]) & set(rule.stop_token_ids)
        ended = [
            stop_conditions.finish_reason(tokens[:end], limit, rule, tokenizer.decode)
            for end in range(1, len(tokens) + 1)
        ]
        assert ended == [None] * (len(tokens) - 1) + [rollout.finish_reason]
        reasons.add((rollout.finish_reason, tokens[-1] in rule.stop_token_ids))
    assert {("stop", True), ("stop", False)} <= reasons


async def test_a_shard_keeps_its_adapter_while_the_next_one_is_loaded(llama: str) -> None:
    """Of two adapters side by side in one engine."""
    config = make_config("float32", "adapter", 1)
    settings = dataclasses.replace(engine_settings(config, llama), num_adapters=2)
    setup = make_setup(config, llama, FaultyEngine(settings))
    await setup.generator.worker.call(Generator.start)
    try:
        await setup.prove()
        in_flight = setup.engine._engine.output_processor.request_states
        for version in (1, 2, 3):
            move(setup.learner, seed=version)
            await setup.publish(version)
            alone = await setup.sample(version)
            _, gap = await setup.policy.logprobs(alone)
            assert gap.mean < 1e-4
            beside = asyncio.ensure_future(setup.sample(version))
            while not in_flight:
                await asyncio.sleep(0)
            move(setup.learner, seed=version + 10)
            await setup.publish(version + 1)
            assert not beside.done()
            assert _drawn(await beside) == _drawn(alone)
            assert _drawn(await setup.sample(version + 1)) != _drawn(alone)
    finally:
        await setup.generator.worker.call(Generator.stop)


def _drawn(shard: Any) -> list[tuple[int, ...]]:
    return [tuple(rollout.response_ids) for rollout in shard.rollouts]


async def test_a_dead_engine_is_a_failure_of_its_actor(running: Setup) -> None:
    """The last test of its engine."""
    await running.generator.publish(await running.policy.zero_adapter(0))
    children = psutil.Process().children(recursive=True)
    engines = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    assert engines, f"no engine among {[child.cmdline() for child in children]}"
    held = set()
    for engine in engines:
        maps = Path(f"/proc/{engine.pid}/maps").read_text().splitlines()
        held |= {Path(line.split()[-1]) for line in maps if "/dev/shm/psm_" in line}
        engine.suspend()
    sampling = asyncio.ensure_future(running.sample(version=0))
    await asyncio.sleep(0.2)
    update = await running.policy.zero_adapter(1)
    loading = asyncio.ensure_future(running.generator.publish(update))
    await asyncio.sleep(0.5)
    for engine in engines:
        engine.kill()
    with pytest.raises(ActorFailure, match="engine process died while sampling"):
        await sampling
    # vLLM itself would never answer these.
    for publishing in (loading, running.generator.publish(update)):
        with pytest.raises(ActorFailure, match="engine process died while loading an adapter"):
            await asyncio.wait_for(publishing, 60)
    for file in held:  # of an engine that died outside of a run: nobody sweeps them
        file.unlink(missing_ok=True)
