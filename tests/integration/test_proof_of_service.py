"""A generator that does not serve the adapter that it was sent is detected, whatever it reports.

One vLLM engine for each data type and way of serving; faults are planted in it one after the other.
The learner is a PolicyLearner in this process, with the same base and data type.

vLLM's model runner V2, which runs on GPUs, needs Triton. Its kernels run on a CPU in Triton's
interpreter: TRITON_FOLDER names a folder with the package (`pip install --no-deps --target FOLDER
triton==3.7.1`; the CPU lock leaves it out).
"""

import asyncio
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from faulty_engine import LONG, TEMPERATURE, FaultyEngine
from safetensors.torch import load_file, save_file
from tiny_models import build_random
from transformers import GenerationConfig

from actors.generator import Generator
from actors.policy_learner import PolicyLearner
from rlhf_ray.algorithms.logprobs import sampling_rule
from rlhf_ray.cluster.learner_groups import PolicyClient
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.config import Config, resolve
from rlhf_ray.driver.mismatch import MismatchGuard
from rlhf_ray.driver.weight_sync import WeightSync, probe_requests, publish_to
from rlhf_ray.engines.vllm.engine import VllmSettings
from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stop_conditions import StopConditions, stop_token_ids
from rlhf_ray.types import AdapterUpdate, Mismatch, Prompt, ScoredShard, ShardRequest

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

CANARY_TOKENS = 260
"""Over two blocks of the prefix cache, which holds 128 tokens a block on CPU."""


@dataclass(frozen=True)
class Setup:
    """An engine, the learner that it is held against, and the driver's checks between them."""

    config: Config
    engine: FaultyEngine
    generator: GeneratorClient
    learner: PolicyLearner
    policy: PolicyClient
    sync: WeightSync

    async def prove(self) -> None:
        """Have the generator pass the proof."""
        await (await self.sync.proof())(self.generator)

    async def publish(self, version: int) -> AdapterUpdate:
        """Send the learner's adapter to the generator."""
        update = await self.policy.adapter(version)
        await publish_to(self.generator, update)
        return update

    async def sample(self, version: int) -> Any:
        """A shard of the canaries under the version that is served."""
        request = ShardRequest(index=0, samples=tuple(self.sync.probe_prompts), version=version)
        return await self.generator.generate(request)

    async def check(self, guard: MismatchGuard, version: int) -> None:
        """Check the mismatch of a new shard."""
        shard = await self.sample(version)
        _, gap = await self.policy.logprobs(shard)
        guard.check([scored(shard, gap)])

    async def gap(self, version: int) -> Mismatch:
        """Difference between engine and learner on a shard of the canaries."""
        _, gap = await self.policy.logprobs(await self.sample(version))
        return gap


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
]
COMBINATIONS.append(pytest.param(("float32", "adapter", 2, "V1"), id="float32-adapter-parallel"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The learner shares two cores with the engine: threads that wait for each other would spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=COMBINATIONS)
async def running(
    request: pytest.FixtureRequest, llama: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Setup]:
    """The engine's folder also lists the pad id, which is never a stop token."""
    dtype, serving, parallel, runner = request.param
    folder = str(shutil.copytree(llama, tmp_path_factory.mktemp("models") / "served"))
    GenerationConfig(eos_token_id=pad_and_end(llama)).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
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


def pad_and_end(model: str) -> list[int]:
    """Ids that some models list as their ends."""
    tokenizer = load_tokenizer(model)
    return [int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)]  # type: ignore[arg-type]


def make_config(dtype: str, serving: str, parallel: int, **lora: Any) -> Config:
    return resolve(
        {
            "generators": {"tensor_parallel_size": parallel},
            "model": {"dtype": dtype, "max_length": 320},
            "lora": {"r": 8, **lora},
            "rollout": {
                "max_prompt_tokens": CANARY_TOKENS,
                "max_tokens": LONG.max_tokens,
                "temperature": TEMPERATURE,
                "serving": serving,
            },
        }
    )


def engine_settings(config: Config, model: str) -> VllmSettings:
    return VllmSettings(
        model=model,
        dtype=config.engine_dtype,
        serving=config.serving,
        lora_rank=config.lora.r,
        max_model_len=config.model.max_length,
        rule=sampling_rule(config.rollout, stop_token_ids(model)),
        stop_conditions=LONG,
        tensor_parallel_size=config.generators.tensor_parallel_size,
        extension="faulty_extension.FaultyExtension",
    )


def make_setup(config: Config, model: str, engine: FaultyEngine) -> Setup:
    generator = Generator("generator-0", lambda: engine, lambda: load_tokenizer(model))
    learner = PolicyLearner("policy-0", config, model, "torch")
    learner.start()
    policy = PolicyClient([InlineWorker("policy-0", learner, lambda *_: None)], zero_stage=2)
    tokenizer = load_tokenizer(model)
    text = "Why does the kettle leak? Because it is worn. How does the pump hum?"
    prompts = [Prompt("0", text, tuple(tokenizer(text)["input_ids"]))]
    canaries = probe_requests(prompts, CANARY_TOKENS, seed=0)
    return Setup(
        config,
        engine,
        GeneratorClient(InlineWorker("generator-0", generator, lambda *_: None)),
        learner,
        policy,
        WeightSync(policy, canaries, config.engine_is_exact),
    )


def move(learner: PolicyLearner, seed: int) -> None:
    """Give the policy a random adapter that changes what it says a good deal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in learner._engine.module.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def scored(shard: Any, gap: Mismatch) -> ScoredShard:
    return ScoredShard(shard, (), None, None, None, gap)


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


def hub_checkpoint(kind: str, folder: Path, **shape: Any) -> str:
    """A model whose files name no transformer before its modules, as the hub's gpt2 and bloom."""
    model = build_random(kind, folder, ["why does the kettle leak?"], **shape)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    return model


WIDE = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
BARE = {
    "gpt2": WIDE | {"n_embd": 64, "n_head": 2, "n_positions": 512},
    "bloom": WIDE | {"n_head": 2},
}


@pytest.mark.parametrize(("kind", "shape"), BARE.items())
async def test_weights_that_are_transposed_or_named_without_their_transformer_are_merged(
    kind: str, shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name, value in {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    model = hub_checkpoint(kind, tmp_path / kind, **shape)
    config = make_config("float32", "merged", 1)
    setup = make_setup(config, model, FaultyEngine(engine_settings(config, model)))
    await setup.generator.worker.call(Generator.start)
    try:
        await setup.prove()
        move(setup.learner, seed=0)
        await setup.publish(version=1)
        assert (await setup.gap(version=1)).mean < 1e-3
    finally:
        await setup.generator.worker.call(Generator.stop)
