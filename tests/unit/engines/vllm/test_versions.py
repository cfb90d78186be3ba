"""What differs between versions of vLLM and between its model runners."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm

from rlhf_ray.engines.vllm import versions


def mapper(*names: str) -> Any:
    return SimpleNamespace(**{name: (lambda found=name: found) for name in names})


@pytest.mark.parametrize("name", ["get_rename_mapper", "get_unstacked_mapper"])
def test_names_are_mapped_without_merging_parts(name: str) -> None:
    model = SimpleNamespace(hf_to_vllm_mapper=mapper(name, "map_name"))
    assert versions.rename_mapper(model) == name


def test_a_mapper_that_merges_nothing_is_taken_as_it_is() -> None:
    whole = mapper("map_name")
    assert versions.rename_mapper(SimpleNamespace(hf_to_vllm_mapper=whole)) is whole
    assert versions.rename_mapper(SimpleNamespace()) is None
    assert versions.rename_mapper(SimpleNamespace(hf_to_vllm_mapper=None)) is None


def test_weights_are_loaded_by_the_runner_or_by_the_method_of_v1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def reload_weights(self: Any, **given: Any) -> None:
        calls.append((self, given["is_checkpoint_format"], list(given["weights_iterator"])))

    has_it = type("Runner", (), {"reload_weights": reload_weights})()
    lacks_it = SimpleNamespace()
    runner_v1 = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    monkeypatch.setattr(runner_v1, "reload_weights", reload_weights)
    weight = ("name", torch.ones(1))
    for runner in (has_it, lacks_it):
        versions.reload_weights(runner, iter([weight]))
    assert calls == [(has_it, True, [weight]), (lacks_it, True, [weight])]


@pytest.mark.parametrize(
    ("module", "runner"),
    [
        ("vllm.v1.worker.gpu.model_runner", "V2"),
        ("vllm.v1.worker.gpu_model_runner", "V1"),
        ("vllm.v1.worker.cpu_model_runner", "V1"),
    ],
)
def test_an_engine_reports_its_runner_and_its_attention(module: str, runner: str) -> None:
    runners = importlib.import_module(module)
    kind = getattr(runners, "GPUModelRunner", None) or runners.CPUModelRunner
    made = type("WorkersOwn", (kind,), {"__init__": lambda self: None})()
    attention = SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    )
    layers = {"layers.0.attn": attention, "layers.1.attn": attention, "experts": SimpleNamespace()}
    made.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers)
    )
    made.device = torch.device("cpu")
    assert versions.engine_facts(made) == {
        "runner": runner,
        "attention": ["FLASH_ATTN"],
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("version", "temperature", "dtype", "set_by_user", "value"),
    [
        ("0.26.0", 0.7, "bfloat16", None, "0"),
        ("0.26.0", 0.7, "bfloat16", "1", "1"),
        ("0.26.0", 1.0, "bfloat16", None, None),
        ("0.26.0", 0.7, "float32", None, None),
        ("0.32.0+cpu", 0.7, "bfloat16", None, None),
    ],
)
def test_logits_are_scaled_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    temperature: float,
    dtype: str,
    set_by_user: str | None,
    value: str | None,
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    environment = {} if set_by_user is None else {versions.RUNNER_VARIABLE: set_by_user}
    monkeypatch.setattr(versions.os, "environ", environment)
    versions.prefer_exact_runner(temperature, dtype)
    assert environment.get(versions.RUNNER_VARIABLE) == value
