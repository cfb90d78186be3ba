"""A data file that changed under the same path is noticed when a run reads it again."""

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config import Config, resolve
from rlhf_ray.config.data import DataSource, TemplateConfig
from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.prompts import Check
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import Row, StoredRows
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.driver.batches import PromptCursor
from rlhf_ray.rewards.source import TemplateCheck
from rlhf_ray.runs import datasets
from rlhf_ray.runs.datasets import ppo_prompts, user_rows
from rlhf_ray.runs.folder import RunFolder

VERL = {"type": "function", "function": "f:g", "signature": "verl"}
JUDGE = {"type": "judge", "template": "{response} {hint}", "url": "http://x", "model": "m"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = {"prompts": {"path": str(tmp_path / "prompts.jsonl")}}
    return resolve({"data": data, "run": {"dir": str(tmp_path / "run")}})


def write(config: Config, *texts: str) -> None:
    rows = (json.dumps({"prompt": text}) + "\n" for text in texts)
    assert config.data.prompts is not None
    Path(config.data.prompts[0].path).write_text("".join(rows), encoding="utf-8")


def test_a_changed_file_is_warned_of(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    write(config, "a", "b")
    user_rows(config, "prompts", "prompts")
    user_rows(config, "prompts", "prompts")
    assert "Warning" not in "".join(capfd.readouterr())
    write(config, "a", "c")
    user_rows(config, "prompts", "prompts")
    said = " ".join("".join(capfd.readouterr()).split())
    assert "Warning: data.prompts" in said
    assert "holds other rows than when this run read it before" in said


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        ({"type": "rouge"}, {"reference": None}, "no_reference"),
        (JUDGE, {"hint": None}, "no_hint"),
        (JUDGE, {}, "no_hint"),
        (JUDGE, {"hint": math.nan}, "no_hint"),
        (VERL, {"reward_model": {"style": "rule"}}, "no_ground_truth"),
        (VERL, {}, "no_ground_truth"),
    ],
)
def test_rows_without_what_a_reward_reads_are_counted_before_training(
    config: Config, source: dict[str, str], row: dict[str, object], reason: str
) -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    assert config.data.prompts is not None
    whole = {"reference": "x", "hint": [], "reward_model": {"ground_truth": "1"}}
    rows = [{"prompt": f"{n}", **whole} for n in range(9)]
    lines = [json.dumps(row) for row in [*rows, {"prompt": "a", **row}]]
    Path(config.data.prompts[0].path).write_text("\n".join(lines), encoding="utf-8")
    values = config.model_dump() | {"rewards": [source]}
    prompts, held_out, counts = ppo_prompts(resolve(values), RunFolder(config), tokenizer)
    assert counts == {"kept": 9, reason: 1}
    assert len(prompts) + len(held_out) == 9


