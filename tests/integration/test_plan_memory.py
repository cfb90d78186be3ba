"""The plan's memory of a policy step, compared with a process that takes one."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_a_policy_step_grows_by_what_is_foretold(
    model: Path, tmp_path: Path, recomputes: bool
) -> None:
    values = {
        "run": {"dir": str(tmp_path / "run"), "stages": ["ppo"]},
        "model": {"path": str(model), "max_length": 256},
        "policy": {"gradient_checkpointing": recomputes},
        "ppo": {
            "batch_size": 8,
            "mini_batch_size": 8,
            "epochs": 1,
            "max_tokens_per_micro_batch": 1024,
        },
        "rollout": {"max_prompt_tokens": 128, "max_tokens": 128, "ignore_eos": True},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    policy = prediction(resolve(values), ()).role("policy")
    foretold = policy.total - policy.parts["libraries"]

    step = Path(__file__).with_name("policy_step.py")
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(step), str(config), str(model)],
        env={**os.environ, **GIVES_BACK, "PATH": binaries, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    growth = found["peak"] - found["idle"]
    print(f"foretold {foretold / 1e6:.0f} MB, measured {growth / 1e6:.0f} MB")
    assert foretold == pytest.approx(growth, rel=0.25)
