"""Verdicts of people: nothing is lost, sides are undone, agreement matches numbers by hand."""

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading.rows import unpack_row
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.errors import DataError
from rlhf_ray.people.agreement import cohen_kappa, krippendorff_alpha
from rlhf_ray.people.pairs import (
    Candidate,
    Pair,
    choose_pairs,
    evaluated_pairs,
    make_pair,
    read_pairs,
    write_pairs,
)
from rlhf_ray.people.preferences import (
    Answer,
    Undo,
    append,
    preferences_path,
    read_preferences,
    training_rows,
)
from rlhf_ray.people.ranking import Ranking


def pair(number: int, gap: float | None = None, judged: float | None = None) -> Pair:
    first = Candidate(f"good {number}", "sft", reward=gap)
    second = Candidate(f"bad {number}", "ppo", reward=None if gap is None else 0.0)
    made = make_pair(f"prompt {number}", {"prompt": f"prompt {number}"}, first, second)
    return Pair(**{**vars(made), "judged": judged})


def ranking(run: Path, num_pairs: int = 3) -> Ranking:
    write_pairs(run, [pair(number) for number in range(num_pairs)])
    return Ranking(run)


def answer_good(people: Ranking, person: str, *, good: bool = True) -> str:
    """Prefer the answer that begins with good (or the other); return the pair's id."""
    shown = people.next(person)
    assert shown is not None
    is_left = shown.sides[0].text.startswith("good") == good
    people.answer(person, shown.pair.id, "left" if is_left else "right")
    return shown.pair.id


def sides_of(people: Ranking) -> list[str]:
    shown = (people.next(f"person {number}") for number in range(200))
    return [each.left for each in shown if each is not None]


def test_pairs_come_back_as_they_were_written(tmp_path: Path) -> None:
    pairs = [pair(1, gap=0.5, judged=1.0), pair(2)]
    write_pairs(tmp_path, pairs)
    assert read_pairs(tmp_path) == pairs


