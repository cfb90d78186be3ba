"""Stage evaluate: compare the SFT model with what was trained from it, on held-out prompts.

Every model answers the same prompts under the same seeds; judges say which answers are better.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, combinations
from math import comb, isnan
from statistics import fmean

import numpy as np
from rich.console import Console

from rlhf_ray import interruption
from rlhf_ray.config import Config
from rlhf_ray.data.datasets.reference_answers import reference_answers, reference_rollouts
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.stack_exchange.synthetic_site import gold_score
from rlhf_ray.disk import write_atomically
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.people.pairs import shown_fields
from rlhf_ray.people.preferences import preferences_path, read_preferences
from rlhf_ray.rewards.rouge import rouge
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.evaluate.answers import (
    SAMPLES_PER_INSTRUCTION,
    answers_of_models,
    begin_likelihood,
    perplexities,
)
from rlhf_ray.stages.evaluate.comparison import (
    SCORES,
    Samples,
    Summary,
    follow,
    outcomes_by_judge,
    outcomes_by_people,
    outcomes_by_score,
    summarize,
)
from rlhf_ray.stages.evaluate.inputs import Inputs, load_inputs
from rlhf_ray.stages.evaluate.records import log_metrics, metrics_of, tables, withdraw_summary
from rlhf_ray.types import Rollout

LOG_WIDTH = 100
"""Columns of a table where the output is no terminal and has no width."""


def run(config: Config) -> Summary:
    """Sample every model, score the answers, compare; returns the summary that it wrote."""
    start_s = time.monotonic()
    folder = RunFolder(config)
    inputs = load_inputs(folder)
    num_prompts = len(inputs.prompts)
    per_model = num_prompts + SAMPLES_PER_INSTRUCTION * len(inputs.instructions)
    references = _references(inputs)
    if references:
        begin_likelihood(inputs)
    progress = Progress(config.run.stages)
    with progress.stage("evaluate", len(inputs.adapters) * per_model, "sample") as bar:
        answers = interruption.run(answers_of_models(inputs, bar, progress.say))
        samples = {name: each.held_out for name, each in answers.items()}
        _add_scores(samples, inputs)
        outcomes = {judge: _outcomes(config, judge, samples, bar) for judge in inputs.judged_by}
        perplexity = _perplexities(inputs, references, bar, progress.say)
    summary = summarize(samples, outcomes, config.evaluate.bootstrap, config.run.seed)
    followed = follow(inputs.instructions, answers)
    for name, model in summary["models"].items():
        if perplexity:
            model["perplexity"] = perplexity[name]
        if followed:
            rates = [row["models"][name]["pass_rate"] for row in followed]
            model["instruction_pass_rate"] = fmean(rates)
    # First: what is written from here on must not count as what an earlier summary describes.
    withdraw_summary(folder.stage("evaluate"))
    _write_lines(folder, "samples", _side_by_side(samples, inputs))
    _write_lines(folder, "prompts", _of_prompts(inputs, [*samples], outcomes))
    _write_lines(folder, "instructions", followed)
    log_metrics(config, folder.stage("evaluate"), inputs.policy_version or 0, metrics_of(summary))
    summary |= {
        "num_prompts": num_prompts,
        "policy_version": inputs.policy_version,
        "asked": config.evaluate.asked,
        "seconds": time.monotonic() - start_s,
    }
    folder.write_summary("evaluate", summary)
    _print_tables(summary)
    return summary


def _add_scores(samples: Samples, inputs: Inputs) -> None:
    """Add the scores that need no model: gold and ROUGE-L."""
    for row in chain.from_iterable(samples.values()):
        if inputs.has_gold:
            row.scores["gold"] = gold_score(row.prompt.fields["question"], row.text)
        if "rouge" in inputs.judged_by:
            scores = [rouge("rougeL", row.text, text) for text in reference_answers(row.prompt)]
            row.scores["rouge"] = max(scores, default=None)


def _outcomes(config: Config, judge: str, samples: Samples, bar: Bar) -> np.ndarray:
    if judge == "people":
        path = preferences_path(RunFolder(config).path)
        return outcomes_by_people(read_preferences(path).standing(), samples)
    if judge != "judge":
        return outcomes_by_score(samples, judge)
    assert config.evaluate.judge is not None, "refused when the config is read"
    num_pairs = comb(len(samples), 2) * len(next(iter(samples.values())))
    bar.restart(num_pairs, "verdict")
    return interruption.run(outcomes_by_judge(config.evaluate.judge, samples, bar))


def _references(inputs: Inputs) -> list[Rollout]:
    """Return the held-out rows' own answers, on which perplexity is measured; there may be none."""
    config = inputs.config
    renderer = Renderer(inputs.tokenizer, config.template)
    return reference_rollouts(inputs.prompts, renderer, config.model.max_length)


def _perplexities(
    inputs: Inputs, references: Sequence[Rollout], bar: Bar, say: Callable[[str], None]
) -> dict[str, float]:
    """Measure each model on the reference answers; empty where there are none."""
    if not references:
        return {}
    bar.restart(len(inputs.adapters) * len(references), "reference answer")
    return interruption.run(perplexities(inputs, references, bar, say))


def _side_by_side(samples: Samples, inputs: Inputs) -> list[dict[str, object]]:
    """Make a line for each prompt, with every model's answer and its scores."""
    lines: list[dict[str, object]] = [{"prompt": prompt.text} for prompt in inputs.prompts]
    for name, rows in samples.items():
        for line, row in zip(lines, rows, strict=True):
            scores = {score: row.scores[score] for score in SCORES if score in row.scores}
            line[name] = {"text": row.text, **scores}
    return lines


def _of_prompts(
    inputs: Inputs, models: Sequence[str], outcomes_by_judge: Mapping[str, np.ndarray]
) -> list[dict[str, object]]:
    """Make a line for each prompt: its columns, and each judge's outcome for every two models.

    An outcome is that of the first of the two: 1 won, 0 lost, .5 tied, None unknown.
    """
    pairs = [*combinations(range(len(models)), 2)]
    lines: list[dict[str, object]] = []
    for number, prompt in enumerate(inputs.prompts):
        judged: dict[str, list[tuple[str, str, float | None]]] = {}
        for judge, won_MMN in outcomes_by_judge.items():
            known = ((i, j, float(won_MMN[i, j, number])) for i, j in pairs)
            judged[judge] = [
                (models[i], models[j], None if isnan(won) else won) for i, j, won in known
            ]
        lines.append({"fields": shown_fields(prompt.text, prompt.fields), "judged": judged})
    return lines


def _write_lines(folder: RunFolder, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a JSON Lines file of the stage, or remove it where there are no rows."""
    path = folder.stage("evaluate") / f"{name}.jsonl"
    if rows:
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.unlink(missing_ok=True)


def _print_tables(summary: Summary) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    for table in tables(summary):
        console.print(table)
