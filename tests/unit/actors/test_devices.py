"""Where models are placed on a machine with a GPU, by each role, stage and kind of base."""

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from actors.critic_learner import CriticLearner
from actors.likelihood import Likelihood
from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.engines.scoring import SequenceScorer, TextClassifier
from rlhf_ray.models.load_arguments import load_arguments
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer, save_model
from rlhf_ray.serving.text_generation import Sampling, TextGenerator
from rlhf_ray.stages.supervised.arguments import arguments
from rlhf_ray.stages.supervised.dpo import DpoTraining
from rlhf_ray.stages.supervised.pretrain import PretrainTraining
from rlhf_ray.stages.supervised.reward import RewardTraining
from rlhf_ray.stages.supervised.sft import SftTraining

MakeConfig = Callable[..., Config]
GPU = torch.device("cuda", 0)


class Gpu:
    """A GPU as its libraries see it: what is loaded to it, or moved to it, counts as there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[Any] = []
        """The device map of each model that was loaded."""
        self.moved: list[nn.Module] = []
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
        load, to = PreTrainedModel.from_pretrained.__func__, nn.Module.to  # type: ignore[attr-defined]

        def from_pretrained(cls: type, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
            self.loaded.append(device_map)
            here = None if device_map is None else {"": "cpu"}
            return load(cls, *args, device_map=here, **kwargs)

        def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            if args != (GPU,):
                return to(module, *args, **kwargs)
            if any(hasattr(part, "is_loaded_in_8bit") for part in module.modules()):
                raise ValueError("Moving is not supported for 8-bit models")
            self.moved.append(module)
            return module

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        monkeypatch.setattr(nn.Module, "to", moved)

    def holds(self, *models: nn.Module) -> bool:
        """Return whether each model was moved whole, or loaded there and not moved since."""
        return all(
            self.loaded[-1] == {"": GPU} and not self.moved
            if any(getattr(part, "is_quantized", False) for part in model.modules())
            else any(model is root or model in root.children() for root in self.moved)
            for model in models
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture(params=["none", "int8", "nf4"])
def config(request: pytest.FixtureRequest, make_config: MakeConfig) -> Config:
    return make_config(model={"quantization": request.param}, sft={"tuning": "lora"})


def test_the_frozen_roles_load_any_base_onto_the_gpu(
    gpu: Gpu, config: Config, wide_base: str
) -> None:
    assert gpu.holds(Reference("reference-0", config, wide_base)._model)
    gpu.moved.clear()
    likelihood = Likelihood("likelihood-0", config, wide_base)
    likelihood.start()
    assert gpu.holds(likelihood._slot.model)


@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
def test_a_learner_in_one_process_trains_any_base_on_the_gpu(
    gpu: Gpu, config: Config, wide_base: str, kind: Any
) -> None:
    learner = kind("learner-0", config, wide_base, "torch")
    learner.start()
    assert gpu.holds(learner._engine.module)


@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
def test_a_rank_hands_deepspeed_any_base_on_the_gpu(
    gpu: Gpu, config: Config, wide_base: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []
    engine = "rlhf_ray.engines.deepspeed.engine"
    for meets in ("join_group", "wait_for_ranks"):
        monkeypatch.setattr(f"{engine}.{meets}", lambda *_: None)
    monkeypatch.setattr(f"{engine}.DeepSpeedEngine", lambda module, **_: made.append(module))
    kind("learner-0", config, wide_base, "deepspeed").start()
    assert gpu.holds(*made)


def test_the_engine_and_the_commands_that_sample_load_onto_the_gpu(
    gpu: Gpu, config: Config, wide_base: str
) -> None:
    """Their bases are whole: the engine serves what the run is about, in its own data type."""
    engine: Any = generation_engine(config, wide_base, (2,))
    asyncio.run(engine.start())
    sampling = Sampling(temperature=1.0, max_tokens=4, stop_token_ids=(2,))
    assert gpu.holds(engine._slot.model, TextGenerator(wide_base, config.model, sampling)._model)


def test_scorers_load_onto_the_gpu(
    gpu: Gpu, config: Config, wide_base: str, tmp_path: Path
) -> None:
    for labels in (1, 2):
        model: Any = load_sequence_classifier(wide_base, ModelConfig(), num_labels=labels)
        save_model(model, load_tokenizer(wide_base), tmp_path / str(labels))
    assert gpu.holds(SequenceScorer(str(tmp_path / "1"), config)._model)
    classifier = TextClassifier(str(tmp_path / "2"), 4)
    assert classifier._pipeline.device == GPU
    assert gpu.holds(classifier._pipeline.model)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "fp8"])
def test_a_folder_that_is_quantised_is_loaded_onto_the_gpu_for_it_stays_where_it_is(
    gpu: Gpu, wide_base: str, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(wide_base, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    found = load_arguments(str(folder), ModelConfig(), quantized=False)
    assert found["device_map"] == {"": GPU}
    assert "device_map" not in load_arguments(wide_base, ModelConfig(), quantized=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device_map" not in load_arguments(str(folder), ModelConfig(), quantized=False)


@pytest.mark.parametrize("kind", [SftTraining, RewardTraining, DpoTraining])
def test_a_stage_loads_a_quantised_base_where_the_trainer_will_train_it(
    gpu: Gpu, config: Config, wide_base: str, tmp_path: Path, kind: Any
) -> None:
    """The Trainer moves a whole base itself, and refuses a quantised one on another device."""
    kind(config, tmp_path, wide_base).load_model()
    assert gpu.loaded == [None if config.model.quantization == "none" else {"": GPU}]
    assert not gpu.moved


def test_one_process_that_sees_four_gpus_trains_on_one(
    gpu: Gpu, make_config: MakeConfig, wide_base: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """DataParallel would give each GPU a whole batch."""
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr(
        "transformers.training_args.PartialState",
        partial(SimpleNamespace, device=GPU, distributed_type="NO"),
    )
    made = arguments(PretrainTraining(make_config(), tmp_path, wide_base), 1)
    assert (made.device, made.n_gpu, made.use_cpu) == (GPU, 1, False)
    assert made.train_batch_size == make_config().pretrain.batch_size
