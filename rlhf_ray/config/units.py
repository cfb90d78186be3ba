"""The unit of every key that is a number, for docs/config.md."""

from collections.abc import Mapping

PURE = "–"
"""A number without a unit: a share, a factor, a probability."""

UNITS: Mapping[str, str] = {
    name: unit
    for unit, names in {
        "seconds": "start_timeout_s call_timeout_s drain_timeout_s timeout_s retry_wait_s",
        "MB": "object_store_mb",
        "GiB": "kv_cache_gb",
        "tokens": "max_length block_size max_tokens max_prompt_tokens min_tokens min max "
        "max_tokens_per_micro_batch",
        "entries": "vocab_size",
        "features": "hidden_size intermediate_size head_dim",
        "layers": "num_layers",
        "heads": "num_heads num_kv_heads",
        "dimensions": "r",
        "steps": "steps warmup_steps eval_every",
        "passes": "epochs",
        "iterations": "iterations save_every ppo.eval_every remind_every window max_in_a_row "
        "completions_every",
        "rollouts": "ppo.batch_size mini_batch_size samples_per_prompt shard_size kl_horizon",
        "sequences": "batch_size",
        "texts": "rewards.batch_size",
        "rows": "limit eval_rows",
        "pairs": "max_pairs",
        "questions": "num_questions",
        "prompts": "eval_prompts num_prompts",
        "nats": "kl_target kl_target_per_token max_gap min_kl",
        "1/nat": "kl_coef entropy_coef beta",
        "score": "baseline lowest highest bad_answer_score missing_eos_penalty",
        "deviations": "clip",
        "processes": "train_workers num_workers num_ranks",
        "generators": "num minimum maximum",
        "restarts": "max_restarts",
        "shards": "max_in_flight",
        "GPUs": "gpus tensor_parallel_size",
        "price": "gpu_hour_price",
        "threads": "threads_per_actor",
        "commits": "keep_checkpoints",
        "versions": "max_staleness",
        "requests": "concurrency",
        "attempts": "retries",
        "resamples": "bootstrap",
        "candidates": "top_k",
        PURE: "seed finetune reward rl evaluation max_bad_share weight learning_rate "
        "final_lr_share warmup_share weight_decay alpha dropout centre temperature label_smoothing "
        "adam_epsilon max_grad_norm gamma gae_lambda clip_range clip_range_high dual_clip "
        "importance_cap value_clip_range top_p max_repeating_share min_distinct_bigrams max_mean "
        "factor zero_stage",
    }.items()
    for name in names.split()
}
"""Key -> unit; one with its section's name before it, where the same key means two things."""


def unit_of(section: str, key: str) -> str | None:
    """Unit of a number at ``section``, the dotted place of the key; None for an unknown one."""
    return UNITS.get(f"{section.partition('.')[0].removesuffix('[]')}.{key}") or UNITS.get(key)