def test_a_damaged_file_of_pairs_is_refused_with_its_line(tmp_path: Path) -> None:
    write_pairs(tmp_path, [pair(1)])
    with (tmp_path / "rank" / "pairs.jsonl").open("a") as file:
        file.write('{"id": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_pairs(tmp_path)


def test_the_reward_models_least_certain_pairs_are_chosen_first() -> None:
    pairs = [pair(1, 3.0), pair(2, -0.1), pair(3, 1.0), pair(4)]
    chosen = choose_pairs(pairs, "uncertain", 2, seed=0)
    assert [each.prompt for each in chosen] == ["prompt 2", "prompt 3"]


def test_pairs_on_which_judge_and_reward_disagree_are_chosen() -> None:
    pairs = [pair(1, 3.0, 1.0), pair(2, 2.0, 0.0), pair(3, 5.0, 0.5), pair(4, -4.0, 1.0)]
    chosen = choose_pairs(pairs, "disagreement", 9, seed=0)
    assert [each.prompt for each in chosen] == ["prompt 4", "prompt 2"]
    with pytest.raises(DataError, match="judge"):
        choose_pairs(pairs[:1], "disagreement", 9, seed=0)


def test_equal_answers_and_repeated_pairs_are_not_shown() -> None:
    same = make_pair("p", {}, Candidate("a", "sft"), Candidate("a", "ppo"))
    assert len(choose_pairs([same, pair(1), pair(1)], "random", 9, seed=0)) == 1
    with pytest.raises(DataError, match="temperature"):
        choose_pairs([same], "random", 9, seed=0)


def test_an_evaluations_answers_become_pairs_of_every_two_models(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    answers = {model: {"text": model, "reward": 1.5} for model in ("sft", "dpo", "ppo")}
    (tmp_path / "evaluate" / "samples.jsonl").write_text(json.dumps({"prompt": "p"} | answers))
    models = [(each.first.model, each.second.model) for each in evaluated_pairs(tmp_path)]
    assert models == [("sft", "dpo"), ("sft", "ppo"), ("dpo", "ppo")]
    assert evaluated_pairs(tmp_path)[0].reward_gap == 0.0


def test_sides_are_drawn_for_each_person_and_stay_on_reload(tmp_path: Path) -> None:
    people = ranking(tmp_path, 1)
    sides = sides_of(people)
    assert 70 < sides.count("first") < 130
    assert sides_of(Ranking(tmp_path)) == sides


def test_the_preferred_text_is_chosen_whichever_side_it_stood_on(tmp_path: Path) -> None:
    people = ranking(tmp_path, 20)
    for _ in range(20):
        answer_good(people, "ann")
    rows = list(training_rows(preferences_path(tmp_path)))
    assert len(rows) == 20
    assert all(str(r["chosen"]).startswith("good") for r in rows)
    assert people.next("ann") is None


def test_undo_takes_back_the_persons_own_last_answer(tmp_path: Path) -> None:
    people = ranking(tmp_path)
    first, second = answer_good(people, "ann"), answer_good(people, "ann")
    answer_good(people, "bob")
    shown = people.undo("ann")
    assert shown is not None
    assert shown.pair.id == second
    again = Ranking(tmp_path)
    assert [a.pair.id for a in read_preferences(preferences_path(tmp_path)).standing()] == [
        first
    ] * 2
    assert again.next("ann") == shown
    assert again.undo("ann") is not None
    assert again.undo("ann") is None
    assert again.progress("bob").num_done == 1


def test_nobody_undoes_the_answer_of_another(tmp_path: Path) -> None:
    path = preferences_path(tmp_path)
    answer = Answer("ann", pair(1), "first", "left")
    append(path, answer)
    append(path, Undo("bob", answer.id))
    assert read_preferences(path).standing() == [answer]


def test_disputed_pairs_are_shown_once_more_and_settle(tmp_path: Path) -> None:
    people = ranking(tmp_path, 2)
    ids = [answer_good(people, "ann"), answer_good(people, "ann")]
    assert answer_good(people, "bob", good=False) == ids[0]
    answer_good(people, "bob")
    assert [each.id for each in people.disputed()] == [ids[0]]
    assert people.progress().num_disputed == 1
    shown = people.next("bob")
    assert shown is not None
    assert (shown.pair.id, shown.is_disputed) == (ids[0], True)
    answer_good(people, "bob")
    assert people.next("bob") is None
    assert not people.disputed()
    assert people.next("ann") is None
    assert people.progress("bob").num_done == 2


def test_skips_and_ties_teach_nothing_and_a_split_vote_neither(tmp_path: Path) -> None:
    path = preferences_path(tmp_path)
    verdicts = ("left", "right", "tie", "both_bad", "skip")
    for number, verdict in enumerate(verdicts):
        append(path, Answer("ann", pair(number), "second", verdict))
    append(path, Answer("bob", pair(0), "second", "right"))
    append(path, Answer("bob", pair(2), "second", "left"))
    rows = {row["prompt"]: row["chosen"] for row in training_rows(path)}
    assert rows == {"prompt 1": "good 1", "prompt 2": "bad 2"}


def test_a_torn_last_line_is_reported_and_the_next_answer_survives(tmp_path: Path) -> None:
    path = preferences_path(tmp_path)
    append(path, Answer("ann", pair(1), "first", "left"))
    with path.open("ab") as file:
        file.write(b'{"person": "ann", "pa')
    torn = read_preferences(path)
    assert (len(torn.records), torn.is_torn, torn.num_bad) == (1, True, 0)
    append(path, Answer("ann", pair(2), "first", "left"))
    after = read_preferences(path)
    assert (len(after.records), after.is_torn, after.num_bad) == (2, False, 1)


@pytest.mark.parametrize(
    "line",
    ["[]", "7", "\xff", '{"verdict": "left"}', '{"undoes": 1}', "[" * 5000],
)
def test_a_broken_line_is_counted_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    path = preferences_path(tmp_path)
    append(path, Answer("ann", pair(1), "first", "left"))
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    append(path, Answer("ann", pair(2), "first", "left"))
    found = read_preferences(path)
    assert (len(found.records), found.num_bad, found.is_torn) == (2, 1, False)


def test_the_reader_of_data_takes_verdicts_and_counts_broken_lines(tmp_path: Path) -> None:
    path = preferences_path(tmp_path)
    for number in range(3):
        append(path, Answer("ann", pair(number), "first", "left"))
    with path.open("a") as file:
        file.write("{}\n")
    stored = load_rows([DataSource(path=str(path))], "preferences")
    rows = [unpack_row(row) for row in stored.table]  # type: ignore[arg-type]
    assert [(row["prompt"], row["chosen"]) for row in rows] == [
        (f"prompt {number}", f"good {number}") for number in range(3)
    ]
    assert [(each.num, each.is_bad) for each in stored.skipped] == [(1, True)]


def _rank_until_killed(run: Path, said: Connection) -> None:
    people = Ranking(run)
    while people.next("ann") is not None:
        said.send(answer_good(people, "ann"))


def test_a_kill_after_each_of_50_answers_loses_none(tmp_path: Path) -> None:
    ranking(tmp_path, 2000)
    context, confirmed = multiprocessing.get_context("fork"), []
    while len(confirmed) < 50:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_until_killed, args=(tmp_path, theirs))
        process.start()
        theirs.close()  # else a message that the kill cut off would be waited for
        confirmed.append(ours.recv())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    kept = {answer.pair.id for answer in Ranking(tmp_path).found.standing()}
    assert kept.issuperset(confirmed)


def test_a_verdict_without_name_pair_or_sense_is_refused(tmp_path: Path) -> None:
    people = ranking(tmp_path)
    identity = next(iter(people.pairs))
    for person, name, verdict in (
        (" ", identity, "left"),
        ("a\x1b[2J", identity, "left"),
        ("ann", "gone", "left"),
        ("ann", identity, "best"),
    ):
        with pytest.raises(DataError):
            people.answer(person, name, verdict)  # type: ignore[arg-type]
    assert not preferences_path(tmp_path).exists()


def test_cohens_kappa_of_his_textbook_table() -> None:
    """20 both yes, 15 both no, 5 yes/no, 10 no/yes: p_o = .7, p_e = .5 * .6 + .5 * .4 = .5."""
    first = ["y"] * 20 + ["y"] * 5 + ["n"] * 10 + ["n"] * 15
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["y"], ["y"]) is None
    assert cohen_kappa([], []) is None


