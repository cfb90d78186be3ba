"""The command generate: samples of a run's models on the same prompts, side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.runs.datasets import held_out_prompts
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import find_model, policies
from rlhf_ray.secrecy import printable
from rlhf_ray.serving.text_generation import Generators, prompt_ids
from rlhf_ray.types import Prompt

if TYPE_CHECKING:
    from rich.table import Table


class Samples(TypedDict):
    """A prompt's text, and an answer to it by name of the model."""

    prompt: str
    samples: dict[str, str]


def run(
    config: Config,
    *,
    models: Sequence[str] = (),
    prompts: Sequence[str] = (),
    num: int = 4,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> list[Samples]:
    """Sample every model on every prompt; the models share each prompt's seed."""
    chosen = [find_model(config, name) for name in models] or policies(config)
    tokenizer = load_tokenizer(chosen[0].path, config.model)
    if prompts:
        chosen_prompts = _user_prompts(config, tokenizer, prompts)
    else:
        chosen_prompts = held_out_prompts(config, RunFolder(config), tokenizer, num)
    rows: list[Samples] = [{"prompt": prompt.text, "samples": {}} for prompt in chosen_prompts]
    generators = Generators(config, temperature=temperature, max_tokens=max_tokens)
    for model in chosen:
        generator = generators.of(model)
        for index, (row, prompt) in enumerate(zip(rows, chosen_prompts, strict=True)):
            answer = generator.answer(prompt.token_ids, config.run.seed + index)
            row["samples"][model.name] = answer
    return rows


def _user_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Prompt]:
    if empty := [text for text in texts if not text.strip()]:
        raise DataError(f"A prompt is empty: {empty[0]!r}; give --prompt a text")
    return [
        Prompt(
            str(index),
            text,
            tuple(prompt_ids(config, tokenizer, [{"role": "user", "content": text}])),
        )
        for index, text in enumerate(texts)
    ]


def table(rows: Sequence[Samples]) -> "Table":
    """Format what `run` returned as a table for the terminal, one column a model."""
    from rich.table import Table
    from rich.text import Text

    names = list(rows[0]["samples"])
    view = Table(show_lines=True)
    for heading in ("prompt", *names):
        view.add_column(Text(printable(heading)), overflow="fold", ratio=1)
    for row in rows:
        texts = [row["prompt"], *(row["samples"][name] for name in names)]
        view.add_row(*(Text(printable(text)) for text in texts))
    return view
