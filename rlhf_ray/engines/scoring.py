"""Build the reward sources of a config, with the models that some of them run."""

from collections.abc import Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import torch

from rlhf_ray.algorithms.experience import pad
from rlhf_ray.algorithms.micro_batches import micro_batches
from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.config.rewards import (
    ClassifierSourceConfig,
    FunctionSourceConfig,
    JudgeSourceConfig,
    ModelSourceConfig,
    RemoteSourceConfig,
    RewardSourceConfig,
    RougeSourceConfig,
)
from rlhf_ray.data.datasets.prompts import Check
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.folders import first_line, locate
from rlhf_ray.models.forward import sequence_scores
from rlhf_ray.models.load_arguments import own_device
from rlhf_ray.models.loading import load_sequence_classifier, on_device
from rlhf_ray.models.tokenizers import STRICT, load_tokenizer
from rlhf_ray.observability.phases import count
from rlhf_ray.rewards.functions import FunctionSource
from rlhf_ray.rewards.judge import JudgeSource
from rlhf_ray.rewards.remote import RemoteSource
from rlhf_ray.rewards.rouge import RougeSource
from rlhf_ray.rewards.source import ClassifierSource, ModelSource, Source, TemplateCheck


def reward_sources(
    config: Config, reward_model: str | None, policy_model: str
) -> dict[str, Source]:
    """Return the sources of ``rewards`` by name, their models loaded.

    Args:
        config: the whole config.
        reward_model: folder or hub name of the run's reward model; None if no source needs it.
        policy_model: its tokenizer made the token ids of the rollouts.

    Raises:
        RlhfError: a model, a function or a label is missing.
    """
    return {
        source.name: _source(source, config, reward_model, policy_model)
        for source in config.rewards
    }


def _source(
    source: RewardSourceConfig, config: Config, reward_model: str | None, policy_model: str
) -> Source:
    match source:
        case ModelSourceConfig():
            path = source.path or reward_model
            if path is None:
                raise ConfigError(
                    f"rewards: {source.name} needs the run's reward model, and there is none; set "
                    "reward.path, or run the stage reward"
                )
            return model_source(config, path, policy_model)
        case ClassifierSourceConfig():
            classify = TextClassifier(source.path, source.batch_size, config.model)
            return ClassifierSource(source.name, classify, source.label, source.reads)
        case RougeSourceConfig():
            return RougeSource(source)
        case FunctionSourceConfig():
            return FunctionSource(source, config.cluster.function_timeout_s)
        case JudgeSourceConfig():
            return JudgeSource(source)
        case RemoteSourceConfig():
            return RemoteSource(source)
        case _:
            assert_never(source)


def model_source(config: Config, path: str, policy_model: str) -> ModelSource:
    """Load a reward model as a source."""
    renderer = _renderer(config, path, policy_model)
    return ModelSource(SequenceScorer(path, config), renderer, config.model.max_length)


def template_checks(config: Config, reward_model: str | None, policy_model: str) -> list[Check]:
    """Return checks that reward models of other tokenizers than the policy's can read a prompt."""
    sources = [source for source in config.rewards if isinstance(source, ModelSourceConfig)]
    paths = dict.fromkeys(source.path or reward_model for source in sources)
    renderers = [_renderer(config, path, policy_model) for path in paths if path]
    return [TemplateCheck(renderer) for renderer in renderers if renderer]


def _renderer(config: Config, path: str, policy_model: str) -> Renderer | None:
    """Return a reward model's renderer; None where it reads the policy's own tokens."""
    tokenizer = load_tokenizer(path, config.model)
    same_tokens = tokenizer.get_vocab() == load_tokenizer(policy_model, config.model).get_vocab()
    return None if same_tokens else Renderer(tokenizer)


class SequenceScorer:
    """A frozen sequence-classification model with one label."""

    def __init__(self, path: str, config: Config) -> None:
        self._max_tokens = config.ppo.max_tokens_per_micro_batch
        self._model = on_device(load_sequence_classifier(path, config.model, require_head=True))

    @torch.no_grad()
    def __call__(self, sequences: Sequence[np.ndarray]) -> list[float]:
        """Return [N] scores of [N] sequences of [S] token ids, read at their last token."""
        scores = [0.0] * len(sequences)
        device = self._model.device
        lengths = [len(sequence) for sequence in sequences]
        for rows in micro_batches(lengths, self._max_tokens, device):
            ids_BS, attention_BS = pad([sequences[row] for row in rows])
            result_B = sequence_scores(self._model, ids_BS.to(device), attention_BS.to(device))
            for row, score in zip(rows, result_B.tolist(), strict=True):
                scores[row] = score
            count(len(rows), "responses scored")
        return scores


class TextClassifier:
    """A frozen text-classification pipeline."""

    def __init__(self, path: str, batch_size: int, settings: ModelConfig = STRICT) -> None:
        """

        Raises:
            DataError: the model cannot be loaded.
        """
        from transformers import pipeline

        path = locate(path)
        try:
            self._pipeline: Any = pipeline(
                "text-classification",
                model=path,
                device=own_device(),
                trust_remote_code=settings.trust_remote_code,
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # of whatever kind: libraries use the files' values unchecked
            raise DataError(
                f"{path} cannot be loaded as a text-classification model ({first_line(error)})"
            ) from error
        self._pipeline.tokenizer.truncation_side = "left"  # keep the end: the response is there
        self._batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """Return the logit of each label, for each of [N] texts."""
        results = self._pipeline(
            list(texts),
            top_k=None,
            function_to_apply="none",
            truncation=True,
            batch_size=self._batch_size,
        )
        return [{entry["label"]: entry["score"] for entry in result} for result in results]
