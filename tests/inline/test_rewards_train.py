"""Every reward source trains a real tiny policy for two iterations, through the command line."""

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import CONFIG, Refused, command
from json_server import chat_completion, serve
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_ray.models.loading import load_tokenizer

FUNCTIONS = """
def trl(prompts, completions, question, **columns):
    assert len(question) == len(prompts)
    return [None if "7" in asked else len(set(text)) / 10 for asked, text in zip(question, completions)]

async def later(completions):
    return [float(len(text)) for text in completions]

def verl(data_source, solution_str, ground_truth, extra_info):
    assert (data_source, extra_info) == ("site", {"index": 1})
    return {"score": float(ground_truth[0] in solution_str)}

def openrlhf(queries, prompts, labels):
    import torch
    return torch.tensor([float(label in query) for query, label in zip(queries, labels)])

def not_finite(completions):
    return [float("nan")] * len(completions)
"""  # noqa: E501


def answer(number: int, body: Any) -> tuple[int, Any]:
    """A judge and a reward server in one; every fifth answer is a failure."""
    if number % 5 == 4:
        return 503, "busy"
    if "query" in body:
        return 200, {"rewards": [len(query) % 7 for query in body["query"]]}
    content = body["messages"][0]["content"]
    return 200, chat_completion(f"Rating: {len(content) % 12}")  # 0 and 11 are no answers


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(answer) as server:
        yield server.url


@pytest.fixture
def given(tmp_path: Path, whole_run: Path) -> Path:
    """The sources' inputs, and a config of PPO alone over a finished run's SFT model."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    rows = [
        {
            "prompt": f"Question: {number}?\n\nAnswer: ",
            "question": str(number),
            # Something of it is in the answers of whatever model.
            "reference": " ".join(string.ascii_lowercase) + " the to it is in of you 1 2 3",
            "label": "s",
            "data_source": "site",
            "ground_truth": "so",
            "extra_info": {"index": 1},
        }
        for number in range(40)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def classifier(folder: Path, base: Path) -> Path:
    """A model with two labels and the base's tokenizer."""
    config = LlamaConfig.from_pretrained(base)
    config.id2label, config.label2id = {0: "GOOD", 1: "BAD"}, {"GOOD": 0, "BAD": 1}
    LlamaForSequenceClassification(config).save_pretrained(folder / "classifier")
    load_tokenizer(str(base)).save_pretrained(folder / "classifier")
    return folder / "classifier"


def ppo(given: Path, whole_run: Path, sources: list[dict[str, Any]], *overrides: str) -> int:
    """Exit code of two iterations of PPO with these sources and no reward stage."""
    config = yaml.safe_load(CONFIG) | {
        "rewards": sources,
        "sft": {"path": f"{whole_run}/sft/model"},
    }
    config["data"] = {"prompts": {"path": f"{given}/prompts.jsonl"}, "overlong": "truncate"}
    (given / "config.yaml").write_text(yaml.safe_dump(config))
    settings = (f"run.dir={given}/run", "run.stages=[ppo,evaluate]", "ppo.iterations=2")
    return command("run", given / "config.yaml", *settings, *overrides)


