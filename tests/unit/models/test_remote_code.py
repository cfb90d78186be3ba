"""Code and pickles that come with a model run only where the config allows it, or never."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny
from transformers import AutoModelForCausalLM

from rlhf_ray.config import load
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.models.loading import load_causal_lm

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM, LlamaConfig

Path({marker!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that brings code, which writes a marker when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = Path(build_tiny(tmp_path / "model", ["a b c"] * 4))
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_runs_only_with_trust_remote_code(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RlhfError):
        load_causal_lm(str(folder), ModelConfig(dtype="float32"))
    assert not (tmp_path / "marker").exists()
    load_causal_lm(str(folder), ModelConfig(dtype="float32", trust_remote_code=True))
    assert (tmp_path / "marker").exists()


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = Path(build_tiny(tmp_path / "model", ["a b c"] * 4))
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(RlhfError, match="safetensors"):
        load_causal_lm(str(folder), ModelConfig(dtype="float32"))
    with pytest.raises(ConfigError, match=r"model\.kwargs may not contain 'use_safetensors'"):
        load(None, ["model.kwargs={use_safetensors: false}"])
