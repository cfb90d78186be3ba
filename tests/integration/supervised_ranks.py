"""One of several processes that train supervised stages together, started by its tests."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from rlhf_ray.config import load
from rlhf_ray.data.datasets.texts import load_documents
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import pad_id
from rlhf_ray.models import loading
from rlhf_ray.stages.supervised.dpo import DpoTraining
from rlhf_ray.stages.supervised.language_model import packed_blocks, text_rows
from rlhf_ray.stages.supervised.launcher import open_training
from rlhf_ray.stages.supervised.pairs import PairTraining, load_training_pairs
from rlhf_ray.stages.supervised.pretrain import PretrainTraining
from rlhf_ray.stages.supervised.reward import RewardTraining
from rlhf_ray.stages.supervised.sft import SftTraining
from rlhf_ray.stages.supervised.trainer import train

TRAININGS: dict[str, type[Any]] = {
    "pretrain": PretrainTraining,
    "sft": SftTraining,
    "reward": RewardTraining,
    "dpo": DpoTraining,
}


def train_stage(config_file: str, stage: str, out: Path, rank: int = 0, world: int = 1) -> None:
    """Train, here or as one of several ranks; rank 0 writes numbers and weights."""
    config = load(Path(config_file), [])
    training = open_training(TRAININGS[stage], config, str(config.model.path))
    if rank == 0 and not training.data.exists():
        if isinstance(training, PairTraining):
            data, _ = load_training_pairs(training)
        else:
            tokenizer = loading.load_tokenizer(training.base)
            renderer = Renderer(tokenizer, config.template)
            documents, _ = load_documents(text_rows(config, "sft"), renderer)
            data = packed_blocks(stage, documents, training.settings, pad_id(tokenizer))
        for split, rows in data.items():
            rows.save_to_disk(str(training.data / split))
    if world > 1:
        torch.distributed.barrier()
    trained = train(training, world)
    if rank == 0:
        out.mkdir()
        (file,) = training.folder.glob("*/*model.safetensors")
        (out / "weights.safetensors").write_bytes(file.read_bytes())
        losses = {"before_loss": trained.before["loss"], "after_loss": trained.after["loss"]}
        sizes = {key: trained.sizes()[key] for key in ("parameters", "trainable_parameters")}
        (out / "numbers.json").write_text(json.dumps(losses | sizes | {"processes": world}))


def rank_main(
    rank: int, world: int, port: int, config: str, stage: str, out: str, killed: int, queue: Any
) -> None:
    """Train one stage in a forked process, whose last rank dies after the checkpoint ``killed``."""
    torch.set_num_threads(1)
    if killed and rank == world - 1:
        die_after(TRAININGS[stage], killed)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.distributed.init_process_group("gloo")
    train_stage(config, stage, Path(out), rank, world)
    if rank == 0:
        queue.put(stage)
    torch.distributed.barrier()


def die_after(kind: Any, step: int) -> None:
    """Have a stage's process die as by the kernel once it has saved the checkpoint of a step."""
    collate = kind.collate

    def collate_or_die(training: Any, rows: Any) -> Any:
        if (training.checkpoints / f"checkpoint-{step}" / "trainer_state.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(training, rows)

    kind.collate = collate_or_die


def main(*stages: str) -> None:
    """Train one stage after the other, each named as ``STAGE=CONFIG=FOLDER``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for stage, config_file, out in (named.split("=") for named in stages):
        train_stage(config_file, stage, Path(out), rank, world)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
