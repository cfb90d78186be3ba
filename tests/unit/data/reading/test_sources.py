import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config import dump, resolve
from rlhf_ray.config import load as load_config
from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading.counts import RowTally, SkippedRows
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import batches
from rlhf_ray.data.reading.sources import interleave, load_rows
from rlhf_ray.errors import ConfigError, DataError

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*sources: dict[str, Any], use: Use = "prompts") -> tuple[Rows, dict[str, int]]:
    """Rows as loaders see them, and how many were left out."""
    tally = RowTally("set", 1.0)
    table = load_rows([DataSource.model_validate(source) for source in sources], use)
    rows = [dict(row) for batch in batches(table, tally) for _, row in batch]
    return rows, tally.dropped


def test_columns_are_renamed_and_the_rest_goes_along(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "why", "n": 1.5, "tags": ["x", {"y": None}]}])
    rows, _ = load({"path": path, "columns": {"prompt": "q"}})
    assert rows == [{"prompt": "why", "n": 1.5, "tags": ["x", {"y": None}]}]


def test_rows_may_stand_in_the_config(tmp_path: Path) -> None:
    given = [{"q": "why", "n": 1}, {"q": "how", "n": 2}, {"q": "who", "n": 3}]
    source = {
        "rows": given,
        "columns": {"prompt": "q"},
        "filter": {"column": "n", "op": ">", "value": 1},
    }
    assert load(source)[0] == [{"prompt": "how", "n": 2}, {"prompt": "who", "n": 3}]
    path = write(tmp_path / "a.jsonl", given)
    assert load(source) == load({**source, "rows": None, "path": path})
    assert load({**source, "limit": 1})[0] == [{"prompt": "how", "n": 2}]
    upper = {"rows": ["why"], "function": f"{__file__}:shout"}
    assert load(upper)[0] == [{"prompt": "WHY"}]


def shout(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.upper() for name, value in row.items()}


@pytest.mark.parametrize(
    ("use", "column"), [("prompts", "prompt"), ("pretrain", "text"), ("sft", "text")]
)
def test_a_text_in_the_config_is_a_row(use: Use, column: str) -> None:
    assert load({"rows": ["a", "b"]}, use=use)[0] == [{column: "a"}, {column: "b"}]


def test_texts_in_the_config_are_no_pairs() -> None:
    with pytest.raises(DataError, match=r"^the list of 2 in the config: the columns text match"):
        load({"rows": ["a", "b"]}, use="preferences")
    with pytest.raises(DataError, match=r"^the list of 1 in the config has no column q, which"):
        load({"rows": [{"prompt": "a"}], "columns": {"prompt": "q"}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "either path or rows; set one"),
        ({"path": "a.jsonl", "rows": ["a"]}, "either path or rows; set one, and the other to null"),
        ({"rows": []}, "rows is an empty list"),
        ({"rows": ["a"], "name": "main"}, "name and data_dir are about a path"),
        ({"rows": [3]}, "rows.0"),
    ],
)
def test_a_dataset_is_a_path_or_rows(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.prompts.*{message}"):
        resolve({"data": {"prompts": source}})


def test_rows_in_the_config_travel_with_it() -> None:
    rows = ["How?", {"prompt": "Why?", "answer": 7, "tags": ["x"]}]
    config = load_config(None, [f"data.prompts.rows={json.dumps(rows)}"])
    assert resolve(yaml.safe_load(dump(config))) == config
    assert config.data.prompts is not None
    assert config.data.prompts[0].rows == rows


def test_a_column_may_take_the_name_of_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "old", "q": "new"}])
    assert load({"path": path, "columns": {"prompt": "q"}})[0] == [{"prompt": "new"}]
    swapped = {"path": path, "columns": {"prompt": "q", "q": "prompt"}}
    assert load(swapped)[0] == [{"prompt": "new", "q": "old"}]


