"""What a person says to a run's model: laid out as the run trains it, and answered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.config.template import TemplateConfig
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.rows import Message
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.models.stopping import stop_token_ids
from rlhf_ray.runs.models import RunModel
from rlhf_ray.serving.text_generation import Sampling, TextGenerator


def template_of(config: Config, tokenizer: Any) -> TemplateConfig:
    """The layout of a conversation.

    ``auto`` is decided by the rows of a data set; here it comes to Question/Answer where the run
    trains on what prepare wrote in that layout, or where there is no chat template.
    """
    if config.template.kind != "auto":
        return config.template
    prepared = config.data.prompts is None and (Path(config.run.dir) / "prepare").is_dir()
    kind = "question_answer" if prepared or not tokenizer.chat_template else "chat"
    return config.template.model_copy(update={"kind": kind})


def open_generator(
    config: Config,
    model: RunModel,
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> TextGenerator:
    """A model of the run, ready to answer.

    Answers end at stop tokens and after ``max_tokens``, also where ``rollout.ignore_eos`` and
    ``rollout.length_sampler`` let rollouts go on or cut them: these are for training.

    Args:
        config: the run's.
        model: which.
        temperature: None: ``rollout.temperature``.
        max_tokens: None: ``rollout.max_tokens``.

    Raises:
        DataError: it cannot be loaded.
    """
    sampling = Sampling(
        temperature=config.rollout.temperature if temperature is None else temperature,
        max_tokens=max_tokens or config.rollout.max_tokens,
        stop_token_ids=stop_token_ids(model.base, config.template),
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        min_tokens=config.rollout.min_tokens,
        stop=tuple(config.rollout.stop),
    )
    return TextGenerator(model.path, config.model, sampling)


def prompt_ids(config: Config, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to the answer that is to come.

    Raises:
        DataError: the chat template cannot render it.
    """
    renderer = Renderer(tokenizer, template_of(config, tokenizer))
    try:
        layout = renderer.prompt(list(messages))
    except BadRow as bad:
        raise DataError(f"The conversation cannot be laid out: {bad.why}") from bad
    return renderer.tokenize([layout], ended=False)[0].token_ids
