"""The generator: an engine, the adapter that it serves, and that adapter's version."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf_ray.algorithms.repetition import distinct_bigrams, repeats_a_token
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
    """Samples shards of rollouts; refuses to sample under another version than it is asked for."""

    def __init__(
        self,
        name: str,
        make_engine: Callable[[], GenerationEngine],
        make_tokenizer: Callable[[], Any],
    ) -> None:
        self._name = name
        self._engine = make_engine()
        self._tokenizer = make_tokenizer()
        self.version: int | None = None
        self._update: AdapterUpdate | None = None
        """What it serves, to be served anew after a sleep."""

    def __repr__(self) -> str:
        return self._name

    async def start(self) -> None:
        """Load the base model."""
        await self._engine.start()

    async def publish(self, update: AdapterUpdate, tensors: bytes) -> ServedAdapter:
        """Serve an adapter.

        Args:
            update: what it is; its ``tensors`` handle is of no use here.
            tensors: the safetensors bytes.
        """
        self.version = None  # until the engine has said what it serves
        whole = replace(update, tensors=tensors)
        served = await self._engine.serve(whole)
        self.version, self._update = update.version, whole
        return served

    async def sleep(self) -> None:
        """Leave the GPU to others."""
        await self._engine.sleep()

    async def wake(self) -> None:
        """Take the GPU again, and serve what was served.

        Raises:
            WeightSyncError: the engine holds something else then.
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
        """Sample a shard.

        Raises:
            WeightSyncError: another version than the request's is served.
        """
        if self.version != request.version:
            raise WeightSyncError(
                f"{self._name} was asked for version {request.version} and serves {self.version}; "
                "publish the adapter first"
            )
        sampled = await self._engine.sample(request.samples)
        rollouts = [
            self._rollout(sample, result, request.version)
            for sample, result in zip(request.samples, sampled, strict=True)
        ]
        responses = [rollout.response_ids.tolist() for rollout in rollouts]
        return rollouts, ShardInfo(
            index=request.index,
            positions=tuple(rollout.position for rollout in rollouts),
            response_lengths=tuple(len(rollout.response_ids) for rollout in rollouts),
            stopped=tuple(rollout.finish_reason == "stop" for rollout in rollouts),
            versions=tuple(rollout.version for rollout in rollouts),
            repeating=tuple(map(repeats_a_token, responses)),
            distinct_bigrams=tuple(map(distinct_bigrams, responses)),
        )

    def _rollout(self, sample: SampleRequest, result: Sampled, version: int) -> Rollout:
        text = self._tokenizer.decode(result.token_ids.tolist(), skip_special_tokens=True)
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
        """Free the engine."""
        await self._engine.stop()
