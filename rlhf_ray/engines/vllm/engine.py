"""vLLM as the rollout engine: AsyncLLM in its own process, serving adapters.

Every method must run in one event loop: AsyncLLM binds itself to the loop it is made in, and a call
from another one (an actor's second concurrency group) hangs.
"""

import asyncio
import itertools
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.engines.served_adapters import refuse_unservable, servable_rank
from rlhf_ray.engines.vllm import versions
from rlhf_ray.engines.vllm.own_process import lost_start_is_a_failure, while_alive
from rlhf_ray.engines.vllm.worker_extension import FIRST_ADAPTER, AppliedAdapter
from rlhf_ray.errors import ConfigError, WeightSyncError
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.observability.phases import count, read_count, report
from rlhf_ray.types import AdapterUpdate, SampleRequest, ServedAdapter

_EXTENSION = "rlhf_ray.engines.vllm.worker_extension.AdapterExtension"
SYSTEM_CUDA = Path("/usr/local/cuda")
"""Where CUDA is installed by default."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Settings of an engine; plain values, so that they can be sent to other processes."""

    model: str
    """Folder of the base model."""
    dtype: str
    """Data type of the engine's weights."""
    serving: Literal["adapter", "merged"]
    """How the adapter is applied; merging in bf16 would round small updates away."""
    lora_rank: int
    """Largest rank of the adapters that will be served."""
    max_model_len: int
    """Longest sequence, tokens."""
    rule: SamplingRule
    """Sampling rule, stop tokens included."""
    stop_conditions: StopConditions
    """Length limits and stop strings."""
    num_adapters: int = 1
    """Adapters that are loaded side by side; with more than one, requests in flight keep theirs."""
    tensor_parallel_size: int = 1
    """Number of workers that share the model, on this node."""
    kv_cache_gb: float = 0.25
    """KV cache of a CPU engine, GiB."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    can_sleep: bool = False
    """Support `sleep` and `wake`, for colocation with other roles."""
    extension: str = _EXTENSION
    """Class mixed into the workers."""
    rope_parameters: dict[str, Any] | None = None
    """Rotary parameters that replace the folder's own."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further AsyncEngineArgs; they override the others."""


