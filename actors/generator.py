"""The generator: a generation engine and the adapter that it serves."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf_ray.data.rendering.tokens import decode_after
from rlhf_ray.engines.protocols import GenerationEngine, Sampled
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import (
    AdapterUpdate,
    Rollout,
    SampleRequest,
    ServedAdapter,
    ShardInfo,
    ShardRequest,
)


class Generator:
    """Samples shards of rollouts; refuses a shard of a version that it does not serve."""

    def __init__(
        self,
        name: str,
        make_engine: Callable[[], GenerationEngine],
        make_tokenizer: Callable[[], Any],
    ) -> None:
        self._name = name
        self._engine = make_engine()
        self._tokenizer = make_tokenizer()
        self._starting: asyncio.Future[None] | None = None
        self.version: int | None = None
        self._update: AdapterUpdate | None = None
        """The served adapter with its tensors, to serve it again after a sleep."""

    def __repr__(self) -> str:
        return self._name

    async def start(self) -> None:
        """Load the base model; later calls wait for the first."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._engine.start())
        await asyncio.shield(self._starting)

    async def publish(self, update: AdapterUpdate, tensors: bytes) -> ServedAdapter:
        """Serve an adapter; return what the engine then holds.

        Args:
            update: describes the adapter; its ``tensors`` are None.
            tensors: the safetensors bytes, an argument of their own because Ray resolves handles
                only at the top level of a call.
        """
        # If serving fails half-way, `generate` must refuse every version.
        self.version = None
        whole = replace(update, tensors=tensors)
        served = await self._engine.serve(whole)
        self.version, self._update = update.version, whole
        return served

    async def sleep(self) -> None:
        """Free the GPU memory for the learners of the same GPU."""
        await self._engine.sleep()

    async def wake(self) -> None:
        """Take GPU memory again and serve the same adapter as before the sleep.

        Raises:
            WeightSyncError: the engine then holds another adapter.
        """
        await self._engine.wake()
        if self._update is None:
            return
        served = await self._engine.serve(self._update)
        if served.digest != self._update.digest:
            raise WeightSyncError(
                f"{self._name} woke up with digest {served.digest} instead of version "
                f"{self._update.version}, {self._update.digest}"
            )

    async def generate(self, request: ShardRequest) -> tuple[list[Rollout], ShardInfo]:
        """Sample a shard; return its rollouts, and the scalars that the driver needs.

        Raises:
            WeightSyncError: the generator serves another version than the request's.
        """
        if self.version != request.version:
            raise WeightSyncError(
                f"{self._name} was called for version {request.version} and serves {self.version}; "
                "publish the adapter first"
            )
        sampled = await self._engine.sample(request.samples)
        rollouts = [
            self._rollout(sample, result, request.version)
            for sample, result in zip(request.samples, sampled, strict=True)
        ]
        return rollouts, ShardInfo(
            index=request.index,
            positions=tuple(rollout.position for rollout in rollouts),
            response_lengths=tuple(len(rollout.response_ids) for rollout in rollouts),
            stopped=tuple(rollout.finish_reason == "stop" for rollout in rollouts),
            versions=tuple(rollout.version for rollout in rollouts),
            repeating=tuple(rollout.repeats_a_token for rollout in rollouts),
            distinct_bigrams=tuple(rollout.distinct_bigrams for rollout in rollouts),
        )

    def _rollout(self, sample: SampleRequest, result: Sampled, version: int) -> Rollout:
        given, ids = sample.prompt.token_ids, result.token_ids.tolist()
        text = decode_after(self._tokenizer, given, ids, skip_special_tokens=True)
        return Rollout(
            position=sample.position,
            prompt=sample.prompt,
            response_ids=result.token_ids,
            rollout_logprobs=result.logprobs,
            finish_reason=result.finish_reason,
            version=version,
            text=text,
        )

    async def stop(self) -> None:
        """End the engine and its processes, which would outlive a killed actor."""
        await self._engine.stop()
