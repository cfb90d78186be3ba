"""What a run learns from people: their verdicts judge its models and train its reward model."""

import json
import random
from pathlib import Path

import pytest
from command_line import Refused, command, copy_of
from test_evaluate import louder

from rlhf_ray.data.stack_exchange.synthetic_site import gold_score
from rlhf_ray.people.pairs import (
    Candidate,
    choose_pairs,
    evaluated_pairs,
    make_pair,
    write_pairs,
)
from rlhf_ray.people.preferences import preferences_path, read_preferences
from rlhf_ray.people.ranking import Ranking

COURTEOUS, RUDE = "I hope this helps you.", "Only a fool would ask this."


def rank_all(run: Path, person: str, preferred: str, *, num: int = 1000) -> None:
    """Answer as a person who prefers the answers that hold a text, or those of a model."""
    people = Ranking(run)
    for _ in range(num):
        shown = people.next(person)
        if shown is None:
            return
        is_left = preferred in (shown.sides[0].text + shown.sides[0].model)
        people.answer(person, shown.pair.id, "left" if is_left else "right")


def test_people_judge_the_answers_of_an_evaluation(
    whole_run: Path, tmp_path: Path, refused: Refused
) -> None:
    run = copy_of(whole_run, tmp_path)
    other = louder(whole_run / "checkpoints" / "latest" / "policy", tmp_path / "other")
    asked = (run, f"run.dir={run}", f"evaluate.models=[{other}]")
    by_people = "evaluate.judged_by=[people]"
    refused("evaluate", *asked, by_people, says=r"holds no verdict; .* rlhf-ray rank")
    assert command("evaluate", *asked, "evaluate.judged_by=[reward]") == 0
    pairs = choose_pairs(evaluated_pairs(run), "random", 8, seed=0)
    assert len(pairs) > 2
    write_pairs(run, pairs)
    rank_all(run, "ann", other)
    rank_all(run, "bob", "no such text", num=1)  # the right one, whichever it is
    assert command("evaluate", *asked, by_people) == 0
    summary = json.loads((run / "evaluate" / "summary.json").read_text())
    answers = read_preferences(preferences_path(run)).standing()
    (bobs,) = [answer for answer in answers if answer.person == "bob"]
    side = bobs.pair.first if bobs.preferred == "first" else bobs.pair.second
    lost = 0.0 if side.model == other else 0.5
    assert summary["judge"] == "people"
    assert summary["win_rate"]["value"] == pytest.approx(1 - lost / len(pairs))
    assert summary["judges"]["people"]["elo"][other]["value"] > 1000


def test_the_reward_model_learns_from_a_person_who_prefers_courteous_answers(
    whole_run: Path, tmp_path: Path
) -> None:
    """The person's verdicts are the only thing that tells the two answers of a pair apart."""
    draw, pairs = random.Random(0), []
    for number in range(60):
        question = f"How do I sort a list? {number}"
        ends = [COURTEOUS, RUDE]
        draw.shuffle(ends)
        sides = [Candidate(f"Use the sort call. {end}", "sft") for end in ends]
        prompt = f"Question: {question}\n\nAnswer: "
        pairs.append(make_pair(prompt, {"prompt": prompt, "question": question}, *sides))
    assert gold_score("How do I sort a list?", COURTEOUS) > gold_score("How?", RUDE)
    write_pairs(tmp_path, pairs)
    rank_all(tmp_path, "ann", COURTEOUS)
    path, run = preferences_path(tmp_path), tmp_path / "run"
    asked = (f"run.dir={run}", f"sft.path={whole_run}/sft/model", "run.stages=[reward]")
    learning = ("reward.steps=30", "reward.batch_size=8", "reward.learning_rate=1e-2")
    data = f"data.preferences=[{{path: {path}, weight: 1}}, {{path: {path}, weight: 0.2}}]"
    assert command("reward", whole_run, *asked, *learning, data) == 0
    summary = json.loads((run / "reward" / "summary.json").read_text())
    assert summary["accuracy"] == 1.0
    assert summary["pairs_train"] + summary["pairs_eval"] == 60 + 12
