"""DeepSpeed ranks in real processes: the same steps as plain PyTorch, at any number of ranks,
with activations kept or recomputed.

Each case learns three steps at one number of ranks, moves the state to the other number, learns
three more, and is held against `TorchEngine`, which takes all six steps in one process.
"""

import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_ranks import (
    OPTIMIZER,
    STEPS,
    build,
    build_critic,
    critic_rank_main,
    learn_values,
    rank_main,
    reward_stage_main,
    take_steps,
)
from prepared_runs import write_prepared

from rlhf_ray.engines.torch_engine import TorchEngine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# Ranks are forked off a process that has imported what takes ten seconds to import.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["torch", "transformers", "peft", "deepspeed"])

BUFFERS, BUFFER = Path("/dev/shm"), "deepspeed_allreduce_buffer_*"


def learn(
    world_size: int,
    zero_stage: int,
    recompute: bool = False,
    state: Any = None,
    first: int = 0,
    discarding: bool = False,
) -> tuple[list[float], Any]:
    """Run a group of ranks in processes; gradient norms and state of rank 0."""
    return in_group(rank_main, world_size, zero_stage, recompute, state, first, discarding)


def in_group(main: Any, world_size: int, *arguments: Any) -> tuple[Any, Any]:
    """Run a group of ranks in processes; what rank 0 puts into its queue."""
    queue = RANKS.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        RANKS.Process(target=main, args=(rank, world_size, port, *arguments, queue))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        return queue.get(timeout=200)
    finally:
        for rank in ranks:
            rank.join(timeout=30)
            rank.kill()


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No rank compiles an operation, and none leaves a buffer in shared memory."""
    before, folder = set(BUFFERS.glob(BUFFER)), tmp_path_factory.mktemp("operations")
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield
    assert not list(folder.iterdir())
    assert set(BUFFERS.glob(BUFFER)) <= before


@pytest.fixture(scope="module")
def oracle() -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = TorchEngine(build(), **OPTIMIZER)
    norms = take_steps(engine, 0) + take_steps(engine, STEPS)
    return norms, engine.export_state()


@pytest.mark.parametrize(
    ("ranks", "then_ranks", "zero_stage", "recompute"),
    [(2, 1, 2, False), (2, 1, 2, True), (1, 2, 3, False), (1, 2, 3, True)],
)
def test_steps_and_state_do_not_depend_on_ranks_or_sharding(
    oracle: tuple[list[float], dict[str, torch.Tensor]],
    ranks: int,
    then_ranks: int,
    zero_stage: int,
    recompute: bool,
) -> None:
    expected_norms, expected = oracle
    first_norms, state = learn(ranks, zero_stage, recompute, None, 0)
    then_norms, state = learn(then_ranks, zero_stage, recompute, state, STEPS)
    assert first_norms + then_norms == pytest.approx(expected_norms, rel=1e-4)
    assert set(state) == set(expected)
    assert int(state["num_steps"]) == 2 * STEPS
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.from_numpy(state[name]), value, rtol=1e-4, atol=2e-5, msg=name
        )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_that_are_discarded_leave_nothing_behind(zero_stage: int) -> None:
    engine = TorchEngine(build(), **OPTIMIZER)
    expected_norms, expected = take_steps(engine, 0), engine.export_state()
    norms, state = learn(2, zero_stage, discarding=True)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert int(state["num_steps"]) == STEPS
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.from_numpy(state[name]), value, rtol=1e-4, atol=2e-5, msg=name
        )


TOLERANCES = {"norms": 0.01, "after": 0.02, "head": 0.001}
"""Of a critic that learns with adapters in half precision, against fp32 adapters."""


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "dtype"),
    [(ranks, stage, "bfloat16") for ranks in (1, 2) for stage in (1, 2, 3)]
    + [(1, 2, "float16"), (2, 3, "float16")],
)
def test_a_half_precision_critic_keeps_its_head_in_fp32_and_learns_as_in_plain_pytorch(
    ranks: int, zero_stage: int, dtype: str
) -> None:
    engine = TorchEngine(build_critic(getattr(torch, dtype)), **OPTIMIZER)
    expected = learn_values(engine)
    dtypes, arrays = in_group(critic_rank_main, ranks, zero_stage, dtype)
    learnt = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert dtypes == {"torch.float32"}
    # An adapter that has learnt nothing changes nothing, so the head alone makes the difference.
    torch.testing.assert_close(learnt["before"], expected["before"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learnt["restored"], learnt["after"], rtol=0, atol=0)
    head = next(name for name in learnt if name.startswith("weight/") and "score" in name)
    torch.testing.assert_close(learnt["head"], learnt[head], rtol=0, atol=0)
    for name, tolerance in TOLERANCES.items():
        torch.testing.assert_close(learnt[name], expected[name], rtol=tolerance, atol=tolerance)


def test_a_whole_reward_model_keeps_its_head_in_fp32_in_accelerates_deepspeed(
    tmp_path: Path,
) -> None:
    write_prepared(tmp_path)
    seen, saved = in_group(reward_stage_main, 1, str(tmp_path))
    assert seen == {("torch.float32", True)}
    assert saved.pop("score.weight") == "torch.float32"
    assert set(saved.values()) == {"torch.bfloat16"}
