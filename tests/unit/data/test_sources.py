import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.sources import load_rows
from rlhf_ray.errors import DataError

ROWS: list[dict[str, Any]] = [{"q": "why", "n": 1}, {"q": "how", "n": 2}, {"q": "who", "n": 3}]


def source(path: Path, **more: Any) -> DataSource:
    return DataSource.model_validate({"path": str(path), **more})


def save(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    rows = datasets.Dataset.from_list(ROWS)
    match suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".parquet":
            rows.to_parquet(str(path))
        case ".csv":
            rows.to_csv(str(path))
        case "":
            rows.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ""])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path, suffix)
    columns = {"prompt": "q"}
    rows = load_rows(source(path, columns=columns), ["prompt"])
    assert rows.to_list() == [{"prompt": row["q"], "n": row["n"]} for row in ROWS]
    limited = load_rows(source(path, columns=columns, limit=2), ["prompt"])
    assert limited["n"][:] == [1, 2]


def test_a_column_may_take_the_name_of_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "old", "q": "new"}]')
    rows = load_rows(source(path, columns={"prompt": "q"}), ["prompt"])
    assert rows.to_list() == [{"prompt": "new"}]
    swapped = source(path, columns={"prompt": "q", "q": "prompt"})
    assert load_rows(swapped, ["prompt"]).to_list() == [{"prompt": "new", "q": "old"}]


def test_rows_with_other_keys_are_filled(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "label": 1}\n')
    rows = load_rows(source(path), ["prompt"])
    assert rows["label"][:] == [None, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "does not exist"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("rows.jsonl", '{"prompt": "a"}\n3\n', "row 1 is int"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "Cannot read"),
        ("rows.json", '[{"prompt": "a"}', "Cannot read .* as json"),
        ("rows.parquet", "no parquet", "Cannot read .* as parquet"),
        ("rows.csv", "", "Cannot read .* as csv"),
        ("rows.csv", "prompt\n", "holds"),
        ("rows.txt", "a", r"cannot read \.txt"),
        ("rows.jsonl", '{"text": "a", "n": 1}\n', "has no column prompt; found text, n"),
        ("rows.jsonl", '{"prompt": 1}\n', "prompt holds int64 values, expected text"),
        ("rows.jsonl", '{"prompt": ["a"]}\n', "prompt holds nested values, expected text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(source(path), ["prompt"])
    assert str(path) in str(caught.value)


def test_a_mapping_must_name_a_column_that_is_there(tmp_path: Path) -> None:
    mapped = source(save(tmp_path, ".json"), columns={"prompt": "question"})
    with pytest.raises(DataError, match="no column question, which columns names; found q, n"):
        load_rows(mapped, ["prompt"])


def test_folders_that_hold_no_single_data_set(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="holds the splits train, test; name one"):
        load_rows(source(tmp_path / "splits"), ["q"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder, but not one"):
        load_rows(source(tmp_path / "empty"), ["q"])
    assert len(load_rows(source(tmp_path / "splits" / "train"), ["q"])) == 3
