"""DeepSpeed's config for the Trainer, and which checkpoints a training can go on from."""

from pathlib import Path

import pytest

from rlhf_ray.engines.deepspeed.zero_training import (
    ready_checkpoint,
    refuse_unknown_zero,
    trainer_config,
)
from rlhf_ray.errors import ConfigError


def test_further_keys_join_what_the_stage_sets() -> None:
    settings = {"zero": {"overlap_comm": False}, "wall_clock_breakdown": True}
    made = trainer_config(3, settings, "bfloat16", universal=True)
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert made["wall_clock_breakdown"] is True
    assert made["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert made["checkpoint"] == {"load_universal": True}
    assert "zero" not in made
    assert {"torch_autocast", "checkpoint"}.isdisjoint(trainer_config(1, {}, None, universal=False))


def saved(folder: Path, stage: int | None, ranks: int) -> Path:
    """A checkpoint with the files by which its stage and its number of processes are known."""
    state = folder / "global_step7"
    state.mkdir(parents=True)
    (folder / "trainer_state.json").touch()
    if stage is None:
        return folder
    (folder / "latest").write_text(state.name)
    for rank in range(ranks):
        (state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if stage == 3:
            (state / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    return folder


@pytest.mark.parametrize(("stage", "now"), [(None, None), (1, 2), (2, 1), (2, 2), (3, 3)])
def test_a_checkpoint_of_as_many_processes_is_taken_as_it_is(
    tmp_path: Path, stage: int | None, now: int | None
) -> None:
    assert ready_checkpoint(saved(tmp_path / "c", stage, 2), now, 2) is False
    assert ready_checkpoint(None, now, 2) is False


@pytest.mark.parametrize(
    ("stage", "now", "says"),
    [
        (None, 2, "without zero_stage"),
        (2, None, "at zero_stage 1 or 2"),
        (2, 3, "at zero_stage 1 or 2"),
        (3, 1, "at zero_stage 3"),
        (3, None, "at zero_stage 3"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    tmp_path: Path, stage: int | None, now: int | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"was saved {says}, and can only be continued so; set"):
        ready_checkpoint(saved(tmp_path / "c", stage, 2), now, 2)


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"stge": 3}, r"sft\.deepspeed\.zero\.stge: Extra inputs are not permitted, got 3"),
        (
            {"offload_optimizer": {"device": "gpu"}},
            r"offload_optimizer\.device: .*'cpu'.* got 'gpu'",
        ),
    ],
)
def test_wrong_keys_of_zero_are_refused_before_a_stage_starts(
    zero: dict[str, object], says: str
) -> None:
    refuse_unknown_zero("sft.deepspeed.zero", {"overlap_comm": True})
    with pytest.raises(ConfigError, match=says):
        refuse_unknown_zero("sft.deepspeed.zero", zero)
