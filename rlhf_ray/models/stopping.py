"""Which tokens end a response."""

from typing import Any

from transformers import GenerationConfig

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.models.loading import load_tokenizer


def generation_config(model: str, template: TemplateConfig | None = None) -> GenerationConfig:
    """The model's own, with every stop token: an engine that knows no template ends turns too."""
    try:
        settings = GenerationConfig.from_pretrained(model)
    except OSError:
        settings = GenerationConfig()
    ids = list(stop_token_ids(model, template))
    settings.eos_token_id = ids if len(ids) > 1 else ids[0]
    return settings


def stop_token_ids(model: str, template: TemplateConfig | None = None) -> tuple[int, ...]:
    """Every eos id of the tokenizer and of the generation config, and the template's end of turn.

    The pad id is never among them.

    Args:
        model: folder or hub name.
        template: which layout prompts have.

    Raises:
        DataError: nothing would ever end a response.
    """
    tokenizer: Any = load_tokenizer(model)
    try:
        listed: Any = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        listed = None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    ids.add(Renderer(tokenizer, template).end_of_turn_id)
    ids -= {None, tokenizer.pad_token_id}
    if not ids:
        raise DataError(f"{model} names no end-of-sequence token; set eos_token in its tokenizer")
    return tuple(sorted(ids))
