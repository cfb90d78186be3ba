"""The report's section on data: statistics of the texts, and which rows were used."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlhf_ray.report.data import Record, RunFiles, number
from rlhf_ray.report.plots import counts, histogram
from rlhf_ray.report.sections import Chart

_TOGETHER = "rows with one prompt are all held out or all learnt from"
_PREPARED = "prepare's set evaluation, whose questions no training set has"
_EVALUATED = {"ppo": "ppo.eval_prompts", "evaluate": "evaluate.num_prompts"}
_KINDS = ("questions", "prompts", "answers", "texts")


@dataclass(frozen=True)
class RowCounts:
    """Rows that a stage read: kept and dropped."""

    stage: str
    kept: float
    dropped: Sequence[tuple[str, float]]
    """Reason and number of rows."""


def quality_charts(files: RunFiles) -> list[Chart]:
    """Draw lengths, scores and code languages, as counted when the data was read."""
    charts = []
    for name, quality in files.quality.items():
        of = "" if name == "prepare" else f" in {name}"
        kinds = _kinds(quality)
        charts += [
            *_lengths(f"Length of the texts{of}", kinds),
            *_scores(f"Score of the answers{of}", quality.get("scores"), name == "prepare"),
            *_languages(f"Programming languages in answers{of}", kinds.get("answers")),
        ]
    return charts


def duplicates(files: RunFiles) -> list[tuple[str, float, float]]:
    """Return per kind of text: its name, the number that repeat an earlier one, their share."""
    repeated = []
    for name, quality in files.quality.items():
        for kind, texts in _kinds(quality).items():
            num_texts, num_repeated = number(texts, "texts"), number(texts, "repeated")
            if num_texts and num_repeated is not None:
                label = kind if name == "prepare" else f"{name}: {kind}"
                repeated.append((label, num_repeated, num_repeated / num_texts))
    return repeated


def ties(files: RunFiles) -> tuple[float, float] | None:
    """Return number and share of pairs of answers to a question with equal scores."""
    counted = files.quality.get("prepare")
    num_pairs, num_ties = number(counted, "pairs", "pairs"), number(counted, "pairs", "ties")
    return (num_ties, num_ties / num_pairs) if num_pairs and num_ties is not None else None


def _kinds(quality: Record) -> dict[str, Record]:
    return {kind: quality[kind] for kind in _KINDS if isinstance(quality.get(kind), Mapping)}


def row_counts(files: RunFiles) -> list[RowCounts]:
    """Return the rows that each stage kept, and those that it dropped, by reason."""
    counts_by_stage = []
    for stage, summary in files.summaries.items():
        for part, counted in _counted(summary):
            reasons = {
                name: number(counted, name) for name in counted if not name.startswith("kept")
            }
            dropped = [(name.replace("_", " "), num) for name, num in reasons.items() if num]
            label = f"{stage}, {part.replace('_', ' ')}" if part else stage
            counts_by_stage.append(RowCounts(label, number(counted, "kept") or 0, dropped))
    return counts_by_stage


def held_out(files: RunFiles) -> list[tuple[str, float | None, str]]:
    """Return of each stage that measures on held-out rows: their number, and how they were drawn.

    Every draw is by the run's seed, and repeats whenever the stage is run again.
    """
    drawn = []
    for stage, summary in files.summaries.items():
        if stage in ("pretrain", "sft"):
            drawn.append((stage, None, f"A twentieth of the texts; {_TOGETHER}"))
        elif stage in ("reward", "dpo"):
            num = number(summary, "pairs_eval")
            num = number(summary, "rows_eval") if num is None else num
            how = _of_pairs(files) + _at_most(files, f"{stage}.eval_rows")
            drawn.append((stage, num, how))
        elif stage in _EVALUATED:
            drawn.append((stage, None, _of_prompts(files) + _at_most(files, _EVALUATED[stage])))
    return drawn


def _at_most(files: RunFiles, key: str) -> str:
    most = files.option(key)
    return "" if most is None else f"; at most {most} ({key})"


def _of_pairs(files: RunFiles) -> str:
    if "rank" in (files.option("run.stages") or ()):
        return f"A sample of people's pairs and those mixed with them, a twentieth; {_TOGETHER}"
    if files.option("data.preferences") is None:
        return f"A sample of {_PREPARED}"
    return f"A sample of data.preferences, a twentieth; {_TOGETHER}"


def _of_prompts(files: RunFiles) -> str:
    if files.option("data.eval") is not None:
        return "A sample of data.eval"
    if files.option("data.prompts") is None:
        return f"A sample of {_PREPARED}"
    return f"A sample of a tenth of data.prompts, which was drawn as well; {_TOGETHER}"


def _counted(summary: Record) -> Iterator[tuple[str, Record]]:
    """Yield the counts in a stage's summary, of all its rows or of each part of them."""
    for key in ("rows", "prompts_dropped"):
        value = summary.get(key)
        if isinstance(value, Mapping) and "kept" in value:
            yield "", value
        elif isinstance(value, Mapping):
            parts = {part: counted for part, counted in value.items() if isinstance(counted, dict)}
            yield from ((part, counted) for part, counted in parts.items() if "kept" in counted)


def _lengths(title: str, kinds: Mapping[str, Record]) -> Iterator[Chart]:
    bounds = next((kind.get("length_bounds") for kind in kinds.values()), None)
    shares = {
        name: [100 * num / kind["texts"] for num in kind["lengths"]]
        for name, kind in kinds.items()
        if kind.get("texts")
    }
    if bounds and shares:
        labels = [f"{bound:g}" for bound in bounds]
        svg = histogram(title, labels, shares, "characters", "% of the texts")
        yield Chart(
            title, Markup(svg), "Each bar counts the texts from its length up to the next one."
        )


def _scores(title: str, scores: Record | None, by_votes: bool) -> Iterator[Chart]:
    if scores:
        bars = {"answers": list(scores.values())}
        svg = histogram(title, list(scores), bars, "score", "answers")
        votes = "log2 of the upvotes, rounded, plus one if accepted; -1 for negative votes."
        yield Chart(title, Markup(svg), votes if by_votes else "Rounded to whole numbers.")


def _languages(title: str, answers: Record | None) -> Iterator[Chart]:
    if answers and answers.get("languages"):
        svg = counts(title, answers["languages"], "code fences")
        yield Chart(
            title,
            Markup(svg),
            "Language named by the code fence; fences that name none are counted apart.",
        )
