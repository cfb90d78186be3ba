"""vLLM with faults, for tests that find them out (those within its process: faulty_extension)."""

import dataclasses
from typing import Any

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.engines.vllm.engine import VllmEngine
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.types import AdapterUpdate, ServedAdapter

TEMPERATURE = 0.7
WRONG_RULES = {
    "wrong temperature": SamplingRule(1.0),
    "truncated": SamplingRule(TEMPERATURE, top_p=0.5),
}
LONG = StopConditions(max_tokens=32)


class FaultyEngine(VllmEngine):
    """vLLM with faults on this side of its process, until ``fault`` is None again."""

    fault: str | None = None

    async def plant(self, fault: str | None, *, lies: bool = False) -> None:
        """Switch a fault on, or all of them off with None."""
        self.fault = fault
        self.draw_by(WRONG_RULES.get(fault or "", SamplingRule(TEMPERATURE)))
        await self._engine.collective_rpc("plant", args=(fault, lies))

    def draw_by(self, rule: SamplingRule, stop_conditions: StopConditions = LONG) -> None:
        """Sample by another rule, and to another end, from now on."""
        self._settings = dataclasses.replace(
            self._settings, rule=rule, stop_conditions=stop_conditions
        )

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve as the honest engine does, but keep the caches."""
        if self.fault not in ("caches kept", "caches kept and it says so"):
            return await super().serve(update)
        honest = self._engine
        self._engine = _KeepsCaches(honest, claims_cleared=self.fault == "caches kept")  # type: ignore[assignment]
        try:
            return await super().serve(update)
        finally:
            self._engine = honest
            if self._lora_request is not None:
                self._lora_request.lora_name = self._lora_request.lora_path = "policy"


class _KeepsCaches:
    """AsyncLLM whose prefix cache outlives a change of adapter."""

    def __init__(self, engine: Any, claims_cleared: bool) -> None:
        self._engine = engine
        self._claims_cleared = claims_cleared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        await self._engine.pause_generation(mode=mode, clear_cache=False)

    async def reset_prefix_cache(self) -> bool:
        return self._claims_cleared