class VllmEngine:
    """A generation engine over AsyncLLM."""

    def __init__(self, settings: VllmSettings) -> None:
        self._settings = settings
        self._ids = itertools.count()
        self._lora_request: LoRARequest | None = None

    async def start(self) -> None:
        """Start the engine's process and load the base.

        Raises:
            ConfigError: vLLM cannot sleep, or serve this data type, on this platform.
        """
        self._refuse_what_the_platform_lacks()
        versions.prefer_exact_runner(self._settings.rule.temperature, self._settings.dtype)
        if current_platform.device_type == "cuda" and (home := find_cuda()):
            os.environ["CUDA_HOME"] = str(home)  # where FlashInfer looks first
        if current_platform.is_cpu():
            # The engine's process would compile two lines of the sampler, for many seconds.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        report("starting vLLM's engine, which loads the weights")
        with lost_start_is_a_failure():
            self._engine = AsyncLLM.from_engine_args(self._engine_args())
        states = self._engine.output_processor.request_states
        # Read there: an output for each token would wake this loop thousands of times a second.
        read_count("tokens in flight", lambda: _num_tokens([*states.values()]))
        report("reading the engine's modules")
        # With min_tokens, vLLM would also mask the eos ids of the model's folder until then, but
        # learner and reference mask our stop tokens alone: log-probs would differ.
        self._engine.input_processor.generation_config_fields = {}
        per_worker, facts = await while_alive(self._engine, "starting", self._facts())
        self._servable = set.intersection(*map(set, per_worker))
        print(_described(facts, self._settings), flush=True)

    async def _facts(self) -> tuple[Sequence[Sequence[str]], Sequence[versions.EngineFacts]]:
        rpc = self._engine.collective_rpc
        return await rpc("servable_modules"), await rpc("engine_facts")

    def _refuse_what_the_platform_lacks(self) -> None:
        settings, device = self._settings, current_platform.device_type
        # On CPU vLLM accepts sleep and ignores it with a warning.
        if settings.can_sleep and not current_platform.is_sleep_mode_available():
            raise ConfigError(
                "placement.turns needs an engine that can sleep, and vLLM cannot on "
                f"{device}; leave it out, or set rollout.engine=transformers"
            )
        if device != "cuda":
            return
        capability = current_platform.get_device_capability()
        major = 8 if capability is None else capability.major
        half = "bfloat16" if major >= 8 else "float16"
        if settings.dtype == "bfloat16" != half:
            raise ConfigError(
                "vLLM has no bfloat16 on GPUs before Ampere, but rollout.dtype is bfloat16; set "
                f"rollout.dtype={half}"
            )
        # An assertion of vLLM's LoRA kernels would end its start otherwise.
        if settings.serving == "adapter" and settings.dtype == "float32":
            merged = settings.tensor_parallel_size == 1
            raise ConfigError(
                "vLLM's LoRA kernels for GPUs take bfloat16 and float16, but rollout.dtype is "
                f"float32; set rollout.dtype={half}"
                + (" or rollout.serving=merged" if merged else "")
            )
        chosen = {"attention_backend", "attention_config"} & settings.engine_args.keys()
        if major == 10 and settings.dtype != "float32" and not chosen and find_cuda() is None:
            raise ConfigError(
                "On this GPU vLLM compiles its attention (FlashInfer) when it starts, and no nvcc "
                "was found; install CUDA's toolkit and export CUDA_HOME, or set "
                "rollout.engine_args.attention_config.backend=FLASH_ATTN"
            )

    def _engine_args(self) -> AsyncEngineArgs:
        settings = self._settings
        args: dict[str, Any] = {  # vLLM's own argument types differ per field
            "model": settings.model,
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            # The default, raw_logprobs, is before temperature, top-k and top-p.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": settings.extension,
            # The rule alone decides how to sample, without defaults from the folder.
            "generation_config": "vllm",
            "trust_remote_code": settings.trust_remote_code,
            "disable_log_stats": True,
            "enable_sleep_mode": settings.can_sleep,
        }
        if settings.serving == "adapter":
            args |= {
                "enable_lora": True,
                "max_loras": settings.num_adapters,
                "max_lora_rank": servable_rank(settings.lora_rank),
            }
        if settings.tensor_parallel_size > 1:
            args |= {
                "tensor_parallel_size": settings.tensor_parallel_size,
                # Subprocesses of this actor share its GPUs. The ray backend, vLLM's default inside
                # a placement group, would request further ones.
                "distributed_executor_backend": "mp",
            }
        if current_platform.is_cpu():
            args |= {
                "enforce_eager": True,
                # A chunked prompt rewinds the request's random generator, which fails on CPU.
                "enable_chunked_prefill": False,
                # Otherwise vLLM reserves 92% of the machine's memory.
                "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
            }
            if settings.tensor_parallel_size == 1:
                # As on a GPU: the engine's process is the worker. vLLM turns "uni" into "mp" on
                # CPUs, to set a worker's OpenMP threads, which `Session` has set already; another
                # process would import everything once more and spin while it waits.
                args["distributed_executor_backend"] = UniProcExecutor
        args |= settings.engine_args
        if settings.rope_parameters is not None:
            rope = {"rope_parameters": settings.rope_parameters}
            args["hf_overrides"] = args.get("hf_overrides", {}) | rope
        return AsyncEngineArgs(**args)

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Sample all requests together; results come in the order of the requests."""
        lora = self._lora_request
        if self._settings.serving == "adapter" and lora is None:
            raise WeightSyncError(
                "The engine must serve an adapter before it samples; call serve first"
            )
        samples = asyncio.gather(*(self._sample_one(request, lora) for request in requests))
        return await while_alive(self._engine, "sampling", samples)

    async def _sample_one(self, request: SampleRequest, lora: LoRARequest | None) -> Sampled:
        rule, stop_conditions = self._settings.rule, self._settings.stop_conditions
        params = SamplingParams(
            temperature=rule.temperature,
            top_k=rule.top_k,
            top_p=rule.top_p,
            min_tokens=rule.min_tokens,
            max_tokens=stop_conditions.limit(request.seed),
            seed=request.seed,
            logprobs=0,  # of the sampled token alone
            ignore_eos=True,  # the rule's stop tokens alone end a response
            stop_token_ids=list(rule.stop_token_ids),
            stop=list(stop_conditions.strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=bool(stop_conditions.strings),
            skip_special_tokens=False,
        )
        final = None
        async for output in self._engine.generate(
            {"prompt_token_ids": list(request.prompt.token_ids)},
            params,
            f"{request.position}-{next(self._ids)}",
            lora_request=lora,
        ):
            final = output.outputs[0]
        assert final is not None
        assert final.logprobs is not None
        count(len(final.token_ids), "tokens sampled")
        logprobs = [
            step[token].logprob  # type: ignore[index]
            for token, step in zip(final.token_ids, final.logprobs, strict=True)
        ]
        return Sampled(
            token_ids=np.asarray(final.token_ids, dtype=np.int64),
            logprobs=np.asarray(logprobs, dtype=np.float32),
            finish_reason="stop" if final.finish_reason == "stop" else "length",
        )

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Apply the adapter, read it back, and sample with it from the next request on.

        Where one is loaded at a time, requests in flight finish first, and the caches are cleared.

        Raises:
            ConfigError: the adapter targets modules that this engine cannot serve.
        """
        refuse_unservable(update.peft_config["target_modules"], self._servable)
        return await while_alive(self._engine, "loading an adapter", self._serve(update))

    async def _serve(self, update: AdapterUpdate) -> ServedAdapter:
        started = time.perf_counter()
        if self._settings.num_adapters > 1:
            reports, cleared = await self._apply(update), True  # no request of it is in flight
        else:
            # With a request in flight, reset_prefix_cache returns False and leaves stale blocks.
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            try:
                reports = await self._apply(update)
                cleared = await self._engine.reset_prefix_cache()
            finally:
                await self._engine.resume_generation()
        digests = {report["digest"] for report in reports}
        return ServedAdapter(
            version=update.version,
            num_modules=min(report["num_modules"] for report in reports),
            digest=digests.pop() if len(digests) == 1 else f"differs between workers: {digests}",
            caches_cleared=bool(cleared),
            seconds=time.perf_counter() - started,
        )

    async def _apply(self, update: AdapterUpdate) -> Sequence[AppliedAdapter]:
        method, config = f"serve_{self._settings.serving}", json.dumps(dict(update.peft_config))
        if self._settings.serving == "merged":
            return await self._engine.collective_rpc(method, args=(update.data, config))
        # Of the adapters side by side the oldest gives way: its samples are learnt by now.
        adapter_id = FIRST_ADAPTER + update.version % self._settings.num_adapters
        args = (update.data, config, adapter_id)
        reports = await self._engine.collective_rpc(method, args=args)
        # vLLM's prefix cache distinguishes adapters by name and path alone: with an old name, a
        # request would read key-value blocks of the old weights.
        name = f"policy-v{update.version}-{update.digest}"
        self._lora_request = LoRARequest(name, adapter_id, name)
        return reports

    async def sleep(self) -> None:
        """Offload the weights to main memory and drop the caches."""
        await while_alive(self._engine, "going to sleep", self._engine.sleep(level=1))

    async def wake(self) -> None:
        """Load the weights back; the caches are empty."""
        await while_alive(self._engine, "waking up", self._engine.wake_up())

    async def stop(self) -> None:
        """Stop the engine's process."""
        self._engine.shutdown()


def _num_tokens(states: Sequence[RequestState]) -> int:
    return sum(len(each.detokenizer.output_token_ids) for each in states if each.detokenizer)


def _described(facts: Sequence[versions.EngineFacts], settings: VllmSettings) -> str:
    """Return a line about what an engine's workers compute with, for the log."""
    first = facts[0]
    return (
        f"vLLM {vllm.__version__}: model runner {first['runner']}, attention "
        f"{', '.join(first['attention']) or 'none'}, {settings.dtype} weights with the policy as "
        f"{settings.serving}, {len(facts)} x {first['device']}"
    )


def find_cuda() -> Path | None:
    """Return the folder of CUDA's compiler, where FlashInfer looks for it or among our packages."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(named)] if named else [Path(on_path).parents[1]] if on_path else []
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu1*"))
    # scripts/setup.sh adds the name by which the linker looks for the library.
    linked = [home for home in packages if (home / "lib64" / "libcudart.so").exists()]
    candidates += [] if named else [SYSTEM_CUDA, *linked]
    return next((home for home in candidates if (home / "bin" / "nvcc").exists()), None)
