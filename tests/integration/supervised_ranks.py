"""One of several processes that train supervised stages together, started by its tests."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed

from rlhf_ray.config import load
from rlhf_ray.data.datasets.texts import load_documents
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import pad_id
from rlhf_ray.models import loading
from rlhf_ray.stages.supervised.language_model import packed_blocks, text_rows
from rlhf_ray.stages.supervised.launcher import open_training
from rlhf_ray.stages.supervised.pairs import load_training_pairs
from rlhf_ray.stages.supervised.reward import RewardTraining
from rlhf_ray.stages.supervised.sft import SftTraining
from rlhf_ray.stages.supervised.trainer import train


def train_stage(config_file: str, stage: str, out: Path, rank: int = 0, world: int = 1) -> None:
    """Train, here or as one of several ranks; rank 0 writes numbers and weights."""
    config = load(Path(config_file), [])
    training = open_training(
        {"sft": SftTraining, "reward": RewardTraining}[stage], config, str(config.model.path)
    )
    if rank == 0:
        if isinstance(training, RewardTraining):
            data, _ = load_training_pairs(training)
        else:
            tokenizer = loading.load_tokenizer(training.base)
            renderer = Renderer(tokenizer, config.template)
            documents, _ = load_documents(text_rows(config, "sft"), renderer)
            data = packed_blocks("sft", documents, config.sft, pad_id(tokenizer))
        for split, rows in data.items():
            rows.save_to_disk(str(training.data / split))
    if world > 1:
        torch.distributed.barrier()
    trained = train(training, world)
    if rank == 0:
        out.mkdir()
        (file,) = training.folder.glob("*/adapter_model.safetensors")
        (out / "weights.safetensors").write_bytes(file.read_bytes())
        losses = {"before_loss": trained.before["loss"], "after_loss": trained.after["loss"]}
        (out / "numbers.json").write_text(json.dumps(losses | {"processes": world}))


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