def test_other_uses_of_the_same_rows_are_no_change(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    write(config, "a", "b")
    user_rows(config, "prompts", "prompts")
    user_rows(config, "prompts", "pretrain")
    assert "Warning" not in "".join(capfd.readouterr())


def test_what_an_older_version_wrote_is_no_change(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    write(config, "a", "b")
    user_rows(config, "prompts", "prompts")
    path = Path(config.run.dir) / "data" / "prompts.json"
    path.write_text('{"scores": {}}', encoding="utf-8")
    user_rows(config, "prompts", "prompts")
    assert "Warning" not in "".join(capfd.readouterr())
    assert json.loads(path.read_text(encoding="utf-8"))["digests"].keys() == {"prompts"}


def test_a_large_set_is_rendered_as_far_as_it_is_drawn_and_never_twice(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "LARGE", 50)
    monkeypatch.setattr(drawn_rows, "BLOCK", 20)
    write(config, *(f"q{n}" for n in range(200)))
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    folder = RunFolder(config)
    read: list[Row] = []
    checks: list[Check] = []

    def note(fields: Row) -> None:
        if threading.current_thread() is threading.main_thread():  # another renders ahead
            read.append(fields)

    def load() -> tuple[list[str], list[str], dict[str, int]]:
        read.clear()
        prompts, held_out, counts = ppo_prompts(config, folder, tokenizer, [note, *checks])
        taken = PromptCursor(prompts, 0).take(range(30))
        return [prompt.text for prompt in taken], [prompt.text for prompt in held_out], counts

    texts, held_out, counts = load()
    assert {"kept", "unread"} == counts.keys()
    assert counts["unread"] >= 100
    assert len(read) >= 40
    assert set(texts).isdisjoint(held_out)
    assert load() == (texts, held_out, counts)
    assert not read
    checks.append(TemplateCheck(Renderer(tokenizer)))  # another reward model's, which may refuse
    assert load() == (texts, held_out, counts)
    assert read
    other = config.model_copy(update={"template": TemplateConfig(kind="question_answer")})
    prompts, *_ = ppo_prompts(other, folder, tokenizer)
    assert prompts[0].text.startswith("Question: ")


def test_a_run_that_had_begun_before_large_sets_were_drawn_first_keeps_its_order(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(config, *(f"q{n}" for n in range(200)))
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    folder = RunFolder(config)

    def taken() -> tuple[list[str], list[str]]:
        prompts, held_out, _ = ppo_prompts(config, folder, tokenizer)
        drawn = PromptCursor(prompts, 0).take(range(30))
        return [prompt.text for prompt in drawn], [prompt.text for prompt in held_out]

    before = taken()
    monkeypatch.setattr(datasets, "LARGE", 50)
    (folder.path / "checkpoints" / "7").mkdir(parents=True)
    assert taken() == before
    (folder.stage("ppo") / datasets.RENDERED).mkdir(parents=True)
    assert taken() != before, "begun with sets drawn first, and done: what was rendered is gone"


def rows_file(path: Path, num: int) -> Path:
    rows = [{"prompt": f"q{n}", "score": n} for n in range(num)]
    bad = [{"prompt": "", "score": 1}, {"prompt": "x", "score": -1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    return path


@pytest.fixture
def num_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Uses for which files were read; any file counts as large."""
    reads: list[str] = []

    def reading(sources: Sequence[DataSource], use: Use, *rest: Any) -> StoredRows:
        reads.append(use)
        return load_rows(sources, use, *rest)

    monkeypatch.setattr(datasets, "load_rows", reading)
    monkeypatch.setattr(datasets, "LARGE_BYTES", 10)
    return reads


def test_a_large_file_is_read_once_until_it_changes(
    tmp_path: Path, num_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 30)
    source = {"path": str(path), "filter": [{"column": "score", "op": ">=", "value": 0}]}
    config = resolve({"run": {"dir": str(tmp_path / "run")}, "data": {"prompts": source}})
    first, second = (user_rows(config, "prompts", "prompts") for _ in range(2))
    assert num_reads == ["prompts"]
    assert second.table.to_list() == first.table.to_list()
    assert second.skipped == first.skipped
    assert {each.reason: each.num for each in second.skipped} == {"filtered": 1, "empty": 1}
    assert second.digest == first.digest
    assert len(scratch_files(tmp_path)) == 1
    user_rows(config, "prompts", "pretrain")  # other rows are made of it
    assert num_reads == ["prompts", "pretrain"]
    assert "holds other rows" not in capsys.readouterr().out
    rows_file(path, 31)
    assert len(user_rows(config, "prompts", "prompts").table) == 31
    assert "holds other rows" in capsys.readouterr().out


def scratch_files(folder: Path) -> list[Path]:
    return list((folder / "run" / "scratch" / "rows").iterdir())


def keep_all(row: Row) -> bool:
    return bool(row)


@pytest.mark.parametrize("more", [{"filter": [f"{__name__}:keep_all"]}, {"path": "rows"}])
def test_what_may_have_changed_unseen_is_read_again(
    tmp_path: Path, num_reads: list[str], monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Here rows that a function of the user chooses; and a small file."""
    path = rows_file(tmp_path / "rows.jsonl", 30)
    if "path" in more:
        monkeypatch.setattr(datasets, "LARGE_BYTES", 10**6)
    source = {"path": str(path)} | {key: value for key, value in more.items() if key != "path"}
    config = resolve({"run": {"dir": str(tmp_path / "run")}, "data": {"prompts": source}})
    for _ in range(2):
        user_rows(config, "prompts", "prompts")
    assert len(num_reads) == 2
