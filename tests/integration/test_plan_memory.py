"""The plan's memory of a policy step, compared with a process that takes one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import resolve
from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.models import tiny
from rlhf_ray.planning.prediction import prediction

pytestmark = [pytest.mark.integration, pytest.mark.slow]

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc keeps freed blocks of up to 32 MB to hand them out again, as much as 1.8 GB in this step;
with this it gives those above 1 MB back, so that what is measured is what the step holds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 97 million parameters, with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny.build(folder, ["some text"], TinyModelConfig(vocab_size=300, hidden_size=64), 256, 0)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def values_of(model: Path, recomputes: bool) -> dict[str, Any]:
    """A config of one step: of two micro-batches where activations are kept, of one where not."""
    rows = 4 if recomputes else 8
    return {
        "run": {"dir": "unused", "stages": ["ppo"]},
        "model": {"path": str(model), "max_length": 256},
        "policy": {"gradient_checkpointing": recomputes},
        "ppo": {
            "batch_size": rows,
            "mini_batch_size": rows,
            "epochs": 1,
            "max_tokens_per_micro_batch": 1024,
        },
        "rollout": {"max_prompt_tokens": 128, "max_tokens": 128, "ignore_eos": True},
    }


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """Bytes at the peak of a step with activations kept, and recomputed, and before it."""
    folder = tmp_path_factory.mktemp("configs")
    files = [folder / f"{recomputes}.yaml" for recomputes in (False, True)]
    for file in files:
        file.write_text(yaml.safe_dump(values_of(model, file.stem == "True")), encoding="utf-8")
    step = Path(__file__).with_name("policy_step.py")
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(step), str(model), *map(str, files)],
        env={**os.environ, **GIVES_BACK, "PATH": binaries, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"idle"')]


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_a_policy_step_grows_by_what_is_foretold(
    model: Path, measured: list[dict[str, int]], recomputes: bool
) -> None:
    policy = prediction(resolve(values_of(model, recomputes)), ()).role("policy")
    foretold = policy.total - policy.parts["libraries"]
    found = measured[recomputes]
    growth = found["peak"] - found["idle"]
    print(f"foretold {foretold / 1e6:.0f} MB, measured {growth / 1e6:.0f} MB")
    assert foretold == pytest.approx(growth, rel=0.25)
