"""Stop conditions of a response: stop tokens, stop strings and its length limit."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import first_line
from rlhf_ray.models.load_arguments import writable
from rlhf_ray.models.tokenizers import STRICT, load_tokenizer
from rlhf_ray.types import FinishReason

Decode = Callable[[Sequence[int]], str]
"""Token ids of a response -> text that continues the prompt, special tokens included."""

CONTEXT = 8
"""Last tokens of a prompt that are decoded along, since the first word depends on them."""


@dataclass(frozen=True, slots=True)
class StopConditions:
    """Length limits and stop strings; plain values, so that they can be sent to other processes.

    Stop tokens are in the `SamplingRule`, since they also shape the distribution (``min_tokens``).
    """

    max_tokens: int
    """Longest response, tokens."""
    strings: tuple[str, ...] = ()
    """A response ends with the token that completes any of these."""
    limits: tuple[int, int] | None = None
    """Range that each response's own limit is drawn from, tokens, upper end excluded; None: the
    limit is ``max_tokens``."""

    def limit(self, seed: int) -> int:
        """Return the length limit of the response with this seed, tokens.

        It depends on the seed alone, so every engine draws the same limit.
        """
        if self.limits is None:
            return self.max_tokens
        return random.Random(f"length/{seed}").randrange(*self.limits)

    def finish_reason(
        self, token_ids: Sequence[int], limit: int, rule: SamplingRule, decode: Decode
    ) -> FinishReason | None:
        """Return why a response ends with its last token, or None if it continues."""
        if token_ids[-1] in rule.stop_token_ids:
            return "stop"
        if len(token_ids) > rule.min_tokens and self.completes_string(token_ids, decode):
            return "stop"
        return "length" if len(token_ids) == limit else None

    def completes_string(self, token_ids: Sequence[int], decode: Decode) -> bool:
        """Return whether the last token completes a stop string, maybe with text after it."""
        if not self.strings:
            return False
        # A character whose bytes are not all there yet decodes to replacement characters.
        before, text = decode(token_ids[:-1]).rstrip("\ufffd"), decode(token_ids)
        return any(
            text.find(string, max(0, len(before) - len(string) + 1)) >= 0 for string in self.strings
        )


def stop_token_ids(
    model: str, template: TemplateConfig | None = None, settings: ModelConfig = STRICT
) -> tuple[int, ...]:
    """Return the eos ids of tokenizer and generation config, and the template's end of turn.

    The pad id is never among them.

    Raises:
        DataError: there is no such id, so no response would ever stop.
    """
    tokenizer = load_tokenizer(model, settings)
    listed = _own_generation_config(model).eos_token_id
    candidates = [
        tokenizer.eos_token_id,
        Renderer(tokenizer, template).end_of_turn_id,
        *(listed if isinstance(listed, list) else [listed]),
    ]
    ids = {i for i in candidates if isinstance(i, int) and i != tokenizer.pad_token_id}
    if not ids:
        raise DataError(f"{model} names no end-of-sequence token; set eos_token in its tokenizer")
    return tuple(sorted(ids))


def generation_config(
    model: str, template: TemplateConfig | None = None, settings: ModelConfig = STRICT
) -> GenerationConfig:
    """Return the model's generation config with every stop token in it.

    An engine that knows no template then also stops at the end of a turn.
    """
    generation = _own_generation_config(model)
    ids = list(stop_token_ids(model, template, settings))
    generation.eos_token_id = ids if len(ids) > 1 else ids[0]
    return generation


def _own_generation_config(model: str) -> GenerationConfig:
    file = Path(model) / "generation_config.json"
    if Path(model).is_dir() and not file.is_file():
        return GenerationConfig()
    try:
        return writable(GenerationConfig.from_pretrained(model))
    except Exception as error:  # of whatever kind: the library uses values before it checks them
        if isinstance(error, OSError) and not file.is_file():  # a hub model without one
            return GenerationConfig()
        raise DataError(
            f"{file} cannot be read ({first_line(error)}); correct or remove it"
        ) from error
