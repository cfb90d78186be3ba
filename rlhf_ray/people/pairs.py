"""Pairs of answers that people are shown: their file, and which of many candidates are chosen."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_ray.disk import DAMAGE, write_atomically
from rlhf_ray.errors import DataError

FOLDER = "rank"
"""Folder of pairs and verdicts in that of a run."""
PAIRS = "pairs.jsonl"

_GIVEN = ("messages", "tools", "question")
"""Columns from which a prompt is rendered, besides its plain text."""

Choice = Literal["random", "uncertain", "disagreement"]


@dataclass(frozen=True)
class Candidate:
    """One of the two answers of a pair."""

    text: str
    model: str
    """Who wrote it: `sft`, `ppo@12`, or the folder of an adapter."""
    seed: int | None = None
    """With which it was sampled; None: not known."""
    reward: float | None = None
    """Raw score of the run's reward sources; None: not scored."""


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers."""

    id: str
    prompt: str
    """The text that is shown, as the policy read it."""
    fields: Mapping[str, object]
    """The prompt's columns in a dataset (prompt, messages, tools, question): what is trained on."""
    first: Candidate
    second: Candidate
    choice: Choice = "random"
    """Why it is shown."""
    judged: float | None = field(default=None)
    """A judge's outcome for the first answer: 1 won, 0 lost, a half tied; None: not judged."""

    @property
    def reward_gap(self) -> float | None:
        """Reward of the first answer less that of the second; None where one has no score."""
        if self.first.reward is None or self.second.reward is None:
            return None
        return self.first.reward - self.second.reward


def make_pair(
    prompt: str, fields: Mapping[str, object], first: Candidate, second: Candidate
) -> Pair:
    """Return a pair whose id follows from its texts and models: sampled again, it is the same."""
    parts = [prompt, first.text, second.text, first.model, second.model]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
    return Pair(digest, prompt, fields, first, second)


def shown_fields(prompt: str, columns: Mapping[str, object]) -> dict[str, object]:
    """Return a pair's ``fields``: a row with them becomes the same prompt again.

    Args:
        prompt: rendered.
        columns: `Prompt.fields`, which holds the messages where a template was applied.
    """
    given = {name: columns[name] for name in _GIVEN if columns.get(name)}
    return given if "messages" in given else {"prompt": prompt, **given}


def choose_pairs(pairs: Iterable[Pair], choice: Choice, num: int, seed: int) -> list[Pair]:
    """Choose at most ``num`` pairs with two different answers.

    Args:
        pairs: candidates.
        choice: random; uncertain: the smallest difference of rewards first; disagreement: those
            where a judge prefers one answer and the reward the other, the largest difference first.
        num: most pairs.
        seed: of the order where nothing else decides.

    Raises:
        DataError: no pair is left, or none has what the choice goes by.
    """
    different = {pair.id: pair for pair in pairs if pair.first.text != pair.second.text}
    usable = list(different.values())
    random.Random(f"pairs:{seed}").shuffle(usable)
    if not usable:
        raise DataError(
            "No pair of different answers to rank; sample more prompts, or at a higher temperature"
        )
    if choice != "random":
        usable = [pair for pair in usable if pair.reward_gap is not None]
        usable.sort(key=lambda pair: abs(pair.reward_gap or 0.0), reverse=choice == "disagreement")
    if choice == "disagreement":
        usable = [pair for pair in usable if _is_disagreement(pair)]
    if not usable:
        needs = (
            "of which both answers have a reward"
            if choice == "uncertain"
            else "on which a judge (evaluate.judged_by=[judge]) and the rewards disagree"
        )
        raise DataError(f"--choice {choice} found no pair {needs}; take --choice random")
    return [Pair(**{**vars(pair), "choice": choice}) for pair in usable[:num]]


def _is_disagreement(pair: Pair) -> bool:
    if pair.judged is None or pair.reward_gap is None:
        return False
    return (pair.judged - 0.5) * pair.reward_gap < 0


def pairs_path(run: Path) -> Path:
    """Return the file of a run's pairs."""
    return run / FOLDER / PAIRS


def write_pairs(run: Path, pairs: Sequence[Pair]) -> None:
    """Write a run's pairs, in the order in which they are shown.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    path = pairs_path(run)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))


def read_pairs(run: Path) -> list[Pair]:
    """Return a run's pairs; empty where none were written.

    Raises:
        DataError: the file is damaged.
    """
    path = pairs_path(run)
    if not path.exists():
        return []
    pairs: list[Pair] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pairs.append(_pair(json.loads(line)))
        except DAMAGE as error:
            raise DataError(
                f"{path}, line {number}, is no pair ({error}); remove the file to have pairs "
                "sampled again (verdicts are kept, in another file)"
            ) from error
    return pairs


def _pair(row: dict[str, object]) -> Pair:
    sides = {side: Candidate(**row.pop(side)) for side in ("first", "second")}  # type: ignore[arg-type]
    return Pair(**row, **sides)  # type: ignore[arg-type]


def evaluated_pairs(run: Path) -> list[Pair]:
    """Return a pair for every two models and prompt of a run's last evaluation.

    It needs neither model nor GPU, and works on a copied folder. Empty where none was done.

    Raises:
        DataError: the evaluation's files are damaged.
    """
    folder = run / "evaluate"
    samples = _lines(folder / "samples.jsonl", _side_by_side)
    prompts = _lines(folder / "prompts.jsonl", _about)
    if not prompts:  # an evaluation that is older than this file
        return [*chain.from_iterable(samples)]
    if len(prompts) != len(samples):
        raise DataError(
            f"{folder} has {len(samples)} prompts with samples and {len(prompts)} without; run the "
            "stage evaluate again"
        )
    return [
        replace(pair, fields=fields, judged=judged.get((pair.first.model, pair.second.model)))
        for pairs, (fields, judged) in zip(samples, prompts, strict=True)
        for pair in pairs
    ]


T = TypeVar("T")


def _lines(path: Path, read: Callable[[dict[str, Any]], T]) -> list[T]:
    """Read each line of one of evaluate's files; a missing one has none."""
    if not path.exists():
        return []
    found: list[T] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(read(json.loads(line)))
        except DAMAGE as error:
            raise DataError(
                f"{path}, line {number}, is damaged ({error}); run the stage evaluate again"
            ) from error
    return found


def _side_by_side(row: dict[str, Any]) -> list[Pair]:
    prompt = str(row.pop("prompt"))
    answers = [_candidate(model, answer) for model, answer in row.items()]
    fields = {"prompt": prompt}
    return [make_pair(prompt, fields, *sides) for sides in combinations(answers, 2)]


def _about(row: dict[str, Any]) -> tuple[dict[str, object], dict[tuple[str, str], float | None]]:
    """Return a prompt's columns, and what the first judge besides the rewards says of two models.

    People are no judge here: their verdicts are what the pairs are shown for.
    """
    judges = [each for name, each in row["judged"].items() if name not in ("reward", "people")]
    judged = {(first, second): won for first, second, won in (judges[0] if judges else ())}
    return row["fields"], judged


def _candidate(model: str, answer: object) -> Candidate:
    if not isinstance(answer, dict):
        raise ValueError(f"{model} has no answer")
    return Candidate(answer["text"], model, reward=answer.get("reward"))
