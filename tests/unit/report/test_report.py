import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.observability.tracing import Span
from rlhf_ray.report import activity
from rlhf_ray.report import sections as report_sections
from rlhf_ray.report.data import read
from rlhf_ray.report.report import build
from rlhf_ray.report.sections import figure
from rlhf_ray.report.story import verdict

SECTIONS = [
    "Did it get better?",
    "Is it to be trusted?",
    "PPO over iterations",
    "Answers before and after",
    "Fixed prompts across versions",
    "Training samples at the extremes",
    "Last training rollouts",
    "What it cost",
    "Supervised stages",
    "Models compared",
    "Instructions followed",
    "Data",
    "Config",
]


class Page(HTMLParser):
    """Collects tags, headings and everything that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        fetching = ("href", "src", "xlink:href", "srcset", "data")
        self.links += [value or "" for name, value in attrs if name in fetching]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "h2" and data.strip():
            self.headings.append(data.strip())


def _build(run_dir: Path) -> str:
    return build(run_dir).read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts without their drawing, which takes most of a report's time."""
    monkeypatch.setattr(report_sections, "curves", lambda *_: "<svg></svg>")


def test_a_finished_run_has_every_section_in_order(run_dir: Path):
    html = _build(run_dir)
    assert Page(html).headings == SECTIONS
    assert "win rate 0.78 (95% interval 0.74 to 0.82)" in html
    assert "has not finished" not in html
    for text in ("0.48 → 0.67", "68.7%", "1.39 nats", "3,840", "6:23"):
        assert text in html
    assert html.count("<svg") == 11 + 3 + 3
    assert (run_dir / "report.html").exists()


