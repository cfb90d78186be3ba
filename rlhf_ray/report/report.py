"""The HTML report of a run, finished or not, as one self-contained file."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rlhf_ray.config import Config
from rlhf_ray.config.section import is_mapping
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import first_line
from rlhf_ray.observability.progress import clock_time
from rlhf_ray.report import evaluation as report_evaluation
from rlhf_ray.report import quality as report_quality
from rlhf_ray.report import reliability as report_reliability
from rlhf_ray.report import sections
from rlhf_ray.report.data import RunFiles, number, read_run

_RECORDS = {
    "evaluations": "ppo/eval.jsonl",
    "completions": "ppo/completions.jsonl",
    "warnings": "ppo/warnings.jsonl",
    "outages": "ppo/outages.jsonl",
    "changes": "changes.jsonl",
    "samples": "evaluate/samples.jsonl",
    "instructions": "evaluate/instructions.jsonl",
}
"""Fields of `RunFiles` with the records of one file."""


@dataclass(frozen=True)
class Card:
    """A key number."""

    title: str
    value: str
    explanation: str
    """What the number means, and which values are good."""


def run(config: Config) -> Path:
    """Draw the report of a run; returns its path."""
    return build(Path(config.run.dir))


def build(run_dir: Path) -> Path:
    """Write ``report.html`` into a run's folder from the files that exist there; return its path.

    Raises:
        DataError: the folder does not exist or holds nothing of a run.
    """
    report = run_dir / "report.html"
    write_page(report, render(read_run(run_dir)))
    return report


def write_page(path: Path, html: str) -> None:
    """Write a page; half characters, which texts of models may hold, become question marks."""
    write_atomically(path, html.encode("utf-8", "replace").decode("utf-8"))


def render(files: RunFiles) -> str:
    """Return the report as HTML, with all texts of the run escaped.

    A file whose contents cannot be drawn, such as a summary with a text for a number, is left out
    and named.

    Raises:
        DataError: no file alone is the cause.
    """
    try:
        return _page(files)
    except Exception:  # the files may hold anything
        whole = _without_odd_parts(files)
    try:
        return _page(whole)
    except Exception as error:
        raise DataError(
            f"The files of the run {files.name} cannot be drawn together "
            f"({type(error).__name__}: {first_line(error)}); they are not from one run of rlhf-ray"
        ) from error


def _without_odd_parts(files: RunFiles) -> RunFiles:
    """Draw each file alone; return them without those that cannot be drawn, which are named."""
    empty = replace(
        files,
        config={},
        summaries={},
        metrics={},
        quality={},
        phase_totals={},
        **dict.fromkeys(_RECORDS, ()),
        spans=(),
    )
    whole, odd = empty, dict(files.odd)
    for name, part in _parts(files):
        try:
            _page(replace(empty, **part))
        except Exception as error:
            odd[name] = f"is left out: it holds a value of another kind ({first_line(error)})"
            continue
        merged = {
            field: {**getattr(whole, field), **value} if is_mapping(value) else value
            for field, value in part.items()
        }
        whole = replace(whole, **merged)
    return replace(whole, odd=odd)


def _parts(files: RunFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what each file holds, as fields of `RunFiles`, with the file's name."""
    yield "config.yaml", {"config": dict(files.config)}
    for stage, summary in files.summaries.items():
        yield f"{stage}/summary.json", {"summaries": {stage: summary}}
    for stage, records in files.metrics.items():
        yield f"{stage}/metrics.jsonl", {"metrics": {stage: records}}
    for name, counted in files.quality.items():
        yield f"statistics of {name}", {"quality": {name: counted}}
    for field, name in _RECORDS.items():
        yield name, {field: getattr(files, field)}
    yield "trace.json", {"spans": files.spans, "phase_totals": files.phase_totals}


