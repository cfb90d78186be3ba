"""The command generate: samples of a run's models on the same prompts, side by side."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, TypedDict

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.people.pairs import Candidate, Pair, make_pair, shown_fields
from rlhf_ray.runs.datasets import held_out_prompts
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import RunModel, find_model, policies
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
    generators = Generators(config, temperature=temperature, max_tokens=max_tokens)
    answers = _answers(config, generators, chosen, chosen_prompts)
    return [
        {"prompt": prompt.text, "samples": samples}
        for prompt, samples in zip(chosen_prompts, answers, strict=True)
    ]


def sampled_pairs(config: Config, models: Sequence[str], num: int) -> Iterator[Pair]:
    """Yield a pair for every two of a run's models and held-out prompt, for people to rank.

    Args:
        config: the run's.
        models: names as in `find_model`.
        num: most prompts.
    """
    chosen = [find_model(config, name) for name in models]
    tokenizer = load_tokenizer(chosen[0].path, config.model)
    prompts = held_out_prompts(config, RunFolder(config), tokenizer, num)
    answers = _answers(config, Generators(config), chosen, prompts)
    for index, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)):
        fields, seed = shown_fields(prompt.text, prompt.fields), config.run.seed + index
        sides = [Candidate(text, name, seed) for name, text in texts.items()]
        for first, second in combinations(sides, 2):
            yield make_pair(prompt.text, fields, first, second)


def _answers(
    config: Config, generators: Generators, models: Sequence[RunModel], prompts: Sequence[Prompt]
) -> list[dict[str, str]]:
    """Return, for each prompt, an answer by name of the model; all have the prompt's seed."""
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for model in models:
        generator = generators.of(model)
        for index, (prompt, by_model) in enumerate(zip(prompts, answers, strict=True)):
            by_model[model.name] = generator.answer(prompt.token_ids, config.run.seed + index)
    return answers


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
