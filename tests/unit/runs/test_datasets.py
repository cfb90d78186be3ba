"""A data file that changed under the same path is noticed when a run reads it again."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config import Config, resolve
from rlhf_ray.runs.datasets import ppo_prompts, user_rows
from rlhf_ray.runs.folder import RunFolder


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


def test_rows_without_the_text_that_rouge_reads_are_counted_before_training(
    config: Config,
) -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    assert config.data.prompts is not None
    rows = [{"prompt": f"{n}", "reference": "x"} for n in range(9)]
    lines = [json.dumps(row) for row in [*rows, {"prompt": "a", "reference": None}]]
    Path(config.data.prompts[0].path).write_text("\n".join(lines), encoding="utf-8")
    values = config.model_dump() | {"rewards": [{"type": "rouge"}]}
    prompts, held_out, counts = ppo_prompts(resolve(values), RunFolder(config), tokenizer)
    assert counts == {"kept": 9, "no_reference": 1}
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
