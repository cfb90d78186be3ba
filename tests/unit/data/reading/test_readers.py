import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading import readers
from rlhf_ray.data.reading.readers import read_rows
from rlhf_ray.errors import DataError

ROWS: list[dict[str, Any]] = [{"q": "why", "n": 1}, {"q": "how", "n": 2}, {"q": "who", "n": 3}]


def source(path: Path | str, **more: Any) -> DataSource:
    return DataSource.model_validate({"path": str(path), **more})


def save(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    rows = datasets.Dataset.from_list(ROWS)
    lines = "".join(json.dumps(row) + "\n\n" for row in ROWS)
    match suffix:
        case ".jsonl":
            path.write_text(lines)
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".json.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".parquet":
            rows.to_parquet(str(path))
        case ".csv":
            rows.to_csv(str(path))
        case ".csv.gz":
            rows.to_csv(str(folder / "plain.csv"))
            path.write_bytes(gzip.compress((folder / "plain.csv").read_bytes()))
        case "":
            rows.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".json.gz", ".parquet", ""])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert list(read_rows(source(save(tmp_path, suffix)))) == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_the_cells_of_a_csv_file_are_text(tmp_path: Path, suffix: str) -> None:
    texts = [{"q": row["q"], "n": str(row["n"])} for row in ROWS]
    assert list(read_rows(source(save(tmp_path, suffix)))) == texts


def test_csv_cells_stay_text_whatever_the_first_cells_hold(tmp_path: Path) -> None:
    numbers = [str(number) for number in range(200_000)]  # more than is looked at for a guess
    cells = ["007", "NA", "true", *numbers, "3/4"]
    path = tmp_path / "rows.csv"
    path.write_text("completion,n\n" + "".join(f"{cell},\n" for cell in cells))
    rows = list(read_rows(source(path)))
    assert [row["completion"] for row in rows] == cells
    assert rows[0]["n"] is None


def test_the_files_of_a_folder_follow_each_other_by_name(tmp_path: Path) -> None:
    for name, rows in (("b.jsonl", ROWS[2:]), ("a.jsonl", ROWS[:2])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "README.md").write_text("no rows")
    assert list(read_rows(source(tmp_path))) == ROWS


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/part.jsonl", "test/part.jsonl"),
    ],
)
def test_a_split_of_a_folder_of_files(tmp_path: Path, train: str, test: str) -> None:
    for name, rows in ((train, ROWS[:2]), (test, ROWS[2:])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dataset_infos.json").write_text('{"splits": {}}')
    assert list(read_rows(source(tmp_path))) == ROWS[:2]
    assert list(read_rows(source(tmp_path, split="test"))) == ROWS[2:]
    with pytest.raises(DataError, match=r"no split dev .* set split to one of .*: test, train"):
        list(read_rows(source(tmp_path, split="dev")))


def test_a_split_of_a_saved_folder(tmp_path: Path) -> None:
    halves = {"train": ROWS[:2], "test": ROWS[2:]}
    rows = {name: datasets.Dataset.from_list(half) for name, half in halves.items()}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path))  # type: ignore[arg-type]
    assert list(read_rows(source(tmp_path))) == ROWS[:2]
    assert list(read_rows(source(tmp_path, split="test"))) == ROWS[2:]
    with pytest.raises(DataError, match=r"no split dev; set split to one of its .*: train, test"):
        list(read_rows(source(tmp_path, split="dev")))


def test_a_list_is_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * (7 * number), "number": number} for number in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2))
    monkeypatch.setattr(readers, "_CHUNK", 16)
    assert list(read_rows(source(path))) == rows


def test_invalid_json_is_refused_before_the_whole_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 64)
    path = tmp_path / "rows.json"
    path.write_text("[{prompt: 1}" + " " * 1000 + "]")
    with path.open() as file:
        file.read(1)
        with pytest.raises(ValueError, match="item 0 is not JSON"):
            list(readers._list_items(file))
        assert len(file.read()) > 900


@pytest.mark.parametrize("path", ["someone/pairs", "pairs"])
def test_a_data_set_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str, data_dir: str, split: str, streaming: bool) -> Any:
        asked.append((path, name, data_dir, split, streaming))
        return iter(ROWS)

    monkeypatch.setattr(readers.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(readers.HfApi, "dataset_info", lambda *_, **__: None)
    rows = read_rows(source(path, name="small", data_dir="data/reward", split="test"))
    assert list(rows) == ROWS
    assert asked == [(path, "small", "data/reward", "test", True)]


def test_a_folder_is_no_owner_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/pairs does not exist"):
        read_rows(source("data/pairs"))


def test_an_unreachable_hub_is_named_with_the_first_line_of_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dataset_info(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(readers.HfApi, "dataset_info", dataset_info)
    with pytest.raises(
        DataError, match=r"'someone/pairs' .* cannot be loaded from the hub: no route\."
    ):
        list(read_rows(source("someone/pairs")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "does not exist"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("rows.jsonl", '{"prompt": "a"}\n3\n', "row 1 is int"),
        ("rows.json", '[{"prompt": "a"}, {"pro', "item 1 is not JSON or is cut off"),
        ("rows.json", '[{"prompt": "a"}, 3]', "row 1 is int"),
        ("rows.json.gz", "no gzip", "Cannot read .* as json"),
        ("rows.parquet", "no parquet", "Cannot read .* as parquet"),
        ("rows.csv", "", "Cannot read .* as csv"),
        ("rows.txt", "a", r"cannot read \.txt"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(source(path)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz"])
def test_a_packed_file_with_flipped_bytes(tmp_path: Path, name: str) -> None:
    lines = "".join(f'{{"prompt": {number**5}}}\n' for number in range(5000))
    content = bytearray(gzip.compress(lines.encode()))
    # Right after the header lie the code lengths, of which zlib notices more than a wrong sum.
    content[12:28] = bytes(byte ^ 0x55 for byte in content[12:28])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"Cannot read .*{name}"):
        list(read_rows(source(tmp_path / name)))


def test_a_folder_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder, but not one that datasets' save_to_disk"):
        list(read_rows(source(tmp_path)))
