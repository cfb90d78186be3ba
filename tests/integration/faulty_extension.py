"""An engine's extension with faults that a test switches on; imported by the engine's process."""

import json
import os
from functools import partial
from typing import Any

from safetensors.torch import load
from vllm.v1.sample.ops import topk_topp_sampler

from rlhf_ray.engines.served_adapters import TensorDict, tensors_to_bytes
from rlhf_ray.engines.vllm.worker_extension import AdapterExtension, report


class FaultyExtension(AdapterExtension):
    """Serves as it should until a fault is planted.

    ``fault`` is what is done instead; ``lies`` makes the report claim that all was well.
    """

    fault: str | None = None
    lies: bool = False
    last_blob: bytes | None = None

    def plant(self, fault: str | None, lies: bool) -> None:
        """Switch a fault on, or all of them off with None."""
        self.fault, self.lies = fault, lies
        if "TRITON_INTERPRET" in os.environ:  # which cannot run this one kernel
            topk_topp_sampler.HAS_TRITON = False
        mode = "raw_logprobs" if fault == "raw logprobs" else "processed_logprobs"
        sampler = self.model_runner.sampler
        sampler.logprobs_mode = mode
        if hasattr(sampler, "topk_topp_sampler"):  # of model runner V1
            sampler.topk_topp_sampler.logprobs_mode = mode

    def serve_adapter(self, blob: bytes, peft_config: str, adapter_id: int) -> dict[str, Any]:
        """Serve as the honest one does, or with the planted fault."""
        serve = partial(super().serve_adapter, adapter_id=adapter_id)
        applied = self._serve_instead(serve, blob, peft_config)
        sent = load(blob)
        held = self._applied_in_lora_layers(sent, _scaling(peft_config), adapter_id)
        return self._say(sent, applied, held)

    def serve_merged(self, blob: bytes, peft_config: str) -> dict[str, Any]:
        """Serve as the honest one does, or with the planted fault."""
        applied = self._serve_instead(super().serve_merged, blob, peft_config)
        sent = load(blob)
        merged: TensorDict = {}
        for _ in self._merged_weights(sent, json.loads(peft_config), merged):
            pass
        return self._say(sent, applied, self._applied_in_weights(merged))

    def _serve_instead(self, serve: Any, blob: bytes, peft_config: str) -> dict[str, Any] | None:
        """Apply what the fault applies; the honest report where nothing is wrong."""
        last, self.last_blob = self.last_blob, blob
        if self.fault == "ignored":
            return None
        if self.fault == "stale" and last is not None:
            serve(last, peft_config)
            return None
        if self.fault == "half":
            serve(tensors_to_bytes(_first_half(load(blob))), peft_config)
            return None
        return serve(blob, peft_config)

    def _say(
        self, sent: TensorDict, honest: dict[str, Any] | None, applied: set[str]
    ) -> dict[str, Any]:
        """The honest report; or one read back from the layers; or a lie."""
        if honest is not None:
            return honest
        if self.lies:
            applied = {
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                for name in sent
                if "lora_A" in name
            }
        return report(sent, applied)


def _first_half(tensors: TensorDict) -> TensorDict:
    """The adapter of the first half of the modules; the other half's changes nothing."""
    modules = sorted({name.partition(".lora_")[0] for name in tensors})
    kept = set(modules[: len(modules) // 2])
    return {
        name: tensor if name.partition(".lora_")[0] in kept or "lora_A" in name else tensor * 0
        for name, tensor in tensors.items()
    }


def _scaling(peft_config: str) -> float:
    settings = json.loads(peft_config)
    return settings["lora_alpha"] / settings["r"]
