"""Pairs that a judge labels, as rows for the stages that train on pairs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from json_server import chat_completion, serve

from rlhf_ray.config import Config, resolve
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import Row, batches
from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.stages.supervised import ai_labels
from rlhf_ray.stages.supervised.ai_labels import ai_labelled_rows

ROWS = [
    {"prompt": "1", "completion_a": "longer", "completion_b": "short", "question": "one"},
    {"prompt": "2", "completion_a": "same", "completion_b": "same"},
    {"prompt": "3", "completion_a": "x", "completion_b": "yz"},
    {"prompt": "4", "completion_a": "", "completion_b": "y"},
    {"prompt": [{"role": "user", "content": "5"}], "completion_a": "u", "completion_b": "vw"},
    {"prompt": "6", "completion_a": "tie", "completion_b": "eit"},
    {"prompt": "7", "completion_a": "no", "completion_b": "answer"},
]


def judge(number: int, body: Any) -> tuple[int, Any]:
    """The longer one; of equally long ones the first; none where one is "no"."""
    a, b = re.findall(r"<response [AB]>\n(.*)\n</response", body["messages"][0]["content"])
    if "no" in (a, b):
        return 200, chat_completion("?")
    return 200, chat_completion(f"Better: {'A' if len(a) >= len(b) else 'B'}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def config_of(data: Path, url: str, **keys: Any) -> Config:
    asked = {"url": url, "model": "m", "retries": 0, **keys}
    return resolve(
        {
            "run": {"dir": str(data.parent / "run")},
            "data": {"preferences": {"path": str(data)}},
            "reward": {"judge": asked},
        }
    )


def labelled(config: Config) -> tuple[list[Row], dict[str, int]]:
    """The rows that can be used, and how many were dropped for which reason."""
    assert config.reward.judge is not None
    tally = RowTally("pairs", 1.0)
    rows = ai_labelled_rows(config, "reward", config.reward.judge)
    kept = [row for batch in batches(rows, tally) for _, row in batch]
    return kept, tally.dropped


def test_labelled_rows_have_prompt_chosen_and_rejected(data: Path) -> None:
    with serve(judge) as server:
        kept, dropped = labelled(config_of(data, server.url))
    assert kept == [
        {"prompt": "1", "question": "one", "chosen": "longer", "rejected": "short"},
        {"prompt": "3", "chosen": "yz", "rejected": "x"},
        {"messages": ROWS[4]["prompt"], "chosen": "vw", "rejected": "u"},
    ]
    assert dropped == {"empty": 1, "equal": 1, "no_verdict": 1, "verdict_follows_order": 1}
    assert len(server.requests) == 2 * 5  # equal and empty ones are not asked about


def test_a_pair_without_a_column_of_the_template_is_a_bad_row(data: Path) -> None:
    rows = [{**ROWS[0], "hint": hint} for hint in ("yes", None, [], math.nan)] + [ROWS[2]]
    data.write_text("\n".join(map(json.dumps, rows)))
    template = "{hint}<response A>\n{a}\n</response A>\n<response B>\n{b}\n</response B>"
    with serve(judge) as server:
        kept, dropped = labelled(config_of(data, server.url, template=template))
    assert [row["chosen"] for row in kept] == ["longer", "longer"]
    assert dropped == {"no_hint": 3}


def test_a_resumed_stage_asks_only_for_missing_verdicts(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ai_labels, "CHUNK", 2)

    def goes_down(number: int, body: Any) -> tuple[int, Any]:
        return judge(number, body) if number < 4 else (503, "")

    with (
        serve(goes_down) as server,
        pytest.raises(RlhfError, match=r"reward\.judge: .* status 503"),
    ):
        labelled(config_of(data, server.url))
    (file,) = (data.parent / "run" / "reward").glob("verdicts-*.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"pair": 0, "verdict": "a"},
        {"pair": 1, "verdict": "b"},
    ]
    with file.open("a") as torn:
        torn.write('{"pair": 2, "verd')
    with serve(judge) as server:  # the same judge at another address
        kept, _ = labelled(config_of(data, server.url))
        assert len(server.requests) == 2 * 3
        assert labelled(config_of(data, server.url))[0] == kept
        assert len(server.requests) == 2 * 3
        labelled(config_of(data, server.url, model="other"))
        assert len(server.requests) == 2 * 8
    assert [row["chosen"] for row in kept] == ["longer", "yz", "vw"]


def test_a_judge_without_pairs_is_refused() -> None:
    for stage in ("reward", "dpo"):
        with pytest.raises(
            ConfigError, match=rf"{stage}\.judge labels the rows of data\.preferenc"
        ):
            resolve({stage: {"judge": {"url": "http://x", "model": "m"}}})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"template": "{a}"}, r"reward\.judge\.template: lacks \{b\}"),
        ({"pattern": "[AB]"}, r"reward\.judge\.pattern: '\[AB\]' has 0 groups"),
    ],
)
def test_a_judge_that_cannot_work_is_refused(data: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of(data, "http://x", **keys)
