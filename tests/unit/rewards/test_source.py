"""Sources that run a model: what they read of a rollout, and that scores are the model's."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rlhf_ray.config import resolve
from rlhf_ray.config.model import ModelConfig, TinyModelConfig
from rlhf_ray.data.datasets.prompts import load_prompts
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.engines.scoring import TextClassifier, model_source, template_checks
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import tiny
from rlhf_ray.models.forward import initialise_head
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer, save_model
from rlhf_ray.rewards.source import ClassifierSource, ModelSource
from rlhf_ray.types import Prompt, Rollout

END = "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
SHAPE = TinyModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=1
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy."""
    folder = tmp_path_factory.mktemp("base")
    tiny.build(folder, ["Question: how do I sort list 3?", "call it"], SHAPE, 64, seed=0)
    return str(folder)


def score(path: str, policy: str, rollouts: list[Rollout]) -> list[float | None]:
    """Return the source's scores; a micro-batch holds two of the rollouts."""
    config = resolve(
        {
            "model": {"max_length": 64},
            "ppo": {"max_tokens_per_micro_batch": 192},
            "rollout": {"max_prompt_tokens": 32, "max_tokens": 32},
        }
    )
    return asyncio.run(model_source(config, path, policy).score(rollouts))


def make_rollout(tokenizer: Any, prompt: str, response: str, *, stopped: bool) -> Rollout:
    """Return a generator's rollout of these texts."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if stopped else []
    return Rollout(
        position=0,
        prompt=Prompt("0", prompt, tuple(tokenizer(prompt)["input_ids"])),
        response_ids=np.array(ids, np.int64),
        rollout_logprobs=np.zeros(len(ids), np.float32),
        finish_reason="stop" if stopped else "length",
        version=0,
        text=response,
    )


class TestModelSource:
    PROMPT = "Question: how do I sort list 3?\n\nAnswer: "
    TEXTS = ("call sorted", "no", "call it, and then call it again")

    def classifier(self, base: str, folder: Path) -> str:
        model = load_sequence_classifier(base, ModelConfig(), zero_head=True)
        initialise_head(model, seed=0)
        save_model(model, load_tokenizer(base), folder)
        return str(folder)

    def rollouts(self, base: str) -> list[Rollout]:
        tokenizer = load_tokenizer(base)
        return [
            make_rollout(tokenizer, self.PROMPT, text, stopped=i != 1)
            for i, text in enumerate(self.TEXTS)
        ]

    def plain_scores(self, model_path: str, sequences: list[list[int]]) -> list[float]:
        model = AutoModelForSequenceClassification.from_pretrained(model_path).eval()
        with torch.no_grad():
            return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in sequences]

    def test_one_tokenizer_reads_the_rollouts_own_tokens(self, base: str, tmp_path: Path) -> None:
        path = self.classifier(base, tmp_path / "reward")
        rollouts = self.rollouts(base)
        expected = self.plain_scores(path, [row.sequence_ids.tolist() for row in rollouts])
        assert score(path, base, rollouts) == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) == 3

    def test_another_tokenizer_reads_the_text(self, base: str, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shape = TinyModelConfig(
            vocab_size=330, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=1
        )
        tiny.build(other, ["other words here", self.PROMPT], shape, max_length=64, seed=1)
        path = self.classifier(str(other), tmp_path / "reward")
        tokenizer = load_tokenizer(path)
        sequences = []
        for i, text in enumerate(self.TEXTS):
            prompt, answer = tokenizer([self.PROMPT, text], add_special_tokens=False)["input_ids"]
            # A response that was cut at the limit has no end of sequence to be scored at.
            end = [tokenizer.eos_token_id] if i != 1 else []
            sequences.append([*prompt, *answer, *end])
        rollouts = self.rollouts(base)
        assert sequences[0] != rollouts[0].sequence_ids.tolist()
        expected = self.plain_scores(path, sequences)
        assert score(path, base, rollouts) == pytest.approx(expected, abs=1e-5)

    @pytest.fixture
    def tokenizer(self, base: str) -> Any:
        """Reads a chat as <user>...<assistant>..., with an EOS after each answer."""
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
            "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        )
        return tokenizer

    def chat(self, tokenizer: Any, max_length: int = 64, ended: bool = True) -> str:
        """Return the input of a source with another tokenizer than the policy's."""
        read: list[list[int]] = []

        def engine(sequences: Any) -> list[float]:
            read.extend(sequence.tolist() for sequence in sequences)
            return [0.0] * len(sequences)

        messages = [{"role": "user", "content": "why"}]
        prompt = Prompt("9", "<|policy|>why<|end|>", (1,), {"messages": messages})
        reason = "stop" if ended else "length"
        rollout = Rollout(0, prompt, np.array([3]), np.zeros(1, np.float32), reason, 0, "so")
        source = ModelSource(engine, Renderer(tokenizer), max_length)
        asyncio.run(source.score([rollout]))
        return tokenizer.decode(read[0])

    def test_a_chat_is_read_by_the_reward_models_own_template(self, tokenizer: Any) -> None:
        assert self.chat(tokenizer) == "<user>why<assistant>so<|eos|>"
        assert self.chat(tokenizer, ended=False) == "<user>why<assistant>so"
        assert self.chat(tokenizer, max_length=3) == "so<|eos|>"  # the end is what is rated

    def test_an_answer_that_the_template_cuts_is_read_as_it_was_sampled(
        self, tokenizer: Any
    ) -> None:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "m.content", "m.content | replace('so', '')"
        )
        assert self.chat(tokenizer) == "<user>whyso<|eos|>"
        assert self.chat(tokenizer, ended=False) == "<user>whyso"

    def test_a_chat_without_a_template_is_refused(self, tokenizer: Any) -> None:
        tokenizer.chat_template = None
        with pytest.raises(DataError, match="has no chat template, which rows with messages need"):
            self.chat(tokenizer)

    def test_a_chat_that_the_template_refuses(self, tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% if messages[0].content == 'why' %}{{ raise_exception('not why') }}{% endif %}"
            + tokenizer.chat_template
        )
        with pytest.raises(DataError, match=r"Prompt 9 cannot be rendered .* refuses it: not why"):
            self.chat(tokenizer)


@pytest.mark.parametrize("path", [None, "own"])
def test_prompts_that_a_reward_models_template_refuses_are_counted_before_training(
    base: str, tmp_path: Path, path: str | None
) -> None:
    policy = load_tokenizer(base)
    policy.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}" + END
    reward = tmp_path / "reward"
    tiny.build(reward, ["other words here"], SHAPE, max_length=64, seed=1)
    tokenizer = load_tokenizer(str(reward))
    system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = system + policy.chat_template
    tokenizer.save_pretrained(reward)
    user = {"role": "user", "content": "why"}
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, user]}]
    rows += [{"messages": [user], "id": n} for n in range(3)]
    config = resolve({"rewards": [{"type": "model", "path": path and str(reward)}]})
    checks = template_checks(config, str(reward), base)
    load = partial(load_prompts, rows, Renderer(policy), 64)
    assert load(max_bad_share=0.25)[1] == {"kept": 4}
    assert load(max_bad_share=0.25, checks=checks)[1] == {"kept": 3, "reward_template_refuses": 1}
    with pytest.raises(DataError, match=r"the reward model, .*, cannot read the chat: .*no system"):
        load(max_bad_share=0.0, checks=checks)
    assert template_checks(resolve({}), base, base) == []  # one tokenizer


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
