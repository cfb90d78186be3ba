"""Faults of well-known systems, put into the engine of this process: what must be caught."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_ray.engines import factory
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.engines.transformers_engine import TransformersEngine
from rlhf_ray.types import SampleRequest

PAD_ID = 0


def _count_pads_as_actions() -> None:
    """The engine hands on whole rows: behind the end of a response its padding.

    Not in the proof of service, which would stop every such run before it can do any damage.
    """
    sample = TransformersEngine.sample

    async def padded(self: TransformersEngine, requests: Sequence[SampleRequest]) -> list[Sampled]:
        responses = await sample(self, requests)
        if requests[0].prompt.id.startswith("canary"):
            return responses
        longest = max(len(response.token_ids) for response in responses)
        return [_padded(response, longest) for response in responses]

    TransformersEngine.sample = padded


def _padded(response: Sampled, size: int) -> Sampled:
    missing = size - len(response.token_ids)
    return replace(
        response,
        token_ids=np.pad(response.token_ids, (0, missing), constant_values=PAD_ID),
        logprobs=np.pad(response.logprobs, (0, missing)),
    )


def _suppress_eos() -> None:
    """The engine cannot draw EOS, and nobody else knows."""
    rule = factory.sampling_rule

    def without_eos(rollout: Any, *others: Any) -> Any:
        return rule(rollout.model_copy(update={"min_tokens": rollout.max_tokens}), *others)

    factory.sampling_rule = without_eos


FAULTS: Mapping[str, Callable[[], None]] = {
    "pads_as_actions": _count_pads_as_actions,
    "eos_suppressed": _suppress_eos,
}
