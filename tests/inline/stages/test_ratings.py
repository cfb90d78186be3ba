"""A reward model that learns from single answers: liked or not, or rated."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.config import Config, resolve
from rlhf_ray.data.rendering.tokens import encode
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import forward, loading
from rlhf_ray.stages.supervised import reward as reward_model
from rlhf_ray.stages.supervised.reward import auc, correlation

Trained = tuple[Config, dict[str, Any]]


def write_rows(path: Path) -> str:
    """Answers that were liked, and rated higher, the more often they say thanks; shuffled."""
    rows = []
    for index in range(200):
        thanks = index % 3
        answer = f"{('red', 'blue', 'green')[index % 7 % 3]}{' thanks' * thanks}"
        rows.append(
            {"prompt": "Q: colour?\n\nA: ", "completion": answer, "label": thanks > 0}
            | {"score": 1.5 * thanks - 1}
        )
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("loss", "measure"), [("bce", "auc"), ("mse", "correlation")])
def test_scores_follow_labels_and_ratings_on_held_out_rows(
    trained_run: Trained, make_run: Any, tmp_path: Path, loss: str, measure: str
) -> None:
    source, _ = trained_run
    config = make_run(
        sft={"path": str(Path(source.run.dir) / "sft" / "model")},
        data={"preferences": {"path": write_rows(tmp_path / "rows.jsonl")}},
        reward={"loss": loss, "steps": 40, "eval_every": 20, "eval_rows": 30},
    )
    summary = reward_model.run(config)
    assert (summary["rows_train"], summary["rows_eval"]) == (190, 10)
    assert summary[measure] > 0.9
    assert f"{measure}_before" in summary
    curve = (Path(config.run.dir) / "reward" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve] == [0, 20, 40]
    assert json.loads(curve[-1])[f"eval_{measure}"] == summary[measure]
    losses = [json.loads(line)["eval_loss"] for line in curve]
    assert losses[-1] < losses[0] / 2

    model = loading.load_sequence_classifier(
        str(Path(config.run.dir) / "reward" / "model"), config.model, require_head=True
    )
    tokenizer = loading.load_tokenizer(str(Path(source.run.dir) / "sft" / "model"))
    scores = []
    for answer in ("red", "red thanks thanks"):
        parts = encode(tokenizer, ["Q: colour?\n\nA: ", answer])
        ids = torch.tensor([[*parts[0], *parts[1], tokenizer.eos_token_id]])
        with torch.no_grad():
            scores.append(forward.sequence_scores(model, ids, torch.ones_like(ids)).item())
    # A liked answer's probability is over a half; ratings are -1 and 2.
    assert scores[0] < (0 if loss == "bce" else 0.5) < scores[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"score": 1.0},
            r"no_label: the column label must be true or false, got None",
        ),
        ({"label": True}, "all 2 held-out rows of data.preferences have the same label"),
        ({"label": 3}, "no_label|neither true nor false"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    trained_run: Trained, make_run: Any, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    source, _ = trained_run
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Q", "completion": "a"} | columns
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    config = make_run(
        sft={"path": str(Path(source.run.dir) / "sft" / "model")},
        data={"preferences": {"path": str(rows)}},
        reward={"loss": "bce"},
    )
    with pytest.raises(DataError, match=message):
        reward_model.run(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward": {"loss": "bce"}}, "set data.preferences to a dataset with the columns prompt"),
        (
            {"reward": {"loss": "mse", "centre": 0.1}, "data": {"preferences": {"path": "x"}}},
            r"reward\.centre needs pairs, but reward\.loss mse",
        ),
    ],
)
def test_settings_of_pairs_are_refused_for_rated_answers(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(keys)


def test_auc_counts_ties_as_half() -> None:
    # Of the pairs (2, 0), (2, 1), (1, 0), (1, 1) three are won and one is a tie.
    assert auc(np.array([2.0, 1.0]), np.array([0.0, 1.0])) == 3.5 / 4
    assert auc(np.array([0.0]), np.array([1.0])) == 0.0


def test_correlation_is_that_of_pearson() -> None:
    scores_B, targets_B = np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 5.0])
    expected = np.corrcoef(scores_B, targets_B)[0, 1]
    assert correlation(scores_B, targets_B) == pytest.approx(expected)
    assert correlation(np.array([1.0, 1.0]), np.array([2.0, 3.0])) == 0.0
