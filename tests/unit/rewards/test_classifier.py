import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.engines.scoring import TextClassifier
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import tiny
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.rewards.classifier import ClassifierSource
from rlhf_ray.types import Rollout


def spelt(texts: Sequence[str]) -> list[dict[str, float]]:
    """A classifier whose positive logit is the length of the text, in an order of its own."""
    return [{"Positive": float(len(text)), "NEGATIVE": -1.0} for text in texts]


def test_the_logit_of_the_label_in_any_case(rollout: Callable[..., Rollout]) -> None:
    rows = [rollout("abc", "xx"), rollout("a", "xx")]
    both = ClassifierSource("classifier", spelt, "POSITIVE", "conversation")
    assert asyncio.run(both.score(rows)) == [5.0, 3.0]
    response = ClassifierSource("classifier", spelt, "positive", "response")
    assert asyncio.run(response.score(rows)) == [3.0, 1.0]
    negative = ClassifierSource("classifier", spelt, "negative", "response")
    assert asyncio.run(negative.score(rows)) == [-1.0, -1.0]


def test_a_label_that_the_model_lacks(rollout: Callable[..., Rollout]) -> None:
    source = ClassifierSource("mood", spelt, "LABEL_1", "response")
    with pytest.raises(ConfigError, match="mood has no label 'LABEL_1'; its labels are Positive, "):
        asyncio.run(source.score([rollout("a")]))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with two labels, the positive one first."""
    folder = tmp_path_factory.mktemp("classifier")
    shape = TinyModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_heads=2, num_layers=1
    )
    tiny.build(folder, ["good bad food"], shape, max_length=32, seed=0)
    tokenizer = load_tokenizer(str(folder))
    config = LlamaConfig.from_pretrained(folder)
    config.id2label, config.label2id = (
        {0: "POSITIVE", 1: "NEGATIVE"},
        {"POSITIVE": 0, "NEGATIVE": 1},
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(50)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_pipeline_gives_plain_logits(classifier: str) -> None:
    texts = ["good food", "bad", "good " * 40]  # the last one is longer than the model may read
    found = TextClassifier(classifier, batch_size=2)(texts)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for text, logits in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][-32:]])
        with torch.no_grad():
            expected = model(ids).logits[0].tolist()
        assert [logits["POSITIVE"], logits["NEGATIVE"]] == pytest.approx(expected, abs=1e-4)
    assert max(abs(logits["POSITIVE"]) for logits in found) > 1  # no probabilities


def test_what_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded as a text-classification model"):
        TextClassifier(str(tmp_path), 1)