def test_rows_with_other_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": 3}, {"prompt": "c", "n": 1}])
    rows, dropped = load({"path": path})
    assert rows == [{"prompt": "a"}, {"prompt": "c", "n": 1}]
    assert dropped == {"empty": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "half \ud800"}, "not_unicode"),
        ({"prompt": "a", "tags": [{"deep": "\udfff"}]}, "not_unicode"),
        ({"prompt": "a", "score": float("nan")}, "score_not_finite"),
        ({"prompt": "a", "score": float("-inf")}, "score_not_finite"),
        ({"prompt": "a", "score": 10**400}, "score_not_finite"),
        ({"prompt": "a", "score": "NaN"}, "score_not_finite"),
        ({"prompt": "a", "_fields": "{"}, "reserved_column"),
        ({"prompt": "a", "_source": 0}, "reserved_column"),
        ({}, "empty"),
    ],
)
def test_a_row_that_cannot_be_read_is_counted(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    good = {"prompt": "b", "_bad": 1, "_num": 2, "score": None}
    path = write(tmp_path / "a.jsonl", [good, row])
    assert load({"path": path}) == ([good], {reason: 1})


@pytest.mark.parametrize(
    ("use", "first"),
    [
        ("preferences", {"prompt": "p", "chosen": "a", "rejected": "b"}),
        ("preferences", {"chosen": [{"role": "user", "content": "x"}], "rejected": "b"}),
        ("preferences", {"prompt": "p", "completion": "a", "label": True}),
        ("sft", {"messages": [{"role": "user", "content": "x"}]}),
        ("sft", {"text": "a"}),
        ("sft", {"instruction": "a", "output": "b"}),
        ("sft", {"question": "a", "answers": [{"text": "b", "pm_score": 1}]}),
        ("sft", {"question": "a", "response_j": "b", "response_k": "c"}),
        ("ratings", {"prompt": "p", "completion": "a", "score": 1}),
        ("prompts", {"data_source": "d", "prompt": "p", "reward_model": {}}),
    ],
)
def test_a_row_without_the_keys_of_the_first_is_counted(
    tmp_path: Path, use: Use, first: dict[str, Any]
) -> None:
    for key in first:
        rest = {name: value for name, value in first.items() if name != key}
        odd = [{**first, key: odd} for odd in (None, 3, [], {}, [None], [{"a": [None]}], True)]
        path = write(tmp_path / "a.jsonl", [first, rest, *odd])
        load({"path": path}, use=use)  # raises nothing


def test_a_null_among_answers_is_no_answer(tmp_path: Path) -> None:
    answers = [None, {"text": "b", "pm_score": 1}, {"text": None, "pm_score": "x"}]
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answers": answers}] * 2)
    rows, dropped = load({"path": path}, use="sft")
    assert ([row["completion"] for row in rows], dropped) == (["b", "b"], {})


def test_a_row_on_which_a_filter_fails_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": 3}, {"prompt": "b"}, {"prompt": "c", "n": "many"}]
    path = write(tmp_path / "a.jsonl", rows)
    found, dropped = load({"path": path, "filter": {"column": "n", "op": ">", "value": 2}})
    assert (found, dropped) == (rows[:1], {"filter_fails": 2})


FUNCTIONS = """
def joined(row):
    return {"prompt": f"{row['title']}: {row['body']}", "n": row["n"]}

def text(row):
    return row["title"]

def nothing(row):
    return None
"""


def test_a_function_makes_rows_of_what_a_file_holds(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    rows = [{"title": "a", "body": "b", "n": 1}, {"title": "c", "body": "d", "n": 2}, {"n": 3}]
    path = write(tmp_path / "a.jsonl", rows)
    source = {"path": path, "function": f"{tmp_path}/mine.py:joined", "columns": {"id": "n"}}
    found, dropped = load(source)
    assert [(row["prompt"], row["id"]) for row in found] == [("a: b", 1), ("c: d", 2)]
    assert dropped == {"function_fails": 1}
    source = {"path": path, "function": f"{tmp_path}/mine.py:text"}
    texts, _ = load(source, use="pretrain")
    assert [row["text"] for row in texts] == ["a", "c"]


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        ("nothing", DataError, "first row the dataset's function returns NoneType"),
        ("missing", ConfigError, "has no function missing"),
    ],
)
def test_a_function_that_cannot_serve_is_refused(
    tmp_path: Path, function: str, error: type[Exception], says: str
) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    path = write(tmp_path / "a.jsonl", [{"title": "a", "body": "b", "n": 1}])
    with pytest.raises(error, match=says):
        load({"path": path, "function": f"{tmp_path}/mine.py:{function}"})
    with pytest.raises(ConfigError, match="must have the form module:name"):
        resolve({"data": {"prompts": {"path": path, "function": "joined"}}})


def test_filters_come_before_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x" * n, "n": n} for n in range(1, 9)])
    filters = [{"column": "prompt", "length": True, "op": ">", "value": 2}]
    rows, dropped = load({"path": path, "limit": 3, "filter": filters})
    assert [row["n"] for row in rows] == [3, 4, 5]
    assert dropped == {"filtered": 2}


