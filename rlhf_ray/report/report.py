"""The HTML report of a run, finished or not, as one self-contained file."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from rlhf_ray.config import Config
from rlhf_ray.config.section import is_mapping
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import first_line
from rlhf_ray.observability.samples.hidden import unhidden
from rlhf_ray.report import activity, sections, story, texts
from rlhf_ray.report import evaluation as report_evaluation
from rlhf_ray.report import quality as report_quality
from rlhf_ray.report import reliability as report_reliability
from rlhf_ray.report.data import RunFiles, read_run

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
        highest={},
        origin={},
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
    yield "branch.json", {"origin": files.origin}
    yield "ppo/completions.index", {"highest": files.highest}
    yield "trace.json", {"spans": files.spans, "phase_totals": files.phase_totals}


_ENDED = {
    "failed": "ended with an error; the same command resumes it",
    "stopped": "was stopped on request; the same command resumes it",
}
"""What became of a run that has not finished, by its state in status.json."""


def _visible(value: object) -> object:
    """Show characters of a text that act or hide by their number; Markup is the page's own."""
    return unhidden(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def template(name: str) -> Template:
    """Return one of the page templates."""
    environment = Environment(
        loader=PackageLoader("rlhf_ray.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = sections.figure
    environment.filters["model_title"] = texts.model_title
    return environment.get_template(f"{name}.html.j2")


def _page(files: RunFiles) -> str:
    return template("report").render(
        name=files.name,
        started=files.started,
        written=datetime.now(),
        trained=story.trained(files),
        verdict=story.verdict(files),
        status=_status(files),
        chapters={
            "Did it get better?": story.outcomes(files),
            "Is it to be trusted?": story.grounds(files),
        },
        cost=activity.cost(files),
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
        samples=texts.samples(files),
        num_samples=len(files.samples),
        prompts=texts.fixed_prompts(files),
        extremes=texts.extremes(files),
        rollouts=texts.last_rollouts(files),
        time=activity.time_bars(files),
        config_text=yaml.safe_dump(dict(files.config), sort_keys=False) if files.config else "",
        odd=files.odd,
    )


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
    ended = _ENDED.get(files.state, "has not finished; it may still be running")
    return f"This run {ended}: {where}.{rest}"
