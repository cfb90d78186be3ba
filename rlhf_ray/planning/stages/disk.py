"""Bytes that a stage writes to run.dir: those that stay, and the most at a time."""

from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.planning.memory import ADAM_BYTES, BYTES, GB
from rlhf_ray.planning.role_times import Range
from rlhf_ray.planning.roles import policy_adapter_bytes, state_bytes
from rlhf_ray.planning.shapes import Models
from rlhf_ray.planning.trainings import Trained, section, tokens_per_step, zero_stage

TEXT = 5.0
"""Bytes of a token's text as JSON: four of English (OpenAI's rule of thumb), one of escapes."""
TOKEN = 4.0
"""Bytes of a token's id in a tokenised data set."""
ROLLOUT_TOKEN = 8 + 4 * 4 + TEXT
"""Bytes of a token of a kept batch: its id, four fp32 numbers, its text."""
RECORDS = 5.9e3
"""Bytes of an iteration in metrics and trace (measured: 59 MB of 10,000 iterations)."""
SAMPLE = 400.0
"""Bytes of a recorded sample besides its texts: names, numbers, its row in the index."""
RECORDED_TOKEN = 45.0
"""Bytes of a token whose values are recorded: id, text and three numbers, as JSON."""
WARNED = 5
"""Most batches kept because a guard warned of them."""
REPORT = 5e5
"""Bytes of a report (measured, 10,000 iterations)."""


@dataclass(frozen=True)
class Disk:
    """Bytes in run.dir."""

    kept: Range
    """What stays when the stage is done."""
    peak: Range
    """The most while it runs, what stays included."""


def training_disk(config: Config, part: Trained, steps: int | None) -> Disk:
    """Return the bytes of a supervised stage: models, two checkpoints, tokens of its rows.

    The Trainer writes a checkpoint before it deletes the one before; checkpoints and tokens go when
    the stage is done. Without ``steps`` the tokens are not known and left out.
    """
    trained, size = part.trainable, part.shape.size.parameters
    whole = size * BYTES[config.model.dtype]
    kept = whole if part.lora is None else BYTES["float32"] * trained
    if part.stage == "sft" and part.lora is not None:
        kept += whole  # the adapter, merged
    weights = BYTES["float32"] * (size if part.lora is None else trained)
    if zero_stage(config, part) in (1, 2):  # DeepSpeed saves those in use beside the optimizer's
        weights *= 2
    passes = max(1.0, section(config, part).epochs or 1.0)
    tokens = (steps or 0) / passes * tokens_per_step(config, part)
    peak = kept + 2 * (weights + ADAM_BYTES * trained) + TOKEN * tokens
    return Disk((kept, kept), (peak, peak))


def ppo_disk(config: Config, models: Models) -> Disk:
    """Return the bytes of PPO: commits, adapters, kept batches with their commits, records."""
    ppo, state = config.ppo, state_bytes(config, models)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    batch = state + ppo.batch_size * longest * ROLLOUT_TOKEN
    commits = (max(2, ppo.keep_checkpoints) + 1) * state  # and the best one
    if ppo.adapters_every:
        num_adapters = ppo.iterations // max(ppo.adapters_every, ppo.save_every)
        commits += num_adapters * policy_adapter_bytes(config, models)
    records = ppo.iterations * RECORDS + recorded_bytes(config)
    at_least, at_most = {
        "none": (0, 0),
        "warned": (0, WARNED),
        "last": (1, 1 + WARNED),
        "all": (ppo.iterations, ppo.iterations),
    }[config.run.keep_batches]
    best, worst = (commits + records + number * batch for number in (at_least, at_most))
    return Disk((best, worst), (best + state, worst + state))


def recorded_bytes(config: Config) -> float:
    """Return the bytes of the run's recorded samples, all of them as long as they may be."""
    ppo, rollout, record = config.ppo, config.rollout, config.run.record
    samples = min(record.samples, ppo.batch_size)
    texts = samples * (SAMPLE + (rollout.max_prompt_tokens + rollout.max_tokens) * TEXT)
    values = min(record.tokens, samples) * rollout.max_tokens * RECORDED_TOKEN
    return ppo.iterations * (texts + values)


def recorded(config: Config) -> str:
    """Return how much the recorded samples take at most, as a note; empty where none are."""
    record, size = config.run.record, recorded_bytes(config) / GB
    if not size:
        return ""
    samples = min(record.samples, config.ppo.batch_size)
    return (
        f"run.record keeps the texts of {samples} samples an iteration, and the values of the "
        f"tokens of {min(record.tokens, samples)}: at most {size:.2g} GB"
    )


def pairs_disk(config: Config) -> Disk:
    """Return the bytes of rank: two answers a pair, which each verdict repeats."""
    longest = config.rollout.max_prompt_tokens + 2 * config.rollout.max_tokens
    size = (config.rank.num_pairs + config.rank.answers) * longest * TEXT
    return Disk((size, size), (size, size))


def comparison_disk(config: Config, num_models: int) -> Disk:
    """Return the bytes of evaluate: each model's answers."""
    longest = config.rollout.max_prompt_tokens + num_models * config.rollout.max_tokens
    size = config.evaluate.num_prompts * longest * TEXT
    return Disk((size, size), (size, size))
