"""Reference answers of held-out prompts, with which models' answers are compared."""

from collections.abc import Sequence

import numpy as np

from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.rows import parse_bool, row_tools
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.types import Prompt, Rollout

_COLUMNS = ("reference", "completion", "chosen")


def reference_answers(prompt: Prompt) -> list[str]:
    """Return the good answers in a prompt's columns; empty if there are none.

    They are in `reference` (a text or a list of texts), else `completion` (unless `label` is
    false), else `chosen`.
    """
    for column in _COLUMNS:
        value = prompt.fields.get(column)
        if column == "completion" and parse_bool(prompt.fields.get("label")) is False:
            continue
        texts = value if isinstance(value, list | tuple) else [value]
        answers = [text for text in texts if isinstance(text, str) and text.strip()]
        if answers:
            return answers
    return []


def reference_rollouts(
    prompts: Sequence[Prompt], renderer: Renderer, max_length: int
) -> list[Rollout]:
    """Return the first reference answer of each prompt that has one, as if it had been sampled.

    Its tokens are those that a stage would train on, end token included.
    """
    answers = []
    for position, prompt in enumerate(prompts):
        texts = reference_answers(prompt)
        if not texts:
            continue
        try:
            given, tools = prompt.fields.get("messages") or prompt.text, row_tools(prompt.fields)
            rendered = renderer.full(given, texts[0], tools=tools)
        except BadRow:  # the template refuses this answer, so there is none to measure
            continue
        ids = rendered.token_ids[rendered.num_prompt_tokens :]
        ids = ids[: max_length - len(prompt.token_ids)]
        answers.append(
            Rollout(
                position=position,
                prompt=prompt,
                response_ids=np.array(ids, dtype=np.int64),
                rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
                finish_reason="stop",
                version=0,
                text=texts[0],
            )
        )
    return answers