def test_the_report_fetches_nothing_and_runs_nothing(run_dir: Path):
    html = _build(run_dir)
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_texts_of_the_run_are_escaped(run_dir: Path):
    evil = "</div><script>alert(1)</script><img src=x onerror=alert(2)> $x^2$"
    sample = {"prompt": evil, "sft": {"text": evil, "reward": 0.1}, "ppo": {"text": evil}}
    (run_dir / "evaluate" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    rollout = {"iteration": 1, "prompt": evil, "response": evil, "finish_reason": evil}
    (run_dir / "ppo" / "completions.jsonl").write_text(json.dumps(rollout) + "\n")
    record = {"iteration": 0, "samples": [{"prompt": evil, "response": evil, "score": 1.0}]}
    (run_dir / "ppo" / "eval.jsonl").write_text(json.dumps(record) + "\n")
    with (run_dir / "config.yaml").open("a") as file:
        file.write(f"extra: {json.dumps(evil)}\n")
    trace = (run_dir / "trace.json").read_text()
    (run_dir / "trace.json").write_text(trace.replace("policy-0", "<script>$1$"))
    html = _build(run_dir)
    assert not {"script", "img"} & set(Page(html).tags)
    assert html.count("&lt;script&gt;alert(1)") == 3 + 3 + 2 + 1


@pytest.mark.usefixtures("undrawn")
def test_characters_that_act_or_hide_are_shown_by_their_number(run_dir: Path):
    text = "\x1b[31mred \u202egnp.exe \u200bnothing"
    sample = {"prompt": text, "sft": {"text": text}, "ppo": {"text": text}}
    (run_dir / "evaluate" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    warning = {"iteration": 1, "guard": "ratio", "action": "warn", "text": text}
    (run_dir / "ppo" / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    html = _build(run_dir)
    assert html.count("⟨U+001B⟩[31mred ⟨U+202E⟩gnp.exe ⟨U+200B⟩nothing") == 4
    assert not {"\x1b", "\u202e", "\u200b"} & set(html)


@pytest.mark.usefixtures("undrawn")
def test_changes_on_resume_are_listed_with_the_iteration_before_them(run_dir: Path):
    assert "Changes on resume" not in Page(_build(run_dir)).headings
    changes = {
        "ppo.kl_coef": {"before": 0.2, "now": 0.5},
        "data.overlong": {"before": "drop", "now": "<b>"},
    }
    record = {
        "time": "2026-11-30T10:00:00+00:00",
        "after": {"ppo": 12, "sft": 100},
        "changes": changes,
    }
    (run_dir / "changes.jsonl").write_text(json.dumps(record) + "\n")
    html = _build(run_dir)
    assert "Changes on resume" in Page(html).headings
    row = next(line for line in html.splitlines() if "<td>ppo.kl_coef</td>" in line)
    assert "<td>iteration 12 of ppo, step 100 of sft</td>" in row
    assert "<td>0.2</td><td>0.5</td>" in row
    assert "&lt;b&gt;" in html


@pytest.mark.usefixtures("undrawn")
def test_warnings_are_shown_by_guard(run_dir: Path):
    assert "Warnings" not in Page(_build(run_dir)).headings
    seen = [(0, "prompt_reuse"), (3, "loss_spike"), (7, "ratio"), (9, "loss_spike")]
    records = [
        {"iteration": n, "guard": guard, "action": "warn", "numbers": {}, "text": f"<{guard} {n}>"}
        for n, guard in seen
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "ppo" / "warnings.jsonl").write_text(lines)
    html = _build(run_dir)
    headings = Page(html).headings
    assert headings.index("Warnings") == headings.index("PPO over iterations") + 1
    assert html.count("&lt;") == 3, "one row a guard, its text escaped"
    row = next(line for line in html.splitlines() if "<td>loss spike</td>" in line)
    assert "&lt;loss_spike 9&gt;" in row
    assert re.findall(r'<td class="number">(\d+)</td>', row) == ["2", "3", "9"]


@pytest.mark.usefixtures("undrawn")
def test_credentials_in_the_config_are_hidden(run_dir: Path):
    html = _build(run_dir)
    assert "hf_do_not_show" not in html
    assert "HF_TOKEN: (hidden)" in html


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "missing",
    [
        "config.yaml",
        "trace.json",
        "prepare",
        "pretrain",
        "sft",
        "reward",
        "ppo",
        "evaluate",
        "ppo/metrics.jsonl",
        "ppo/eval.jsonl",
        "ppo/summary.json",
        "evaluate/samples.jsonl",
    ],
)
def test_the_report_leaves_out_missing_files(run_dir: Path, missing: str):
    path = run_dir / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    emptied = {
        "config.yaml": ["Config"],
        "prepare": ["Data"],
        "evaluate": ["Models compared", "Instructions followed", "Answers before and after"],
        "evaluate/samples.jsonl": ["Answers before and after"],
        "ppo": [
            "PPO over iterations",
            "Fixed prompts across versions",
            "Training samples at the extremes",
            "Last training rollouts",
        ],
        "ppo/eval.jsonl": ["Fixed prompts across versions"],
    }.get(missing, [])
    assert Page(_build(run_dir)).headings == [name for name in SECTIONS if name not in emptied]


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_an_unfinished_run_says_so(run_dir: Path):
    shutil.rmtree(run_dir / "evaluate")
    (run_dir / "ppo" / "summary.json").unlink()
    path = run_dir / "ppo" / "metrics.jsonl"
    path.write_text(
        "".join(path.read_text().splitlines(keepends=True)[:23]) + '{"iteration": 24, "obj'
    )
    html = _build(run_dir)
    assert "PPO has done 23 of 60 iterations. Still to come: evaluate." in html
    assert "it has not been evaluated against SFT" in html
    for state, said in (("failed", "ended with an error"), ("stopped", "stopped on request")):
        (run_dir / "status.json").write_text(json.dumps({"status": {"state": state}}))
        assert f"This run {'was ' * (state == 'stopped')}{said}" in _build(run_dir)


@pytest.mark.parametrize("num_iterations", [1, 5])
def test_a_run_that_has_just_begun_has_curves(run_dir: Path, num_iterations: int):
    path = run_dir / "ppo" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:num_iterations]))
    assert "Policy loss" in _build(run_dir)


def test_a_stage_whose_model_is_given_is_not_pending(run_dir: Path):
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        shutil.rmtree(run_dir / stage)
    with (run_dir / "config.yaml").open("a") as file:
        file.write("sft: {path: models/sft}\nreward: {path: models/reward}\n")
    assert read(run_dir).pending() == ["pretrain", "ppo", "evaluate"]


