"""Build a generation engine from the config; only the chosen engine's library is imported."""

from rlhf_ray.algorithms.logprobs import sampling_rule
from rlhf_ray.config import Config
from rlhf_ray.engines.protocols import GenerationEngine
from rlhf_ray.models.load_arguments import rope_parameters
from rlhf_ray.models.stop_conditions import StopConditions


def generation_engine(
    config: Config, model: str, stop_token_ids: tuple[int, ...]
) -> GenerationEngine:
    """Return the engine that ``rollout.engine`` names, not yet started."""
    rollout = config.rollout
    rule = sampling_rule(rollout, stop_token_ids)
    sampler = rollout.length_sampler
    stop_conditions = StopConditions(
        max_tokens=rollout.max_tokens,
        strings=tuple(rollout.stop),
        limits=(sampler.min, sampler.max) if sampler else None,
    )
    if rollout.engine == "transformers":
        from rlhf_ray.engines.transformers_engine import TransformersEngine, TransformersSettings

        return TransformersEngine(
            TransformersSettings(
                model=model,
                settings=config.model.model_copy(update={"dtype": config.engine_dtype}),
                rule=rule,
                stop_conditions=stop_conditions,
            )
        )
    from rlhf_ray.engines.vllm.engine import VllmEngine, VllmSettings

    return VllmEngine(
        VllmSettings(
            model=model,
            dtype=config.engine_dtype,
            serving=config.serving,
            lora_rank=config.largest_rank,
            num_adapters=config.num_adapters,
            max_model_len=config.model.max_length,
            rule=rule,
            stop_conditions=stop_conditions,
            tensor_parallel_size=config.generators.tensor_parallel_size,
            can_sleep=config.placement.turns,
            kv_cache_gb=rollout.kv_cache_gb,
            trust_remote_code=config.model.trust_remote_code,
            rope_parameters=rope_parameters(model, config.model),
            engine_args=rollout.engine_args,
        )
    )
