"""How far people agree: Cohen's kappa of two, Krippendorff's alpha of any number."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.people.preferences import Answer

Labels = Mapping[str, str]
"""Person -> label that they gave to one pair."""


@dataclass(frozen=True)
class Agreement:
    """How far people agree on the pairs that at least two of them decided."""

    measure: Literal["Cohen's kappa", "Krippendorff's alpha"]
    value: float | None
    """1: always; 0: as often as by chance; None: no pair has two labels, or all have the same."""
    num_pairs: int
    """Pairs that at least two people decided."""


def agreement(answers: Iterable[Answer]) -> Agreement:
    """Measure the agreement of standing answers; skipped pairs have no label."""
    units = [unit for unit in labels_by_pair(answers).values() if len(unit) > 1]
    people = sorted({person for unit in units for person in unit})
    if len(people) > 2:
        return Agreement("Krippendorff's alpha", krippendorff_alpha(units), len(units))
    first, second = ([unit[person] for unit in units] for person in people or ("", ""))
    return Agreement("Cohen's kappa", cohen_kappa(first, second), len(units))


def labels_by_pair(answers: Iterable[Answer]) -> dict[str, dict[str, str]]:
    """Return pair -> person -> label, by the pair's own order; without skips."""
    labels: dict[str, dict[str, str]] = defaultdict(dict)
    for answer in answers:
        if answer.verdict != "skip":
            labels[answer.pair.id][answer.person] = answer.preferred
    return dict(labels)


def disputed(answers: Iterable[Answer]) -> list[str]:
    """Return the pairs on which people gave different labels."""
    return [pair for pair, unit in labels_by_pair(answers).items() if len({*unit.values()}) > 1]


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa (1960, doi:10.1177/001316446002000104) of two people's N labels.

    (p_o - p_e) / (1 - p_e): the observed share of equal labels, and the one expected if each gave
    labels as often as they do, but at random. None without labels, or where both gave one alone.
    """
    num = len(first)
    if not num:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / num
    counts, others = Counter(first), Counter(second)
    expected = sum(counts[label] * others[label] for label in counts) / num**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Iterable[Labels]) -> float | None:
    """Return Krippendorff's alpha of nominal labels (2011, Computing Krippendorff's Alpha).

    1 - D_o / D_e: observed and expected disagreement, from the coincidences of labels; a unit of m
    labels counts each ordered pair of them 1 / (m - 1) times. Units with one label count nothing.
    None where no two labels can be compared, or all are the same.
    """
    observed, totals = 0.0, Counter[str]()
    for unit in units:
        labels = Counter(unit.values())
        num = labels.total()
        if num < 2:
            continue
        totals.update(labels)
        observed += sum(count * (num - count) for count in labels.values()) / (num - 1)
    num = totals.total()
    expected = sum(count * (num - count) for count in totals.values())
    return None if not expected else 1 - (num - 1) * observed / expected