@pytest.mark.usefixtures("undrawn")
def test_every_model_is_ranked_and_answers_side_by_side(run_dir: Path):
    html = _build(run_dir)
    assert html.index("1220") < html.index("1000</td>"), "the best model first"
    assert "1182 to 1263" in html
    assert re.search(r"<td[^>]*>0\.22<span[^>]*>0\.18 to 0\.26", html)
    assert "words begin with c" in html
    assert "75%" in html
    evaluation = json.loads((run_dir / "evaluate" / "summary.json").read_text())
    evaluation["models"] = {"sft": {}, "ppo@7": {"reward_mean": 0.5}, "runs/b/policy": {}}
    (run_dir / "evaluate" / "summary.json").write_text(json.dumps(evaluation))
    sample = {"prompt": "p", "sft": {"text": "s"}, "runs/b/policy": {"text": "o", "rouge": 0.5}}
    (run_dir / "evaluate" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    html = _build(run_dir)
    assert "<b>runs/b/policy</b> · rouge 0.50" in html
    assert "runs/b/policy beats SFT on held-out questions" in html
    assert "PPO@7" in html


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ([0.51, 0.6], "PPO beats SFT"),
        ([0.49, 0.6], "PPO and SFT do not differ significantly"),
        ([0.3, 0.45], "PPO loses to SFT"),
    ],
)
def test_the_verdict_follows_the_interval(run_dir: Path, interval: list[float], outcome: str):
    summary = {"models": {}, "win_rate": {"value": 0.5, "ci95": interval}}
    (run_dir / "evaluate" / "summary.json").write_text(json.dumps(summary))
    assert verdict(read(run_dir)).startswith(outcome)


def test_null_values_leave_gaps_in_curves(run_dir: Path):
    records = [{"iteration": i, "loss/policy_avg": None if i == 3 else 0.1 * i} for i in range(8)]
    (run_dir / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    html = _build(run_dir)
    assert "Policy loss" in html
    assert "Value loss" not in html


def test_perplexities_have_two_decimals(run_dir: Path):
    html = _build(run_dir)
    assert ">522.40<" in html
    assert ">4.61<" in html


def test_trained_parameters_are_listed_by_module(run_dir: Path):
    summary = run_dir / "sft" / "summary.json"
    groups = [{"name": "transformer.h.11", "parameters": 4000, "trainable": 1000}]
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"parameter_groups": groups}))
    html = _build(run_dir)
    assert html.count("Parameters by module") == 1
    row = re.search(r"<td>transformer\.h\.11</td>.*", html)
    assert row is not None
    assert re.findall(r">([\d.,%]+)<", row[0]) == ["4,000", "1,000", "25.00%"]


@pytest.mark.parametrize("makes_folder", [False, True])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, makes_folder: bool):
    folder = tmp_path / "nothing"
    if makes_folder:
        folder.mkdir()
    with pytest.raises(DataError, match=r"nothing.*run\.dir"):
        build(folder)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.12345, "0.123"), (1638400.0, "1,638,400"), (5.0, "5"), (1e-6, "1e-06")],
)
def test_figure(value: float | None, text: str):
    assert figure(value) == text


def test_the_timeline_leaves_out_what_a_kill_had_repeated() -> None:
    lost, again = [
        [
            Span("driver", "gen", at, at + 2, {"iteration": 3}),
            Span("policy-0", "logprobs", at + 1, at + 2, {"iteration": 3}),
        ]
        for at in (10.0, 70.0)
    ]
    before = Span("driver", "gen", 5.0, 7.0, {"iteration": 2})
    assert activity._last_iterations([before, *lost, *again]) == [before, *again]


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_an_index_shows_the_extremes_of_its_latest_samples(run_dir: Path):
    records = [
        {"iteration": i, "prompt": "p", "response": f"answer {i}", "score": i, "kl": -i}
        for i in range(9)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "ppo" / "completions.jsonl").write_text(lines)
    html = _build(run_dir)
    highest, furthest = html.index("At the highest reward"), html.index("At the largest KL")
    assert highest < html.index("answer 8") < html.index("answer 6") < furthest
    assert "answer 5" not in html[highest:furthest]
    assert html.index("answer 0") > furthest
