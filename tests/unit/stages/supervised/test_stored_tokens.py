"""What a stage has tokenised is taken again only where the same would be built."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config import resolve
from rlhf_ray.stages.supervised import launcher
from rlhf_ray.stages.supervised.launcher import tokenised
from rlhf_ray.stages.supervised.sft import SftTraining
from rlhf_ray.stages.supervised.training import HELD_OUT, TRAIN


class Built:
    """Builds parts, and counts how often."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self) -> tuple[dict[str, Dataset], dict[str, int]]:
        self.num += 1
        rows = [{"input_ids": [self.num]}]
        return {TRAIN: Dataset.from_list(rows), HELD_OUT: Dataset.from_list(rows)}, {"kept": 2}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Built:
    monkeypatch.setattr(launcher, "load_tokenizer", lambda *_: tokenizer)
    return Built()


def stage(folder: Path, **values: Any) -> SftTraining:
    return SftTraining(resolve(values), folder, "base")


def test_the_same_is_built_once(built: Built, tmp_path: Path) -> None:
    first, counts = tokenised(stage(tmp_path), "rows", built)
    second, again = tokenised(stage(tmp_path), "rows", built)
    assert built.num == 1
    assert counts == again == {"kept": 2}
    assert {part: rows.to_list() for part, rows in second.items()} == {
        part: rows.to_list() for part, rows in first.items()
    }


@pytest.mark.parametrize(
    "values",
    [
        {"sft": {"block_size": 64}},
        {"template": {"kind": "question_answer"}},
        {"data": {"overlong": "truncate"}},
        {"run": {"seed": 1}},
    ],
)
def test_what_decides_the_tokens_has_them_built_again(
    built: Built, tmp_path: Path, values: dict[str, Any]
) -> None:
    tokenised(stage(tmp_path), "rows", built)
    parts, _ = tokenised(stage(tmp_path, **values), "rows", built)
    assert built.num == 2
    assert parts[TRAIN].to_list() == [{"input_ids": [2]}]
    assert tokenised(stage(tmp_path, **values), "rows", built)[0][TRAIN].to_list() == [
        {"input_ids": [2]}
    ]


def test_other_rows_and_other_tokenizers_have_them_built_again(
    built: Built, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenised(stage(tmp_path), "rows", built)
    tokenised(stage(tmp_path), "other rows", built)
    assert built.num == 2
    tokenizer.add_tokens(["<new>"])
    tokenised(stage(tmp_path), "other rows", built)
    assert built.num == 3


def test_parts_that_are_not_whole_are_built_again(built: Built, tmp_path: Path) -> None:
    training = stage(tmp_path)
    tokenised(training, "rows", built)
    for file in (training.data / HELD_OUT).glob("*.arrow"):
        file.unlink()
    tokenised(training, "rows", built)
    (training.data / "stored.json").write_text('{"dig', encoding="utf-8")
    tokenised(training, "rows", built)
    assert built.num == 3