def test_krippendorffs_alpha_of_his_example_of_four_observers() -> None:
    """The nominal example C of his 2011 paper: 12 units, 4 observers, gaps; alpha = 0.743."""
    rows = ("1 2 3 3 2 1 4 1 2 - - -", "1 2 3 3 2 2 4 1 2 5 - 3")
    rows += ("- 3 3 3 2 3 4 2 2 5 1 -", "1 2 3 3 2 4 4 1 2 5 1 -")
    table = [row.split() for row in rows]
    units = [
        {str(who): row[unit] for who, row in enumerate(table) if row[unit] != "-"}
        for unit in range(12)
    ]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([{"a": "x"}]) is None


def test_two_people_are_measured_by_kappa_and_three_by_alpha(tmp_path: Path) -> None:
    people = ranking(tmp_path, 4)
    for good_ones, person in ((4, "ann"), (2, "bob")):
        for number in range(4):
            answer_good(people, person, good=number < good_ones)
    found = people.progress().agreement
    assert (found.measure, found.value, found.num_pairs) == ("Cohen's kappa", 0.0, 4)
    for _ in range(4):
        answer_good(people, "cid")
    found = people.progress().agreement
    # 10 first and 2 second in 4 units of 3: D_o = 2 * (2 * 1 + 1 * 2) / 2 = 4, D_e = 40 / 11.
    assert found.measure == "Krippendorff's alpha"
    assert found.value == pytest.approx(1 - 11 * 4 / 40)


def test_two_servers_of_one_run_see_each_others_verdicts(tmp_path: Path) -> None:
    first = ranking(tmp_path, num_pairs=1)
    second = Ranking(tmp_path)
    answer_good(first, "Ada")
    answer_good(second, "Bob", good=False)
    for people in (first, second):
        assert people.progress("Ada").people == {"Ada": 1, "Bob": 1}
        assert [pair.prompt for pair in people.disputed()] == ["prompt 0"]
        shown = people.next("Ada")
        assert shown is not None
        assert shown.is_disputed
    second.undo("Bob")
    assert first.progress().people == {"Ada": 1}