@functools.cache
def template(name: str) -> Template:
    """Return one of the page templates."""
    environment = Environment(
        loader=PackageLoader("rlhf_ray.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["model_title"] = sections.model_title
    return environment.get_template(f"{name}.html.j2")


def _page(files: RunFiles) -> str:
    return template("report").render(
        name=files.name,
        started=files.started,
        written=datetime.now(),
        trained=_trained(files),
        verdict=verdict(files),
        status=_status(files),
        cards=list(_cards(files)),
        charts=sections.ppo_charts(files),
        changes=sections.changes(files),
        warnings=sections.warnings(files),
        reliability=report_reliability.reliability(files),
        supervised=sections.supervised(files),
        data=files.summaries.get("prepare", {}),
        decimals={"held-out perplexity": 2},
        quality=report_quality.quality_charts(files),
        duplicates=report_quality.duplicates(files),
        ties=report_quality.ties(files),
        row_counts=report_quality.row_counts(files),
        held_out=report_quality.held_out(files),
        judged=report_evaluation.judged(files),
        model_numbers=report_evaluation.numbers(files),
        instructions=report_evaluation.instructions(files),
        samples=sections.samples(files),
        num_samples=len(files.samples),
        prompts=sections.fixed_prompts(files),
        rollouts=sections.last_rollouts(files),
        time=sections.time_charts(files),
        config_text=yaml.safe_dump(dict(files.config), sort_keys=False) if files.config else "",
        odd=files.odd,
    )


def verdict(files: RunFiles) -> str:
    """Return the run's outcome as a sentence."""
    if win_rate := report_evaluation.win_rate(files):
        rate, low, high = win_rate
        name = sections.model_title(report_evaluation.final_model(files))
        if low > 0.5:
            outcome = f"{name} beats SFT on held-out questions"
        elif high < 0.5:
            outcome = f"{name} loses to SFT on held-out questions"
        else:
            outcome = f"{name} and SFT do not differ significantly on held-out questions"
        return f"{outcome}: win rate {rate:.2f} (95% interval {low:.2f} to {high:.2f})."
    scores = [number(record, "objective/scores") for record in files.metrics.get("ppo", ())]
    known = [score for score in scores if score is not None]
    if known:
        first, last = known[:5], known[-5:]
        return (
            f"PPO's reward went from {sum(first) / len(first):.2f} to {sum(last) / len(last):.2f} "
            f"in {len(scores)} iterations; it has not been evaluated against SFT."
        )
    done = ", ".join(files.summaries)
    return f"Finished so far: {done}." if done else "No stage has finished yet."


def figure(value: float | None, decimals: int | None = None) -> str:
    """Format a number with three significant digits or the given decimals; a dash if unknown."""
    if value is None:
        return "–"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _trained(files: RunFiles) -> str:
    """Describe model and algorithm in a line; empty without a config."""
    if not files.config:
        return ""
    model = files.option("model.path") or "a tiny Llama built from the config"
    parts = [f"Base model: {model}"]
    if (rank := files.option("lora.r")) is not None:
        parts.append(f"LoRA rank {rank}")
    if (iterations := files.option("ppo.iterations")) is not None:
        parts.append(f"{iterations} PPO iterations of {files.option('ppo.batch_size')} rollouts")
    if (generators := files.option("generators.num")) is not None:
        ranks = [files.option(f"{role}.num_ranks") for role in ("policy", "critic")]
        parts.append(
            f"generators: {generators}, policy ranks: {ranks[0]}, critic ranks: {ranks[1]}"
        )
    return "; ".join(parts) + "."


def _status(files: RunFiles) -> str:
    """Describe what is still to come; empty for a finished run."""
    pending = files.pending()
    if not pending:
        return ""
    current, later = pending[0], pending[1:]
    num_records = len(files.metrics.get(current, ()))
    if current == "ppo" and num_records:
        total = files.option("ppo.iterations")
        where = f"PPO has done {num_records}" + (f" of {total}" if total else "") + " iterations"
    elif num_records:
        where = f"{current} has begun"
    else:
        where = f"{current} is next"
    rest = f" Still to come: {', '.join(later)}." if later else ""
    return f"This run has not finished; it may still be running: {where}.{rest}"


def _cards(files: RunFiles) -> Iterator[Card]:
    yield from _evaluation_cards(files)
    yield from _ppo_cards(files)
    accuracy = number(files.summaries.get("reward"), "accuracy")
    if accuracy is not None:
        yield Card(
            "Reward model accuracy",
            f"{accuracy:.1%}",
            "Share of held-out pairs in which it scores the better answer higher. "
            "50% is chance; noisy votes keep even a perfect model below 100%.",
        )
    measured = number(files.summaries.get("reward"), "benchmark", "accuracy")
    if measured is not None:
        yield Card(
            "Reward model on its benchmark",
            f"{measured:.1%}",
            "Share of the benchmark's pairs in which it scores the better answer higher.",
        )
    seconds = [_seconds(summary.get("seconds")) for summary in files.summaries.values()]
    if any(seconds):
        yield Card("Time", clock_time(sum(seconds)), "Total wall time of the finished stages.")


def _evaluation_cards(files: RunFiles) -> Iterator[Card]:
    evaluation, final = files.summaries.get("evaluate"), report_evaluation.final_model(files)
    name = sections.model_title(final)
    if win_rate := report_evaluation.win_rate(files):
        rate, low, high = win_rate
        yield Card(
            "Win rate against SFT",
            f"{rate:.2f}",
            f"How often {name}'s answer is better; ties count half. 95% interval "
            f"{low:.2f} to {high:.2f}; the gain is significant if it lies above 0.5.",
        )
    for key, title, explanation in (
        (
            "gold_mean",
            f"Gold score, SFT → {name}",
            "A hidden quality score that no model was trained on. If it rises, answers became "
            "better, not just better at pleasing the reward model.",
        ),
        (
            "reward_mean",
            f"Held-out reward, SFT → {name}",
            "Mean reward of the answers to unseen questions.",
        ),
    ):
        before = number(evaluation, "models", "sft", key)
        after = number(evaluation, "models", final, key)
        if after is not None:
            yield Card(title, f"{figure(before)} → {figure(after)}", explanation)


def _ppo_cards(files: RunFiles) -> Iterator[Card]:
    ppo = files.summaries.get("ppo")
    first, last = number(ppo, "reward_first"), number(ppo, "reward_last")
    if last is not None:
        yield Card(
            "Training reward, first → last",
            f"{figure(first)} → {figure(last)}",
            "Mean score of the rollouts in the first five and the last five iterations.",
        )
    kl = number(ppo, "kl_last")
    if kl is not None:
        yield Card(
            "KL to the reference",
            f"{figure(kl)} nats",
            "How far the policy has moved from the SFT model, per answer. "
            "Near 0 it has learnt nothing; far above 20 it often games the reward.",
        )
    episodes, rate = number(ppo, "episodes"), number(ppo, "episodes_per_s")
    if episodes is not None:
        speed = f", {figure(rate)} per second" if rate is not None else ""
        restarts = number(ppo, "generator_restarts") or 0
        yield Card(
            "Rollouts trained on",
            figure(episodes),
            f"Answers that PPO sampled and trained on{speed}. Generator restarts: {restarts:.0f}.",
        )


def _seconds(value: object) -> float:
    """Return a stage's seconds, given as a number or as phases, which may include a `total`."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, dict):
        return float(value.get("total", sum(value.values())))
    return 0.0
