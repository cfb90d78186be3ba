"""ZeRO inside transformers.Trainer: config, divided loading, checkpoints, whole weights.

DeepSpeed's own checkpoint is a file a process, and loads at that number of processes alone. For
another one it is converted first, by DeepSpeed, into a universal checkpoint: files by parameter.
"""

import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_ray.engines.deepspeed.engine import wait_for_ranks
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.phases import report

LATEST, UNIVERSAL = "latest", "latest_universal"
"""Files of a checkpoint that name the folders of its DeepSpeed state, as saved and as converted."""
DIVIDED_WEIGHTS = "zero_pp_rank_*_mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "*_optim_states.pt"
"""Files there: one a process at stage 3; one a process at each stage."""


def trainer_config(
    zero_stage: int, settings: Mapping[str, Any], autocast: str | None, *, universal: bool
) -> dict[str, Any]:
    """Return DeepSpeed's config for TrainingArguments, which fills in what is ``auto``.

    Args:
        zero_stage: 1 to 3.
        settings: further keys; ``zero`` holds further ones of ``zero_optimization``.
        autocast: data type to compute in, over fp32 weights; None: that of the weights. DeepSpeed's
            bf16 and fp16 would cast every weight, a reward model's head too.
        universal: whether the checkpoint that will be loaded is a universal one.
    """
    further = dict(settings)
    made = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": zero_stage, **further.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        # Else offloading would compile DeepSpeed's own Adam; PyTorch's fused one runs on CPUs, too.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **further,
    }
    if autocast is not None:
        made["torch_autocast"] = {"enabled": True, "dtype": autocast}
    if universal:
        made["checkpoint"] = {"load_universal": True}
    return made


def refuse_unknown_zero(key: str, zero: Mapping[str, Any]) -> None:
    """Check keys of DeepSpeed's ``zero_optimization``, as DeepSpeed will when a training starts.

    Raises:
        ConfigError: naming the first one that is unknown or has a wrong value.
    """
    if not zero:
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (key, *first["loc"])))
        raise ConfigError(f"{name}: {first['msg']}, got {first['input']!r}") from error


@contextmanager
def divided_loading(zero_stage: int | None, settings: Mapping[str, Any]) -> Iterator[None]:
    """At stage 3, have transformers divide a model's fp32 weights over the processes as it loads.

    Without it each process would hold all of them in main memory until its engine divides them.
    """
    if zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    zero = {"stage": 3, **settings.get("zero", {})}
    # transformers reads it where it loads, and keeps no reference to it.
    held = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


def ready_checkpoint(checkpoint: Path | None, zero_stage: int | None, world_size: int) -> bool:
    """Make a checkpoint loadable by this group; return whether as a universal one.

    All ranks call this; rank 0 converts, one file of the checkpoint after the other.

    Raises:
        ConfigError: it was saved without ZeRO and there is a stage now, or the other way round, or
            at stage 3 and there is a lower one now, or the other way round.
    """
    if checkpoint is None:
        return False
    tag = checkpoint / LATEST
    state = checkpoint / tag.read_text(encoding="utf-8") if tag.is_file() else None
    saved = "without zero_stage"
    if state is not None:
        saved = "at zero_stage 3" if any(state.glob(DIVIDED_WEIGHTS)) else "at zero_stage 1 or 2"
    fitting = {None: "without zero_stage", 3: "at zero_stage 3"}
    if saved != fitting.get(zero_stage, "at zero_stage 1 or 2"):
        raise ConfigError(
            f"{checkpoint} was saved {saved}, and can only be continued so; set it back, or begin "
            "a new run (run.resume=never)"
        )
    if state is None or len([*state.glob(OPTIMIZER_STATES)]) == world_size:
        return False
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _convert(state, checkpoint)
    if torch.distributed.is_initialized():
        wait_for_ranks("seen the checkpoint of another number of processes converted")
    return True


def _convert(state: Path, checkpoint: Path) -> None:
    """Convert a checkpoint's DeepSpeed state, beside it; needs as much disk space again, twice."""
    if (checkpoint / UNIVERSAL).is_file():  # written last
        return
    report("converting the checkpoint of another number of processes")
    from deepspeed.checkpoint import ds_to_universal

    converted = state.with_name(f"{state.name}_universal")
    shutil.rmtree(converted, ignore_errors=True)
    # One worker: others would be forks of a process with threads and a GPU.
    given = SimpleNamespace(
        input_folder=str(state),
        output_folder=str(converted),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(given)


def separate_steps(optimizer: Any) -> None:
    """Give each group of a restored AdamW a counter of steps of its own.

    A universal checkpoint comes back at stage 3 with one that all of them share, and each of them
    would count it up in every step.
    """
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def whole_weights(engine: Any, *, trained_alone: bool) -> dict[str, Tensor] | None:
    """Gather stage 3's weights in main memory by name: on rank 0; None elsewhere.

    Linear layers come in the data type of autocast, if there is one, and the engine's weights are
    then rounded to it, too: it cannot be trained on.
    """
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_alone)
