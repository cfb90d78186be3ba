"""Code and pickles that come with a model run only where the config allows it, or never."""

import ast
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_models import build_tiny
from transformers import AutoModelForCausalLM

from rlhf_ray.config import load
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.engines.scoring import TextClassifier
from rlhf_ray.errors import ConfigError, DataError, RlhfError
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer, save_model
from rlhf_ray.models.stop_conditions import stop_token_ids

ROOT = Path(__file__).parents[3]

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


TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain model whose tokenizer brings code, at a terminal where everything is answered yes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = Path(build_tiny(tmp_path / "model", ["a b c"] * 4))
    (folder / "own_tokens.py").write_text(TOKENIZER_CODE.format(marker=str(tmp_path / "marker")))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own_tokens.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


TRUSTING = ModelConfig(dtype="float32", trust_remote_code=True)


def test_code_of_a_tokenizer_never_asks_and_runs_only_with_trust_remote_code(
    with_tokenizer: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    for load_it in (load_tokenizer, stop_token_ids):
        with pytest.raises(DataError, match=r"if you trust it, set model\.trust_remote_code=true"):
            load_it(str(with_tokenizer))
    assert not marker.exists()
    tokenizer = load_tokenizer(str(with_tokenizer), TRUSTING)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    assert marker.exists()
    assert stop_token_ids(str(with_tokenizer), None, TRUSTING) == (tokenizer.eos_token_id,)
    saved = tmp_path / "saved"
    save_model(cast("Any", load_causal_lm(str(with_tokenizer), TRUSTING)), tokenizer, saved)
    assert type(load_tokenizer(str(saved), TRUSTING)).__name__ == "OwnTokenizer"


def test_a_classifiers_code_never_runs_without_trust(
    with_tokenizer: Path, folder: Path, tmp_path: Path
) -> None:
    for path in (with_tokenizer, folder):
        with pytest.raises(DataError):
            TextClassifier(str(path), 1)
        with pytest.raises(DataError):
            TextClassifier(str(path), 1, ModelConfig())
    assert not (tmp_path / "marker").exists()


def test_every_loader_that_can_run_a_models_code_is_told_whether_it_may() -> None:
    """GenerationConfig and PeftModel run no code of a folder."""
    safe = {"GenerationConfig", "PeftModel"}
    silent = []
    for path in [*(ROOT / "rlhf_ray").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            loads = name.endswith((".from_pretrained", ".from_config")) or name == "pipeline"
            told = "trust_remote_code" in {keyword.arg for keyword in node.keywords}
            if loads and not told and name.partition(".")[0] not in safe:
                silent.append(f"{path.name}: {name}")
    assert not silent


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = Path(build_tiny(tmp_path / "model", ["a b c"] * 4))
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(RlhfError, match="safetensors"):
        load_causal_lm(str(folder), ModelConfig(dtype="float32"))
    with pytest.raises(ConfigError, match=r"model\.kwargs may not contain 'use_safetensors'"):
        load(None, ["model.kwargs={use_safetensors: false}"])
    with pytest.raises(DataError, match="cannot be loaded as a text-classification model"):
        TextClassifier(str(folder), 1)
