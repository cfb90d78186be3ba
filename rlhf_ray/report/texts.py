"""The report's sections of the models' texts; each is empty if the run lacks its data."""

from collections.abc import Sequence

from rlhf_ray.report.data import Record, RunFiles, number

MAX_TEXT = 1500
"""Characters of a sample text that the report shows at most."""

_MAX_SAMPLES = 8
_MAX_VERSIONS = 6
_MAX_EXTREMES = 3


def samples(files: RunFiles) -> list[Record]:
    """Return the first held-out questions with each model's answers, texts shortened."""
    shown = []
    for record in files.samples[:_MAX_SAMPLES]:
        answers = [
            {
                "model": model_title(model),
                "text": short(answer.get("text", "")),
                "scores": [
                    (name, value)
                    for name in ("reward", "gold", "rouge")
                    if (value := number(answer, name)) is not None
                ],
            }
            for model, answer in record.items()
            if isinstance(answer, dict)
        ]
        shown.append({"prompt": short(record.get("prompt", "")), "answers": answers})
    return shown


def model_title(name: str) -> str:
    """Return the display name of a model: stages in capitals, folders as they are."""
    return name.upper() if name.partition("@")[0] in ("sft", "dpo", "ppo") else name


def fixed_prompts(files: RunFiles) -> list[Record]:
    """Return each fixed prompt with the responses of evenly spaced versions."""
    evaluations = [record for record in files.evaluations if record.get("samples")]
    by_prompt: dict[str, list[Record]] = {}
    for record in _evenly(evaluations, _MAX_VERSIONS):
        for sample in record["samples"]:
            by_prompt.setdefault(str(sample.get("prompt", "")), []).append(
                {
                    "version": record.get("version", "–"),
                    "iteration": record.get("iteration", "–"),
                    "response": short(sample.get("response", "")),
                    "score": number(sample, "score"),
                }
            )
    return [
        {"prompt": short(prompt), "responses": responses} for prompt, responses in by_prompt.items()
    ]


def extremes(files: RunFiles) -> list[tuple[str, list[Record]]]:
    """Return the samples at the highest reward and at the largest KL, under their headings."""
    headings = {"score": "At the highest reward", "kl": "At the largest KL"}
    return [
        (heading, [_rollout(record) for record in found])
        for name, heading in headings.items()
        if (found := files.highest.get(name) or _highest(files.completions, name))
    ]


def _highest(records: Sequence[Record], name: str) -> list[Record]:
    """Return those with the highest values: of the latest samples, for a run without an index."""
    known = [(value, record) for record in records if (value := number(record, name)) is not None]
    known.sort(key=lambda each: -each[0])
    return [record for _, record in known[:_MAX_EXTREMES]]


def last_rollouts(files: RunFiles) -> list[Record]:
    """Return the latest logged training rollouts, texts shortened."""
    return [_rollout(record) for record in files.completions[-_MAX_SAMPLES:]]


def _rollout(record: Record) -> Record:
    return {
        "iteration": record.get("iteration", "–"),
        "prompt": short(record.get("prompt", "")),
        "response": short(record.get("response", "")),
        "finish_reason": record.get("finish_reason") or "–",
        **{name: number(record, name) for name in ("score", "kl", "length")},
    }


def _evenly(records: Sequence[Record], most: int) -> list[Record]:
    """Return at most ``most`` evenly spaced records, with the first and the last."""
    if len(records) <= most:
        return list(records)
    step = (len(records) - 1) / (most - 1)
    return [records[round(index * step)] for index in range(most)]


def short(text: object) -> str:
    """Return a text that is cut where it is longer than `MAX_TEXT`."""
    text = str(text)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
