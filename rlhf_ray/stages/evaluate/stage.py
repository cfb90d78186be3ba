"""Stage evaluate: SFT against what was made of it, same held-out prompts and seeds."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from math import comb
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_ray.config import Config
from rlhf_ray.data.datasets.instructions import Instruction, load_instructions
from rlhf_ray.data.datasets.reference_answers import reference_answers, reference_rollouts
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.stack_exchange.synthetic_site import gold_score
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.errors import DataError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.rewards.rouge import rouge
from rlhf_ray.runs.datasets import held_out_prompts
from rlhf_ray.runs.folder import RunFolder, write_atomically
from rlhf_ray.serving.text_generation import prompt_ids
from rlhf_ray.stages.evaluate.answers import (
    SAMPLES_PER_INSTRUCTION,
    answers_of_models,
    perplexities,
)
from rlhf_ray.stages.evaluate.comparison import (
    SCORES,
    Samples,
    follow,
    outcomes_by_judge,
    outcomes_by_score,
    summarize,
)
from rlhf_ray.stages.evaluate.models import AdapterFiles, compared_models
from rlhf_ray.stages.evaluate.records import metrics_of, tables, tell
from rlhf_ray.types import Prompt

LOG_WIDTH = 100
"""Columns of a log, which has none of its own."""


def run(config: Config) -> dict[str, Any]:
    """Sample every model, rate, compare; returns the summary that it wrote.

    Raises:
        DataError: there is no trained policy, or something that the config asks for.
    """
    started = time.monotonic()
    folder = RunFolder(config)
    sft_model, settings = folder.sft_model(), config.evaluate
    tokenizer = load_tokenizer(sft_model)
    newest = Checkpoints(folder.path / "checkpoints", config.ppo.keep_checkpoints, {}).latest()
    adapters = compared_models(folder, newest)
    prompts = held_out_prompts(config, folder, tokenizer, settings.num_prompts)
    has_gold = is_synthetic(config, folder)
    judged_by = _judged_by(config, has_gold, prompts)
    instructions = load_instructions(settings.instructions) if settings.instructions else ()
    told = instructed_prompts(config, tokenizer, instructions)

    total = len(adapters) * (len(prompts) + SAMPLES_PER_INSTRUCTION * len(told))
    progress = Progress(config.run.stages)
    with progress.stage("evaluate", total, "sample") as bar:
        reward_model = folder.reward_model()
        answers = asyncio.run(
            answers_of_models(
                config, sft_model, reward_model, adapters, prompts, told, bar, progress.say
            )
        )
        samples = {name: given.held_out for name, given in answers.items()}
        _add_scores(samples, [*judged_by, *(["gold"] if has_gold else [])])
        outcomes = {judge: _outcomes(config, judge, samples, bar) for judge in judged_by}
        perplexity = _perplexities(config, sft_model, tokenizer, adapters, prompts, bar)
    summary = summarize(samples, outcomes, settings.bootstrap, config.run.seed)
    followed = follow(instructions, answers)
    for name, model in summary["models"].items():
        if perplexity:
            model["perplexity"] = perplexity[name]
        if followed:
            model["instruction_pass_rate"] = fmean(
                row["models"][name]["pass_rate"] for row in followed
            )
    version = newest.version if newest else None
    _write_lines(folder, "samples", _side_by_side(samples, prompts))
    _write_lines(folder, "instructions", followed)
    tell(config, folder.stage("evaluate"), version or 0, metrics_of(summary))
    summary |= {
        "num_prompts": len(prompts),
        "policy_version": version,
        "asked": settings.asked,
        "seconds": time.monotonic() - started,
    }
    folder.write_summary("evaluate", summary)
    _show(summary)
    return summary


def _show(summary: Mapping[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    for view in tables(summary):
        console.print(view)


def is_synthetic(config: Config, folder: RunFolder) -> bool:
    """Whether the held-out questions are the synthetic site's, whose gold score is known."""
    prepared = folder.summary("prepare")
    own = config.data.eval or config.data.prompts
    return own is None and prepared is not None and bool(prepared["synthetic"])


