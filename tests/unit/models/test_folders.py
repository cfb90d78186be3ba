"""A config.json whose model could never be built is refused before the libraries try."""

import json
import time
from pathlib import Path

import pytest

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import base_of, cached_file, is_adapter, locate
from rlhf_ray.planning.model_sizes import skeleton

LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}


@pytest.mark.parametrize(
    "more",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 20_000},
        {"num_labels": 10**9},
        {"num_local_experts": 10**9},
        {"n_routed_experts": 10**6},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"encoder_layers": 10**9},
    ],
)
def test_a_model_of_a_billion_parts_is_refused_at_once(tmp_path: Path, more: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **more}))
    began = time.monotonic()
    for call in (lambda: locate(str(tmp_path)), lambda: skeleton(tmp_path, ModelConfig())):
        with pytest.raises(DataError, match=r"in config\.json, more than the 10000 parts"):
            call()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "path", ["a" * 5000, "/tmp/" + "a" * 300, "a\0b", "a/" * 3000, "a b", "-x"]
)
def test_a_path_that_no_file_system_takes_is_one_message(path: str) -> None:
    with pytest.raises(DataError) as error:
        locate(path)
    assert len(str(error.value)) < 500
    assert not is_adapter(path)
    assert cached_file(path, "config.json") is None


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "{", '"x"'])
def test_what_is_no_config_is_left_to_the_loader(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert locate(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("bases", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "b"}])
def test_an_adapter_that_stands_on_itself_is_refused(tmp_path: Path, bases: dict[str, str]) -> None:
    for name, base in bases.items():
        (tmp_path / name).mkdir()
        named = {"base_model_name_or_path": str(tmp_path / base), "task_type": "CAUSAL_LM"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(DataError, match="is an adapter that stands on itself"):
        base_of(str(tmp_path / "a"))


def test_an_adapter_may_stand_on_an_adapter(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "hub/name")):
        (tmp_path / name).mkdir()
        named = {"base_model_name_or_path": str(tmp_path / base) if name == "a" else base}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(named))
    assert base_of(str(tmp_path / "a")) == str(tmp_path / "b")
