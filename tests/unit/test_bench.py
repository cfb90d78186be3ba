"""The benchmark's frame: turns and medians, goals, the table, and what it refuses."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench import models, runs
from bench.figures import Figure, Goal, InTurn, in_turn, of_rounds
from bench.idle_roles import IdleRun
from bench.rows import QUICK_S, ROWS, Line, Row
from bench.running import Place, Result, measured, not_run, run
from bench.table import WIDTH, listing, table, verdicts
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"
FASTER = Row("faster", (Line("speed", "a bare loop", Goal("at least", 0.85)),), "", 1, "method")


@pytest.fixture
def script() -> ModuleType:
    """The script; `import bench` is the folder beside it."""
    spec = importlib.util.spec_from_file_location("bench_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_are_timed_in_turn_and_their_first_calls_are_not() -> None:
    calls: list[str] = []
    now_s = 0.0

    def clock() -> float:
        return now_s

    def ours() -> None:
        nonlocal now_s
        calls.append("ours")
        now_s += 100 if len(calls) < 3 else 1

    def theirs() -> None:
        nonlocal now_s
        calls.append("theirs")
        now_s += 100 if len(calls) < 3 else 2

    steps: list[None] = []
    pair = in_turn(ours, theirs, rounds=3, step=lambda: steps.append(None), clock=clock)
    one, two = "ours", "theirs"
    assert calls == [one, two, one, two, two, one, one, two]
    assert pair == InTurn([1, 1, 1], [2, 2, 2])
    assert len(steps) == 4


def test_a_speed_is_the_ratio_of_medians_with_the_extremes_of_the_rounds() -> None:
    figure = InTurn([1.0, 2.0, 4.0], [2.0, 2.0, 16.0]).speed(threads=2)
    assert (figure.value, figure.low, figure.high) == (1.0, 1.0, 4.0)
    assert figure.details == {"ours_s": [1, 2, 4], "against_s": [2, 2, 16], "threads": 2}
    assert str(figure) == "1 (1 to 4)"
    assert of_rounds([3.0, 1.0, 2.0]).value == 2.0


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (Goal("at least", 0.95), 0.95, "met"),
        (Goal("at least", 0.95), 0.364, "missed"),
        (Goal("at most", 50), 49.9, "met"),
        (Goal("at most", 50), 50.1, "missed"),
        (Goal("at most", 50), float("nan"), "missed"),
        (Goal("at least", 1), float("nan"), "missed"),
        (None, 3.0, "reported"),
    ],
)
def test_a_figure_meets_or_misses_its_goal(goal: Goal | None, value: float, verdict: str) -> None:
    assert Figure(value).verdict(goal) == verdict


def test_the_table_has_each_goal_beside_its_figure_within_its_width() -> None:
    results = [not_run(row, "no measurement " * 30, gpu=False) for row in ROWS]
    results.append(measured(FASTER, [Figure(0.5, 0.25, 1234.5)], 3.0, gpu=False))
    text = table(results)
    assert max(map(len, text.splitlines())) <= WIDTH
    line = next(line for line in text.splitlines() if line.startswith("faster"))
    assert line.split() == [
        "faster",
        *["speed", "a", "bare", "loop", "0.5", "(0.25", "to", "1,234)", ">=", "0.85", "missed"],
    ]
    assert verdicts(results).startswith("1 missed, ")
    assert all(len(line) <= WIDTH for line in listing(results, [1] * len(results)).splitlines())


def test_the_quick_rows_fit_into_six_minutes() -> None:
    quick = [row.seconds for row in ROWS if row.quick]
    assert max(quick) <= QUICK_S
    assert sum(quick) < 360
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row.function or row.missing for row in ROWS)


def test_a_row_without_its_option_says_which_it_needs(script: ModuleType, tmp_path: Path) -> None:
    place = Place(tmp_path)
    reasons = {row.name: script._why_not(row, place) for row in ROWS}
    assert reasons["trl-skewed"] == "not run: needs --trl"
    assert reasons["start"] == "not run: needs --against COMMIT"
    assert not reasons["real-tokens"]
    with_trl = next(row for row in ROWS if row.needs == "trl")
    assert not script._why_not(with_trl, Place(tmp_path, trl="python"))


@pytest.mark.parametrize(
    "given",
    [["--row", "nothing"], ["--against", "no-commit"], ["--seed", "x"], ["--out", "."], ["--goal"]],
)
def test_wrong_arguments_end_with_exit_code_2(
    given: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *given])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2


def _run(function: str, folder: Path) -> Result:
    row = Row("a-row", FASTER.lines, function, 1, "method")
    return run(row, Place(folder / "row"), lambda done, total: None)


def test_a_row_that_fails_says_why(tmp_path: Path) -> None:
    result = _run("bench.figures:number", tmp_path)  # which takes no place
    assert result["failed"]
    assert "unsupported operand" in result["why"] or "TypeError" in result["why"]
    assert [line["verdict"] for line in result["lines"]] == ["not run"]


def test_the_driver_runs_over_roles_that_answer_at_once(tmp_path: Path) -> None:
    idle = IdleRun(tmp_path, iterations=4, num_samples=64, num_generators=3)
    summary = asyncio.run(idle.run())
    assert summary["samples_learnt"] == summary["samples_generated"] == 4 * 64
    assert len(idle.bar.seconds(2)) == 2
    assert len(runs.iteration_seconds(tmp_path)) == 2


def test_the_end_token_ends_responses_of_the_wanted_mean_length(tmp_path: Path) -> None:
    base = models.write(tmp_path / "model", models.Size(64, 2, 128, 2))
    model = AutoModelForCausalLM.from_pretrained(base)
    ids_BS = torch.randint(2, model.config.vocab_size, (8, 64))
    with torch.no_grad():
        logits_BSV = model(ids_BS).logits
    probs_BS = logits_BSV.softmax(-1)[..., model.config.eos_token_id]
    assert float(probs_BS.mean()) == pytest.approx(1 / models.MEAN_LENGTH, rel=0.1)
    assert float(probs_BS.std()) < 0.01
    lengths = models.skewed_lengths(10_000, seed=0)
    assert sum(lengths) / len(lengths) == pytest.approx(models.MEAN_LENGTH, rel=0.05)
    assert max(lengths) == models.MAX_LENGTH
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = models.prompts(5)
    assert {len(ids) for ids in tokenizer(texts)["input_ids"]} == {models.PROMPT_TOKENS}
    assert models.equal_lengths(3, 7) == [7, 7, 7]