def instructed_prompts(
    config: Config, tokenizer: Any, instructions: Sequence[Instruction]
) -> list[Prompt]:
    """What a user says, laid out as in a conversation.

    Raises:
        DataError: one leaves no room for an answer.
    """
    room = config.model.max_length - config.rollout.max_tokens
    prompts = []
    for index, instruction in enumerate(instructions):
        messages = [{"role": "user", "content": instruction.prompt}]
        ids = prompt_ids(config, tokenizer, messages)
        if len(ids) > room:
            raise DataError(
                f"evaluate.instructions: {instruction.prompt[:80]!r} has {len(ids)} tokens, and "
                f"model.max_length less rollout.max_tokens leaves {room}; shorten it, or raise "
                "model.max_length"
            )
        prompts.append(Prompt(f"instruction-{index}", instruction.prompt, tuple(ids)))
    return prompts


def _judged_by(config: Config, has_gold: bool, prompts: Sequence[Prompt]) -> Sequence[str]:
    """What decides which answer is better.

    Raises:
        DataError: the held-out rows have not what it needs.
    """
    judged_by = config.evaluate.judged_by
    if judged_by is None:
        return ["gold" if has_gold else "reward"]
    if "gold" in judged_by and not has_gold:
        raise DataError(
            "evaluate.judged_by names gold, which is known of the synthetic site's questions alone "
            "(prepare without prepare.posts, and neither data.prompts nor data.eval); leave it out"
        )
    if "rouge" in judged_by and not any(map(reference_answers, prompts)):
        raise DataError(
            f"evaluate.judged_by names rouge, and none of the {len(prompts)} held-out prompts has "
            "a text in a column reference, completion or chosen; name one in the data set's "
            "columns, for example columns: {reference: <its name>}"
        )
    return judged_by


def _add_scores(samples: Samples, names: Sequence[str]) -> None:
    for row in chain.from_iterable(samples.values()):
        if "gold" in names:
            row["gold"] = gold_score(row["prompt"].fields["question"], row["text"])
        if "rouge" in names:
            texts = reference_answers(row["prompt"])
            scores = [rouge("rougeL", row["text"], text) for text in texts]
            row["rouge"] = max(scores, default=None)


def _outcomes(config: Config, judge: str, samples: Samples, bar: Bar) -> np.ndarray:
    if judge != "judge":
        return outcomes_by_score(samples, judge)
    assert config.evaluate.judge is not None, "refused when the config is read"
    num_pairs = comb(len(samples), 2) * len(next(iter(samples.values())))
    bar.restart(num_pairs, "verdict")
    return asyncio.run(outcomes_by_judge(config.evaluate.judge, samples, bar))


def _perplexities(
    config: Config,
    sft_model: str,
    tokenizer: Any,
    adapters: Mapping[str, AdapterFiles],
    prompts: Sequence[Prompt],
    bar: Bar,
) -> dict[str, float]:
    """Of each model on the answers that the held-out rows bring along; empty where none does."""
    renderer = Renderer(tokenizer, config.template)
    answers = reference_rollouts(prompts, renderer, config.model.max_length)
    if not answers:
        return {}
    bar.restart(len(adapters) * len(answers), "given answer")
    return asyncio.run(perplexities(config, sft_model, adapters, answers, bar))


def _side_by_side(samples: Samples, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """A line for each prompt with every model's answer and its scores."""
    return [
        {
            "prompt": prompt.text,
            **{
                name: {key: rows[index][key] for key in ("text", *SCORES) if key in rows[index]}
                for name, rows in samples.items()
            },
        }
        for index, prompt in enumerate(prompts)
    ]


def _write_lines(folder: RunFolder, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON Lines file of the stage; none where there are no rows."""
    path = folder.stage("evaluate") / f"{name}.jsonl"
    if rows:
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.unlink(missing_ok=True)
