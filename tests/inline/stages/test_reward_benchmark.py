"""Accuracy by kind of pair, of a reward model that was trained to like thanks."""

import json
from pathlib import Path
from typing import Any

import pytest
from json_server import chat_completion, serve

from rlhf_ray.config import Config, resolve
from rlhf_ray.errors import DataError
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages import pipeline
from rlhf_ray.stages.supervised import reward as reward_model

Trained = tuple[Config, dict[str, Any]]


def rows() -> list[dict[str, Any]]:
    """Ten pairs as it was trained on, five the other way round, one of equal answers."""
    pairs = []
    for index, word in enumerate(("red", "blue", "green", "black", "white") * 3):
        sides = [f"{word} {word}, thanks", f"no {word}"]
        subset = "usual" if index < 10 else "reversed"
        chosen, rejected = sides if index < 10 else reversed(sides)
        prompt = f"Q: {word}?\n\nA: "
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset})
    return [*pairs, pairs[0] | {"rejected": pairs[0]["chosen"]}]


def measured(trained: Config, folder: Path, **reward: Any) -> Config:
    """The trained reward model as a given one, in another run, to be measured."""
    path = folder / "bench.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())))
    model = f"{trained.run.dir}/reward/model"
    values = trained.model_dump() | {
        "run": {"dir": str(folder / "run"), "stages": ["reward", "report"]}
    }
    values["reward"] |= {"path": model, "benchmark": {"path": str(path)}, **reward}
    return resolve(values)


@pytest.fixture
def config(trained_run: Trained, tmp_path: Path) -> Config:
    return measured(trained_run[0], tmp_path)


def test_accuracy_by_subset_of_a_given_model(config: Config) -> None:
    pipeline.run(config)
    summary = RunFolder(config).summary("reward")
    assert summary is not None
    assert set(summary) == {"benchmark"}  # nothing was trained
    assert summary["benchmark"] == {
        "accuracy": pytest.approx(10 / 15),
        "pairs": 15,
        "subsets": {
            "reversed": {"accuracy": 0.0, "pairs": 5, "rows": {"kept": 5}},
            "usual": {"accuracy": 1.0, "pairs": 10, "rows": {"kept": 10, "equal": 1}},
        },
    }
    assert pipeline._finished(RunFolder(config), "reward")
    report = (Path(config.run.dir) / "report.html").read_text()
    assert "Reward model on its benchmark" in report
    assert "66.7%" in report


def test_a_benchmark_without_subsets_is_one_subset(config: Config) -> None:
    assert config.reward.benchmark is not None
    path = Path(config.reward.benchmark[0].path)
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows()[:2]]
    path.write_text("\n".join(map(json.dumps, plain)))
    found = reward_model.run(config)["benchmark"]
    assert found["subsets"] == {"all": {"accuracy": 1.0, "pairs": 2, "rows": {"kept": 2}}}


def test_a_trained_model_is_kept_where_its_benchmark_fails(
    trained_run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = measured(trained_run[0], tmp_path, path=None)
    trained = {"pairs_train": 100, "accuracy": 0.95}
    calls: list[str] = []

    def train(folder: RunFolder) -> dict[str, Any]:
        calls.append("train")
        return dict(trained)

    def refuse(config: Config, model: str) -> dict[str, Any]:
        calls.append(model)
        raise DataError("no such file")

    monkeypatch.setattr(reward_model, "_train", train)
    monkeypatch.setattr(reward_model, "benchmark", refuse)
    with pytest.raises(DataError):
        reward_model.run(config)
    assert not pipeline._finished(RunFolder(config), "reward")
    monkeypatch.setattr(reward_model, "benchmark", lambda *_: {"accuracy": 0.5})
    summary = reward_model.run(config)
    assert calls == ["train", str(Path(config.run.dir) / "reward" / "model")]
    assert summary["pairs_train"] == 100
    assert summary["benchmark"] == {"accuracy": 0.5}
    assert pipeline._finished(RunFolder(config), "reward")


def test_a_reward_model_learns_from_a_judge(trained_run: Trained, tmp_path: Path) -> None:
    """AI feedback from end to end: the judge likes thanks, and so does the model afterwards."""
    path = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": row["prompt"], "completion_a": row["chosen"], "completion_b": row["rejected"]}
        for row in rows()[:15] * 4
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))

    def judge(number: int, body: Any) -> tuple[int, Any]:
        question = body["messages"][0]["content"]
        first = question.index("thanks") < question.index("</response A>")
        return 200, chat_completion(f"Better: {'A' if first else 'B'}")

    trained, _ = trained_run
    with serve(judge) as server:
        values = trained.model_dump() | {"run": {"dir": str(tmp_path / "run")}}
        values["sft"] |= {"path": f"{trained.run.dir}/sft/model"}
        judge_of = {"url": server.url, "model": "m"}
        values["reward"] |= {"judge": judge_of, "eval_rows": 5, "steps": 15}
        values["data"] |= {"preferences": {"path": str(path)}}
        summary = reward_model.run(resolve(values))
    assert summary["rows"]["train"]["kept"] == summary["pairs_train"]
    assert summary["accuracy"] == 1.0