def test_a_mixture_of_formats(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", [{"prompt": f"p{n}"} for n in range(4)])
    turn = {"role": "user", "content": "hi"}
    chats = write(tmp_path / "b.jsonl", [{"prompt": [turn], "id": n} for n in range(2)])
    rows, _ = load({"path": plain}, {"path": chats})
    assert [row.get("prompt", row.get("id")) for row in rows] == ["p0", 0, "p1", "p2", 1, "p3"]
    assert rows[1] == {"messages": [turn], "id": 0, "_source": 1}
    weighted, dropped = load({"path": plain, "weight": 1.0}, {"path": chats, "weight": 2.0})
    assert [row.get("prompt", row.get("id")) for row in weighted] == [0, "p0", 1]
    assert dropped == {"over_weight": 3}


def test_weights_are_shares_of_the_rows_that_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{n}", "n": n} for n in range(20)] + [{"prompt": "", "n": 9}] * 5
    one = write(tmp_path / "a.jsonl", rows)
    other = write(tmp_path / "b.jsonl", [{"prompt": f"b{n}"} for n in range(10)])
    few = {"column": "n", "op": "<", "value": 10}
    found, dropped = load(
        {"path": one, "weight": 1.0, "filter": few}, {"path": other, "weight": 1.0}
    )
    assert [row["prompt"][0] for row in found] == ["a", "b"] * 10
    assert dropped == {"empty": 5, "filtered": 10}


def test_rows_that_cannot_be_used_are_not_in_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": text} for text in ("a", "", "b", "", "c")])
    loaded = load_rows([DataSource(path=path)], "prompts")
    assert loaded.table["prompt"][:] == ["a", "b", "c"]
    assert loaded.skipped == [SkippedRows("empty", is_bad=True, num=2)]


def test_a_part_of_a_mixture_of_which_nothing_is_left(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, [{"prompt": "x"}]) for name in ("a.jsonl", "b.jsonl"))
    none = {"column": "prompt", "value": "y"}
    with pytest.raises(DataError, match=r"b\.jsonl: none of 1 rows can be used .*filtered: 1"):
        load({"path": one}, {"path": other, "filter": none})


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "holds no rows"),
        ([{"a": 1, "b": 2}], {}, r": the columns a, b match no format that prompts can use: "),
        ([{"text": "a"}], {}, "the columns text match no format"),
        (
            [{"text": "a"}],
            {"format": "text"},
            "format text cannot be used for prompts; set",
        ),
        ([{"prompt": "a"}], {"format": "verl"}, r"verl \(data_source, prompt, reward_model\)"),
        (
            [{"a": 1}],
            {"columns": {"prompt": "b"}},
            "no column b, which the dataset's columns n.*found a",
        ),
        ([{"a": 1}], {"columns": {"prompt": "a", "x": "a"}}, "name one column twice"),
        (
            [{"prompt": "a"}],
            {"filter": {"column": "votes", "op": ">", "value": 1}},
            "a filter cannot be applied .* columns prompt: KeyError: 'votes'",
        ),
    ],
)
def test_sets_that_cannot_be_used(
    tmp_path: Path, rows: Rows, more: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        load({"path": path, **more})
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "is an empty list"),
        ([{"path": "a", "weight": 1.0}, {"path": "b"}], "gives a weight to some sources only"),
        ({"path": "a", "filter": {"op": "<", "value": 3}}, "either {column, op, value} or"),
        ({"path": "a", "filter": "no_colon"}, "'no_colon' must have the form module:name"),
        ({"path": "a", "filter": {"column": "n", "op": "in", "value": 3}}, "op in needs a list"),
        ({"path": "a", "format": "alpaca"}, r"data\.sft\.0\.format"),
    ],
)
def test_configs_that_make_no_sense(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"data": {"sft": given}})


def test_one_source_may_be_written_without_the_list() -> None:
    sources = resolve({"data": {"sft": {"path": "a", "filter": "m:f"}}}).data.sft
    assert sources == [DataSource.model_validate({"path": "a", "filter": [{"function": "m:f"}]})]


def test_without_weights_every_row_comes_once_and_sets_are_spread_evenly() -> None:
    order = interleave([6, 2, 1], [None, None, None]).tolist()
    assert sorted(order) == list(range(9))
    # Depths: (.5, 1.5 ... 5.5) / 6; .25, .75; .5.
    assert order == [0, 1, 6, 2, 8, 3, 4, 7, 5]


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([100, 100], [3.0, 1.0], [100, 33]),
        ([10, 100], [0.5, 0.5], [10, 10]),
        ([3, 7, 70], [0.3, 0.7, 1.0], [3, 7, 10]),
        ([5], [0.1], [5]),
    ],
)
def test_weights_hold_until_a_set_is_used_up(
    sizes: list[int], weights: list[float | None], counts: list[int]
) -> None:
    order = interleave(sizes, weights)
    assert len(order) == len(set(order)) == sum(counts)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    for start, size, count in zip(starts, sizes, counts, strict=True):
        own = order[(order >= start) & (order < start + size)]
        assert own.tolist() == list(range(start, start + count))
