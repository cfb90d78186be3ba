"""The model card: README.md of an exported model."""

import html
import json
import re
from dataclasses import dataclass

import yaml

from rlhf_ray.runs.lineage import UNKNOWN, Lineage, Source, Step
from rlhf_ray.version import __version__

WRITTEN_BY = "<!-- Written by rlhf-ray export, which replaces this folder when run again. -->\n"
"""Line of the card that marks a folder as an export, which may be replaced."""


@dataclass(frozen=True)
class Exported:
    """The exported model that a card describes.

    Attributes:
        title: first heading.
        folder: where it was written, for the example code.
        task: CAUSAL_LM or SEQ_CLS.
        base: folder or hub name of an adapter's base; None: a whole model.
        survived: share of a merged adapter's changed weights that rounding kept.
        dtype: data type of a whole model's weights.
    """

    title: str
    folder: str
    task: str
    base: str | None
    survived: float | None
    dtype: str


def model_card(exported: Exported, history: Lineage) -> str:
    """Return the card as Markdown with a YAML head, in the form that the model hub reads."""
    parts = [
        f"---\n{yaml.safe_dump(_head(exported, history), sort_keys=False)}---\n",
        f"# {_text(exported.title)}\n",
        WRITTEN_BY,
        _description(exported),
        f"## Use\n\n{_block('python', _use(exported))}",
        f"## Lineage\n\nStarted from {_named(history.base)}.{_branched(history)}\n\n"
        f"{_steps(history)}",
        *([f"## Changes on resume\n\n{_changes(history)}"] if history.changes else []),
        f"## Numbers\n\n{_numbers(history)}",
        "## Settings\n\nWhat differs from the defaults.\n\n"
        + _block("yaml", yaml.safe_dump(dict(history.settings), sort_keys=False)),
    ]
    return "\n".join(parts)


def _text(text: str) -> str:
    """Return a name or licence as text of one line or cell: neither HTML nor Markdown."""
    return re.sub(r"([\\|\[\]`])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Return a name as code, fenced by more backticks than it holds; also in a cell of a table."""
    name = " ".join(text.split()).replace("|", "\\|")
    fence = _fence(name, 1)
    return f"{fence} {name} {fence}" if "`" in name else f"`{name}`"


def _block(language: str, code: str) -> str:
    fence = _fence(code, 3)
    return f"{fence}{language}\n{code}{fence}\n"


def _fence(code: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", code))])


def _head(exported: Exported, history: Lineage) -> dict[str, object]:
    is_lm = exported.task == "CAUSAL_LM"
    head: dict[str, object] = {
        "library_name": "transformers" if exported.base is None else "peft",
        "pipeline_tag": "text-generation" if is_lm else "text-classification",
        "base_model": exported.base or history.base.name,
        "tags": ["rlhf", *(step.stage for step in history.steps)],
    }
    if history.base.licence != UNKNOWN:
        head["license"] = history.base.licence
    return head


def _description(exported: Exported) -> str:
    kind = "language model" if exported.task == "CAUSAL_LM" else "reward model (one score a text)"
    if exported.base is not None:
        return (
            f"LoRA adapter of a {kind}, trained with rlhf_ray {__version__}. It needs its base, "
            f"{_code(exported.base)}.\n"
        )
    text = f"Whole {kind} in {exported.dtype}, trained with rlhf_ray {__version__}."
    if exported.survived is not None:
        text += (
            f" An adapter was merged into it: {exported.survived:.2%} of the weights that it "
            f"changes differ from the base's after rounding to {exported.dtype}."
        )
    return text + "\n"


def _use(exported: Exported) -> str:
    is_lm = exported.task == "CAUSAL_LM"
    library, auto, more = "transformers", "AutoModel", ""
    if exported.base is not None:
        library, auto, more = "peft", "AutoPeftModel", "" if is_lm else ", num_labels=1"
    auto += f"For{'CausalLM' if is_lm else 'SequenceClassification'}"
    return (
        f"from {library} import {auto}\n\n"
        f"model = {auto}.from_pretrained({exported.folder!r}{more})\n"
    )


def _branched(history: Lineage) -> str:
    origin = history.origin
    if origin is None:
        return ""
    return (
        f" PPO branched from version {origin.version} (iteration {origin.iteration}) of the run "
        f"{_code(origin.run)}."
    )


def _steps(history: Lineage) -> str:
    lines = ["| stage | origin | data | licence of the data |", "| --- | --- | --- | --- |"]
    lines += [_step_row(step) for step in history.steps]
    return "\n".join(lines) + "\n"


def _step_row(step: Step) -> str:
    if step.external:
        origin = f"external: {_code(step.result)}, its training is not known here"
        return f"| {_text(step.stage)} | {origin} | {UNKNOWN} | {UNKNOWN} |"
    names = "<br>".join(_text(source.name) for source in step.data)
    licences = "<br>".join(_text(source.licence) for source in step.data)
    return f"| {step.stage} | trained in this run | {names} | {licences} |"


def _changes(history: Lineage) -> str:
    lines = ["| key | before | now | changed after |", "| --- | --- | --- | --- |"]
    for change in history.changes:
        values = " | ".join(_code(json.dumps(value)) for value in (change.before, change.now))
        units = {s: "iteration" if s == "ppo" else "step" for s in change.after}
        after = ", ".join(f"{unit} {change.after[s]} of {s}" for s, unit in units.items())
        lines.append(f"| {_code(change.key)} | {values} | {_text(after or UNKNOWN)} |")
    return "\n".join(lines) + "\n"


def _numbers(history: Lineage) -> str:
    lines = ["| stage | number | value |", "| --- | --- | --- |"]
    for step in history.steps:
        lines += [
            f"| {_text(step.stage)} | {_text(name)} | {_text(_value(v))} |"
            for name, v in sorted(step.numbers.items())
        ]
    return "\n".join(lines) + "\n"


def _value(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _named(source: Source) -> str:
    return f"{_code(source.name)} (licence: {_text(source.licence)})"
