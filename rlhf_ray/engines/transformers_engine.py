"""Generation with transformers alone: tests compare vLLM with it, and it runs where vLLM cannot.

Rows are left-padded here, because all rows of a batch decode their next token at the same step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.data.rendering.tokens import decode_after
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.adapters import AdapterSlot, adapter_state
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer, on_device
from rlhf_ray.models.stop_conditions import CONTEXT, StopConditions
from rlhf_ray.observability.phases import count
from rlhf_ray.types import AdapterUpdate, FinishReason, SampleRequest, ServedAdapter


@dataclass(frozen=True, slots=True)
class TransformersSettings:
    """Settings of an engine; plain values, so that they can be sent to other processes."""

    model: str
    """Folder of the base model."""
    settings: ModelConfig
    """How to load it."""
    rule: SamplingRule
    """Sampling rule, stop tokens included."""
    stop_conditions: StopConditions
    """Length limits and stop strings."""


@dataclass
class _Row:
    """A response being sampled."""

    prompt_end: Sequence[int]
    """Last tokens of the prompt."""
    limit: int
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None

    def sampled(self, logprobs_T: Tensor) -> Sampled:
        """Return the finished response; ``logprobs_T`` may be longer than it."""
        assert self.reason is not None
        return Sampled(
            token_ids=np.asarray(self.tokens, dtype=np.int64),
            logprobs=logprobs_T[: len(self.tokens)].numpy().astype(np.float32),
            finish_reason=self.reason,
        )


class TransformersEngine:
    """A generation engine over a PEFT model; fp32 log-probs."""

    def __init__(self, settings: TransformersSettings) -> None:
        self._settings = settings
        self._slot: AdapterSlot  # set by start, deleted by stop

    async def start(self) -> None:
        """Load the base and its tokenizer."""
        self._tokenizer = load_tokenizer(self._settings.model, self._settings.settings)
        self._slot = AdapterSlot(load_causal_lm(self._settings.model, self._settings.settings))
        await self.wake()

    async def wake(self) -> None:
        """Move the model to where this process computes."""
        on_device(self._slot.model)

    async def sleep(self) -> None:
        """Move the model to main memory."""
        if torch.cuda.is_available():
            self._slot.model.cpu()
            torch.cuda.empty_cache()  # other processes cannot use what PyTorch keeps cached

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Put the adapter into the model; report what is read back from the model."""
        started = time.perf_counter()
        sent = tensors_from_bytes(update.data)
        self._slot.put(update.peft_config, sent)
        assert isinstance(self._slot.model, PeftModel)
        # PEFT holds in fp32 what a bfloat16 learner sends: cast back, nothing is lost.
        held = {
            name: tensor.to(sent[name].dtype)
            for name, tensor in adapter_state(self._slot.model).items()
        }
        return ServedAdapter(
            version=update.version,
            num_modules=sum(name.endswith("lora_A.weight") for name in held),
            digest=digest(held),
            caches_cleared=True,  # the key-value cache lives as long as one call of sample
            seconds=time.perf_counter() - started,
        )

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Sample one response per request, all in one batch."""
        if self._slot.is_empty:
            raise WeightSyncError(
                "The engine must serve an adapter before it samples; call serve first"
            )
        limits = [self._settings.stop_conditions.limit(request.seed) for request in requests]
        uniforms_BT = torch.stack([_uniforms(request.seed, max(limits)) for request in requests])
        return self._decode(requests, limits, uniforms_BT)

    @torch.no_grad()
    def _decode(
        self, requests: Sequence[SampleRequest], limits: Sequence[int], uniforms_BT: Tensor
    ) -> list[Sampled]:
        ids_BS, attention_BS = _left_pad([r.prompt.token_ids for r in requests])
        device = self._slot.model.device
        ids_BS, attention_BS = ids_BS.to(device), attention_BS.to(device)
        uniforms_BT = uniforms_BT.to(device)
        cache, logprobs = None, []
        ends = [request.prompt.token_ids[-CONTEXT:] for request in requests]
        rows = [_Row(end, limit) for end, limit in zip(ends, limits, strict=True)]
        for step in range(max(limits)):
            positions_BS = (attention_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
            output = self._slot.model(
                input_ids=ids_BS,
                attention_mask=attention_BS,
                position_ids=positions_BS,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps = torch.tensor(step, device=device)
            drawn_BV = self._settings.rule.logits(output.logits[:, -1], steps_BT=steps)
            logprobs_BV = drawn_BV.log_softmax(-1)
            token_B = _inverse_cdf(logprobs_BV, uniforms_BT[:, step])
            logprobs.append(logprobs_BV.gather(1, token_B[:, None])[:, 0])
            count(len(rows), "tokens sampled")
            if self._extend(rows, token_B.tolist()):
                break
            ids_BS = token_B[:, None]
            attention_BS = torch.cat([attention_BS, torch.ones_like(ids_BS)], dim=1)
        return [
            row.sampled(logprobs_T)
            for row, logprobs_T in zip(rows, torch.stack(logprobs, dim=1).cpu(), strict=True)
        ]

    def _extend(self, rows: Sequence[_Row], tokens: Sequence[int]) -> bool:
        """Append the next token to each unfinished response; return whether all are finished."""
        rule, stop_conditions = self._settings.rule, self._settings.stop_conditions
        for row, token in zip(rows, tokens, strict=True):
            if row.reason is None:
                row.tokens.append(token)
                spell = partial(decode_after, self._tokenizer, row.prompt_end)
                row.reason = stop_conditions.finish_reason(row.tokens, row.limit, rule, spell)
        return all(row.reason is not None for row in rows)

    async def stop(self) -> None:
        """Free the model."""
        vars(self).pop("_slot", None)  # it may be called before start, and twice


def _uniforms(seed: int, count: int) -> Tensor:
    """Draw [T] uniform numbers from the sample's own generator, so batching changes nothing."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inverse_cdf(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return the tokens at which the cumulative probability passes the uniform numbers."""
    cumulated_BV = logprobs_BV.double().exp().cumsum(-1)
    targets_B1 = uniforms_B[:, None] * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, targets_B1, right=True)[:, 0].clamp(
        max=logprobs_BV.shape[1] - 1
    )


def _left_pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids_BS[index, longest - len(row) :] = torch.tensor(row)
        attention_BS[index, longest - len(row) :] = 1
    return ids_BS, attention_BS