def metrics(given: Path) -> list[dict[str, Any]]:
    lines = (given / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


SOURCES: dict[str, dict[str, Any]] = {
    "model": {"type": "model", "path": "{run}/reward/model"},
    "classifier": {"type": "classifier", "path": "{given}/classifier", "label": "good"},
    "rouge": {"type": "rouge", "variant": "rouge1"},
    "trl": {"type": "function", "function": "{given}/functions.py:trl"},
    "async": {"type": "function", "function": "{given}/functions.py:later"},
    "verl": {"type": "function", "function": "{given}/functions.py:verl", "signature": "verl"},
    "openrlhf": {
        "type": "function",
        "function": "{given}/functions.py:openrlhf",
        "signature": "openrlhf",
    },
    "judge": {"type": "judge", "url": "{url}", "model": "m", "retry_wait_s": 0.01},
    "remote": {"type": "remote", "url": "{url}/get_reward", "retry_wait_s": 0.01, "batch_size": 3},
}


def sources_of(given: Path, whole_run: Path, url: str, *names: str) -> list[dict[str, Any]]:
    """Sources by name, their places filled in."""
    places = {"{given}": str(given), "{run}": str(whole_run), "{url}": url}
    text = json.dumps([SOURCES[name] | {"name": name} for name in names])
    for place, value in places.items():
        text = text.replace(place, value)
    return json.loads(text)


@pytest.mark.parametrize("name", SOURCES)
def test_it_trains_for_two_iterations(name: str, given: Path, whole_run: Path, url: str) -> None:
    classifier(given, whole_run / "sft" / "model")
    assert ppo(given, whole_run, sources_of(given, whole_run, url, name)) == 0
    first, second = metrics(given)
    for record in (first, second):
        assert record["objective/scores"] == record[f"objective/scores/{name}"]
        assert record["loss/policy_avg"] != 0
    summary = json.loads((given / "run" / "ppo" / "summary.json").read_text())
    assert summary["samples_learnt"] == 16
    assert (
        json.loads((given / "run" / "evaluate" / "summary.json").read_text())["judge"] == "reward"
    )
    assert not (given / "run" / "reward").exists(), "no reward model was asked for"


def test_all_of_them_together(given: Path, whole_run: Path, url: str) -> None:
    classifier(given, whole_run / "sft" / "model")
    sources = sources_of(given, whole_run, url, *SOURCES)
    for place, source in enumerate(sources):
        source |= {"weight": 0.5 - 0.1 * place, "scale": "running", "clip": 5.0}
    assert ppo(given, whole_run, sources) == 0
    for record in metrics(given):
        expected = 0.0
        for source in sources:
            scored = 8 - record[f"objective/missing/{source['name']}"]
            mean = record.get(f"objective/scores/{source['name']}", 0.0)
            expected += source["weight"] * mean * scored / 8
        assert record["objective/scores"] == pytest.approx(expected)


def test_a_judge_that_stays_down_ends_the_run_clearly(
    given: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = {"type": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "retries": 1}
    assert ppo(given, whole_run, [judge | {"retry_wait_s": 0.01}]) == 1
    printed = capsys.readouterr().err
    assert "rewards: judge: http://127.0.0.1:9/v1/chat/completions failed 2 times" in printed
    assert "Traceback" not in printed


def test_scores_that_are_no_numbers(
    given: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"type": "function", "function": f"{given}/functions.py:not_finite"}
    assert ppo(given, whole_run, [source]) == 1
    assert "set on_bad_score: skip to count such a score" in capsys.readouterr().err


def test_what_a_source_needs_and_is_not_there(
    given: Path, whole_run: Path, refused: Refused
) -> None:
    def says(source: dict[str, Any], message: str) -> None:
        config = yaml.safe_load(CONFIG) | {"rewards": [source]}
        config["data"] = {"prompts": {"path": f"{given}/prompts.jsonl"}, "overlong": "truncate"}
        (given / "c.yaml").write_text(yaml.safe_dump(config))
        settings = (f"run.dir={given}/run", f"sft.path={whole_run}/sft/model")
        refused("ppo", given / "c.yaml", *settings, says=message)

    says({"type": "model"}, r"No model for this stage: .* reward\.path is not set")
    says({"type": "model", "path": "/nowhere"}, "Model folder /nowhere does not exist")
    says({"type": "classifier", "path": "/nowhere"}, "Model folder /nowhere does not exist")
    says({"type": "function", "function": "functions_of_mine:f"}, "cannot be loaded .*No module")
    says(
        {"type": "rouge", "column": "summary"}, "rouge reads the column 'summary', which rows lack"
    )
