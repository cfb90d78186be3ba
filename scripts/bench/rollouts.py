"""Row of sampling: vLLM with the policy, merged and as an adapter, beside vLLM on the base."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from actors.policy_learner import PolicyLearner
from bench import models
from bench.figures import ROUNDS, Figure, InTurn, in_turn
from bench.running import Place
from rlhf_ray.config import Config, resolve
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.engines.protocols import GenerationEngine
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.types import AdapterUpdate, Prompt, SampleRequest

ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",
    # Several engines share the cores: bound to them, all would take the same one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
TOKENS, GPU_TOKENS = 64, 256
GPU_REQUESTS = 256
KV_CACHE_BYTES = 2**28


def served(place: Place) -> list[Figure]:
    """Return tokens/s with the policy as a share of bare vLLM's, merged and as an adapter."""
    os.environ.update(ENVIRONMENT)
    base = models.write(place.folder / "model", models.LARGE if place.gpu else models.SMALL)
    count = GPU_REQUESTS if place.gpu else models.NUM_PROMPTS
    tokenizer = load_tokenizer(base)
    requests = [
        SampleRequest(number, Prompt(text, text, tuple(tokenizer(text)["input_ids"])), number)
        for number, text in enumerate(models.prompts(count, place.seed))
    ]
    servings = ("merged", "adapter")
    place.begin(len(servings) * (ROUNDS + 1))
    bare = _bare(_config(base, place, "auto"), requests)
    with asyncio.Runner() as loop:
        return [
            _against(bare, base, place, serving, requests, loop).speed() for serving in servings
        ]


def _config(base: str, place: Place, serving: str) -> Config:
    size = models.LARGE if place.gpu else models.SMALL
    on_gpu: dict[str, Any] = {"gpu_memory_utilization": 0.3} if place.gpu else {}
    return resolve(
        {
            "model": {"path": base, "dtype": size.name, "max_length": 512},
            "lora": {"r": models.LORA_RANK},
            "rollout": {
                "serving": serving,
                "max_prompt_tokens": models.PROMPT_TOKENS,
                "max_tokens": GPU_TOKENS if place.gpu else TOKENS,
                "ignore_eos": True,
                "engine_args": on_gpu,
            },
        }
    )


def _against(
    bare: Callable[[], object],
    base: str,
    place: Place,
    serving: str,
    requests: list[SampleRequest],
    loop: asyncio.Runner,
) -> InTurn:
    """Time an engine that serves the policy, and bare vLLM, in turn."""
    config = _config(base, place, serving)
    engine = generation_engine(config, base, stop_token_ids(base, config.template, config.model))
    loop.run(_start(engine, _adapter(config, base)))
    try:
        return in_turn(lambda: loop.run(engine.sample(requests)), bare, step=place.step)
    finally:
        loop.run(engine.stop())


async def _start(engine: GenerationEngine, update: AdapterUpdate) -> None:
    await engine.start()
    await engine.serve(update)


def _adapter(config: Config, base: str) -> AdapterUpdate:
    """Return the adapter of a learner that has not learnt."""
    learner = PolicyLearner("policy-0", config, base, "torch")
    learner.start()
    tensors, update = learner.adapter(1)
    return replace(update, tensors=tensors)


def _bare(config: Config, requests: list[SampleRequest]) -> Callable[[], object]:
    """Return a call that samples the requests from the base, with the same sampling parameters."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    on_cpu: dict[str, Any] = {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "distributed_executor_backend": UniProcExecutor,  # as ours: no further process
    }
    engine = LLM(
        config.model.path or "",
        dtype=config.engine_dtype,  # type: ignore[arg-type]
        max_model_len=config.model.max_length,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        **(on_cpu if current_platform.is_cpu() else config.rollout.engine_args),
    )
    prompts: Any = [{"prompt_token_ids": list(each.prompt.token_ids)} for each in requests]
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=config.rollout.max_tokens,
            seed=each.seed,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
        )
        for each in requests
    ]
    return lambda: engine.generate(prompts, params, use_tqdm=False)
