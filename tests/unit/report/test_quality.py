import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.report import report
from rlhf_ray.report.data import read
from rlhf_ray.report.quality import (
    RowCounts,
    duplicates,
    held_out,
    quality_charts,
    row_counts,
    ties,
)


def test_charts_of_what_prepare_counted(run_dir: Path) -> None:
    charts = {chart.title: str(chart.svg) for chart in quality_charts(read(run_dir))}
    assert list(charts) == [
        "Length of the texts",
        "Score of the answers",
        "Programming languages in answers",
    ]
    assert ">characters<" in charts["Length of the texts"]
    assert ">questions<" in charts["Length of the texts"]
    assert ">-1<" in charts["Score of the answers"].replace("\u2212", "-")
    assert ">not named<" in charts["Programming languages in answers"]


def test_duplicates(run_dir: Path) -> None:
    assert duplicates(read(run_dir)) == [("questions", 12, 0.003), ("answers", 450, 0.03)]


def test_ties(run_dir: Path, tmp_path: Path) -> None:
    assert ties(read(run_dir)) == (500, 0.25)
    assert (
        'equal scores, not used for training</td><td class="number">500 (25.0%)'
        in report.render(read(run_dir))
    )
    assert ties(read(tmp_path)) is None


def test_rows_that_each_stage_used(tmp_path: Path) -> None:
    summaries = {
        "prepare": {"rows": {"rl": 3}, "dropped": {}},
        "sft": {"rows": {"kept": 90, "not_preferred": 30, "empty": 2}},
        "reward": {"rows": {"train": {"kept": 50, "equal": 1}, "held_out": {"kept": 5}}},
        "ppo": {"prompts_dropped": {"kept": 40, "overlong": 4}},
    }
    for stage, summary in summaries.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "summary.json").write_text(json.dumps(summary))
    assert row_counts(read(tmp_path)) == [
        RowCounts("sft", 90, [("not preferred", 30), ("empty", 2)]),
        RowCounts("reward, train", 50, [("equal", 1)]),
        RowCounts("reward, held out", 5, []),
        RowCounts("ppo", 40, [("overlong", 4)]),
    ]
    html = report.render(read(tmp_path))
    assert "not preferred 30, empty 2" in html


def test_user_datasets_have_charts_of_their_own(tmp_path: Path) -> None:
    texts = {"texts": 40, "repeated": 10, "length_bounds": [0, 32], "lengths": [30, 10]}
    answers = {**texts, "repeated": 0, "languages": {"py": 3}}
    (tmp_path / "data").mkdir()
    own = {"prompts": texts, "answers": answers, "scores": {}}
    (tmp_path / "data" / "sft.json").write_text(json.dumps(own))
    (tmp_path / "config.yaml").write_text("run: {name: x}")
    files = read(tmp_path)
    assert [chart.title for chart in quality_charts(files)] == [
        "Length of the texts in data.sft",
        "Programming languages in answers in data.sft",
    ]
    assert duplicates(files) == [("data.sft: prompts", 10, 0.25), ("data.sft: answers", 0, 0)]
    assert "data.sft: prompts that repeat an earlier one" in report.render(files)


def test_a_run_without_text_statistics_has_no_data_charts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}")
    files = read(tmp_path)
    assert (quality_charts(files), duplicates(files), row_counts(files)) == ([], [], [])
    assert "<h2>Data</h2>" not in report.render(files)


def test_the_report_shows_the_data_charts(run_dir: Path) -> None:
    html = report.build(run_dir).read_text()
    assert "Programming languages in answers" in html
    assert "answers that repeat an earlier one" in html
    assert "450 (3.0%)" in html


def test_each_held_out_set_is_told_with_its_draw(run_dir: Path) -> None:
    files = read(run_dir)
    told = {stage: (num, how) for stage, num, how in held_out(files)}
    assert list(told) == [s for s in files.summaries if s != "prepare"]
    assert told["reward"][0] == files.summaries["reward"]["pairs_eval"]
    assert "prepare's set evaluation" in told["reward"][1]
    assert "prepare's set evaluation" in told["ppo"][1]
    assert "<td>A twentieth of the texts; rows with one prompt" in report.render(files)


@pytest.mark.parametrize(
    ("data", "stage", "how"),
    [
        ({"preferences": [{}]}, "reward", "data.preferences, a twentieth"),
        ({"prompts": [{}]}, "ppo", "a tenth of data.prompts"),
        ({"prompts": [{}], "eval": [{}]}, "evaluate", "A sample of data.eval"),
    ],
)
def test_sets_of_the_users_are_drawn_from_them(
    data: dict[str, Any], stage: str, how: str, run_dir: Path
) -> None:
    files = read(run_dir)
    files = replace(files, config={**files.config, "data": data})
    assert how in {name: told for name, _, told in held_out(files)}[stage]
