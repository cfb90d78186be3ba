"""What a run learns from people: their verdicts judge its models and train its reward model."""

import json
import random
import re
import shutil
import threading
from pathlib import Path

import datasets
import pytest
from command_line import Refused, command, copy_of
from test_evaluate import louder

from rlhf_ray.data.stack_exchange.synthetic_site import gold_score
from rlhf_ray.errors import DataError
from rlhf_ray.people.pairs import (
    Candidate,
    choose_pairs,
    evaluated_pairs,
    make_pair,
    read_pairs,
    write_pairs,
)
from rlhf_ray.people.preferences import preferences_path, read_preferences, training_rows
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


def test_a_run_samples_pairs_waits_for_people_and_its_reward_model_learns_from_them(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(whole_run, tmp_path)
    shutil.rmtree(run / "reward")
    stages = "run.stages=[prepare,pretrain,sft,rank,reward]"
    asked = (run, f"run.dir={run}", stages, "rank.answers=6", "rank.pairs=8", "rank.weight=2")
    assert command("run", *asked, "rank.wait=false") == 0
    assert "rank: 0 of 6 verdicts" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text())["status"]["state"] == "stopped"
    pairs = read_pairs(run)
    trained_on = datasets.load_from_disk(str(run / "prepare" / "rl"))["prompt"]
    assert 2 <= len(pairs) <= 8
    assert all(any(text.endswith(pair.prompt) for text in trained_on) for pair in pairs)
    assert not (run / "reward").exists()

    for person in ("ann", "bob", "cy"):
        rank_all(run, person, pairs[0].first.text, num=2)
    # A person who answers while the run waits: the last of six verdicts lets it go on.
    last = read_preferences(preferences_path(run)).standing()[-1]
    Ranking(run).undo(last.person)
    late = threading.Timer(2.0, Ranking(run).answer, (last.person, last.pair.id, last.verdict))
    late.start()
    assert command("run", *asked, "rank.wait=true") == 0
    late.join()
    assert read_pairs(run) == pairs
    printed = capsys.readouterr().out
    assert re.search(r"rank: waiting for people, at http://127\.0\.0\.1:\d+/\S+/", printed)
    summary = json.loads((run / "rank" / "summary.json").read_text())
    assert (summary["answers"], summary["people"]) == (6, 3)
    num_learnt = len([*training_rows(preferences_path(run))])
    learnt = json.loads((run / "reward" / "summary.json").read_text())
    # Twice as many of people's pairs as of prepare's, none of them twice.
    assert learnt["pairs_train"] + learnt["pairs_eval"] == num_learnt + round(num_learnt / 2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("reward.loss=mse", "reward.loss mse learns from single answers"),
        (
            "data.preferences=[{path: a.jsonl}, {path: b.jsonl}]",
            "give each of them a weight, to which rank.weight is relative",
        ),
    ],
)
def test_what_cannot_be_mixed_with_verdicts_is_refused(
    override: str, says: str, whole_run: Path, refused: Refused
) -> None:
    refused("plan", whole_run, "run.stages=[sft,rank,reward]", override, says=says)


def test_people_rank_two_versions_before_the_pairs_of_the_evaluation(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    run = copy_of(whole_run, tmp_path)
    monkeypatch.setattr("rlhf_ray.web.server.serve", lambda *_: None)
    policy = (run / "checkpoints" / "latest").resolve() / "policy"
    other = louder(policy, tmp_path / "louder")
    asked = ("evaluate.judged_by=[reward]", f"evaluate.models=[{other}]")
    assert command("evaluate", run, f"run.dir={run}", *asked) == 0
    refused("rank", run, "--choice", "disagreement", says="no pair on which a judge")
    assert command("rank", run, "--num", "3") == 0
    evaluated = read_pairs(run)
    assert all(pair.fields["question"] for pair in evaluated)
    version = policy.parent.name
    shutil.copytree(other, policy, dirs_exist_ok=True)  # untrained, it answers as the SFT model
    assert command("rank", f"{run}@{version}", "--num", "4") == 0
    pairs = read_pairs(run)
    sampled = pairs[: -len(evaluated)]
    assert pairs[-len(evaluated) :] == evaluated
    assert {(each.first.model, each.second.model) for each in sampled} == {
        ("sft", f"ppo@{version}")
    }


def test_pairs_of_an_evaluation_know_what_its_judge_said(whole_run: Path, tmp_path: Path) -> None:
    run = copy_of(whole_run, tmp_path)
    prompts = run / "evaluate" / "prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row in rows:
        row["judged"] = {"reward": [["sft", "ppo", 0.0]], "judge": [["sft", "ppo", 1.0]]}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = evaluated_pairs(run)
    assert [pair.judged for pair in pairs] == [1.0] * len(rows)
    prompts.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="run the stage evaluate again"):
        evaluated_pairs(run)
    prompts.unlink()  # an older evaluation
    assert [pair.id for pair in evaluated_pairs(run)] == [pair.id for pair in pairs]
