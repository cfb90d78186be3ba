import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.report.comparison import build, wilson

MakeRun = Callable[[Path], None]


def change(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def answered(folder: Path, answers: dict[str, dict[str, float]]) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": prompt, "sft": {"text": "a"}, "ppo": {"text": "b", **scores}}
        for prompt, scores in answers.items()
    ]
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / "evaluate" / "samples.jsonl").write_text("".join(lines))


@pytest.fixture
def runs(tmp_path: Path, make_run: MakeRun) -> list[Path]:
    folders = [tmp_path / name for name in ("low-kl", "high-kl")]
    for folder in folders:
        make_run(folder)
    change(folders[1], "config.yaml", "kl_coef: 0.2", "kl_coef: 0.05")
    change(folders[1], "config.yaml", "name: quickstart", "name: other")
    return folders


def rows_of(page: Path, heading: str) -> list[list[str]]:
    section = re.search(rf"<h2>{heading}</h2>.*?</section>", page.read_text(), re.DOTALL)
    assert section
    rows = re.findall(r"<tr>(.*?)</tr>", section[0], re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_runs_lie_beside_each_other(runs: list[Path], tmp_path: Path) -> None:
    page = build(runs, tmp_path / "page.html")
    assert rows_of(page, "Differences of the configs") == [
        ["key", "low-kl", "high-kl"],
        ["ppo.kl_coef", "0.2", "0.05"],
    ]
    outcomes = {row[0]: row[1:] for row in rows_of(page, "Outcomes")[1:]}
    assert outcomes["PPO iterations"] == ["60", "60"]
    text = page.read_text()
    assert "hf_do_not_show" not in text
    assert text.count("<figure") >= 8
    # A line of each run in the legend.
    assert text.count(">low-kl</") > 8


@pytest.mark.parametrize("reward_path", [None, "models/reward"])
def test_win_rates_are_of_prompts_that_both_have_and_of_scores_that_mean_the_same(
    runs: list[Path], tmp_path: Path, reward_path: str | None
) -> None:
    gold = {"a": 0.5, "b": 0.5, "c": 0.1, "d": 0.9}
    answered(runs[0], {prompt: {"gold": score} for prompt, score in gold.items()})
    answered(runs[1], {prompt: {"gold": 0.5} for prompt in "abcx"})
    page = build(runs, tmp_path / "page.html")
    # Two ties and a loss; d and x are of one run alone.
    low, high = wilson(1 / 3, 3)
    assert rows_of(page, "Win rates between the runs")[1:] == [
        ["low-kl", "high-kl", "gold", "3", "0.33", f"{low:.2f} to {high:.2f}"]
    ]
    for folder, reward in zip(runs, (2.0, 1.0), strict=True):
        answered(folder, {"a": {"reward": reward}})
        if reward_path:
            with (folder / "config.yaml").open("a") as file:
                file.write(f"reward: {{path: {reward_path}}}\n")
    page = build(runs, tmp_path / "page.html")
    if reward_path is None:  # each run has a reward model of its own
        assert "Win rates between the runs" not in page.read_text()
    else:
        assert rows_of(page, "Win rates between the runs")[1][:5] == [
            *("low-kl", "high-kl", "reward", "1", "1.00")
        ]


def test_the_interval_is_wilsons() -> None:
    # 8 of 10: (0.8 + 1.92073 / 10 -+ 1.96 sqrt(0.016 + 0.0096036)) / 1.384146.
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_texts_of_a_run_are_escaped(runs: list[Path], tmp_path: Path) -> None:
    change(runs[0], "config.yaml", "path: null", "path: '<script>alert(1)</script>'")
    text = build(runs, tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_folders_of_one_name_are_told_apart(tmp_path: Path, make_run: MakeRun) -> None:
    folders = [tmp_path / parent / "run" for parent in "ab"]
    for folder in folders:
        make_run(folder)
    text = build(folders, tmp_path / "page.html").read_text()
    assert "a/run, b/run" in text
    assert "None but name and folder." in text


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for given in (runs[:1], [runs[0], runs[0] / ".." / "low-kl"]):
        with pytest.raises(ConfigError, match="at least two runs, each once"):
            build(given, page)
    with pytest.raises(ConfigError, match="8 runs cannot be told apart: give at most 7"):
        build([tmp_path / str(number) for number in range(8)], page)
    with pytest.raises(DataError, match=r"No run folder at .*nowhere"):
        build([runs[0], tmp_path / "nowhere"], page)
    assert not page.exists()


def test_the_command_writes_the_page(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["compare", *map(str, runs), "--out", str(page)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0
    assert page.is_file()
    assert str(page) in done.stdout.replace("\n", "")


def test_a_win_rate_without_an_interval_shows_none(runs: list[Path], tmp_path: Path) -> None:
    change(runs[0], "evaluate/summary.json", '{"value": 0.78, "ci95": [0.74, 0.82]}', "null")
    tie = '"win_rate": {"value": 0.5, "ci95": [0.5, 0.5]}'
    change(runs[0], "evaluate/summary.json", '"win_rate": null', tie)
    page = build(runs, tmp_path / "page.html")
    outcomes = {row[0]: row[1:] for row in rows_of(page, "Outcomes")[1:]}
    assert outcomes["win rate against its SFT"] == ["0.50", "0.78 (0.74 to 0.82)"]
