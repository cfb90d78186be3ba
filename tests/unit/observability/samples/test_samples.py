import math
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.observability.samples import reading
from rlhf_ray.observability.samples.index import prompt_key
from rlhf_ray.observability.samples.reading import Found, Query, Samples
from rlhf_ray.observability.samples.writing import SampleWriter

HOSTILE = '<script>alert(1)</script> \x1b[31m \u202eevil\nquote " back\\slash \ud800'


def sample(iteration: int, position: int, **values: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "version": iteration - 1,
        "position": position,
        "prompt": f"Prompt {position}?",
        "response": f"answer {iteration}/{position}",
        "score": iteration + position / 10,
        "scores": {"model": -float(position)},
        "kl": float(iteration),
        "mismatch": 0.001,
        "length": 5 + position,
        "finish_reason": "stop",
        **values,
    }


def write(folder: Path, iterations: Sequence[int], kept: int = -1, **values: Any) -> None:
    writer = SampleWriter(folder, ["model"], kept)
    for iteration in iterations:
        writer.append([sample(iteration, position, **values) for position in range(3)])
    writer.close()


def places(samples: Samples, found: Found) -> list[tuple[int, int]]:
    records = [samples.record(row) for row in found.rows]
    assert all(
        record is not None and record["position"] == row["position"]
        for record, row in zip(records, found.rows, strict=True)
    )
    return [(int(row["iteration"]), int(row["position"])) for row in found.rows]


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    write(tmp_path, [1, 2, 3])
    return Samples(tmp_path)


def test_a_page_is_in_the_order_of_the_run_newest_first(samples: Samples) -> None:
    found = samples.find(Query(), page=1, size=4)
    assert (found.total, places(samples, found)) == (9, [(2, 1), (2, 0), (1, 2), (1, 1)])
    found = samples.find(Query(descending=False), size=2)
    assert places(samples, found) == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query(ranges={"iteration": (2, 2)}), [(2, 2), (2, 1), (2, 0)]),
        (Query(ranges={"score": (3.1, None), "kl": (None, 3)}), [(3, 2), (3, 1)]),
        (Query(ranges={"score": (None, -2)}, source="model"), [(3, 2), (2, 2), (1, 2)]),
        (Query(ranges={"version": (0, 0), "length": (6, 6)}), [(1, 1)]),
        (Query(prompt=prompt_key("Prompt 0?"), descending=False), [(1, 0), (2, 0), (3, 0)]),
        (Query(text="ANSWER 2/1"), [(2, 1)]),
        (Query(text="position"), []),  # a name of the record, and in no text
        (Query(with_tokens=True), []),
        (Query(sort="length", ranges={"iteration": (1, 1)}), [(1, 2), (1, 1), (1, 0)]),
        (Query(sort="score", descending=False, ranges={"kl": (2, 3)}, text="/2"), [(2, 2), (3, 2)]),
    ],
)
def test_samples_are_filtered_and_sorted(
    samples: Samples, query: Query, expected: list[tuple[int, int]]
) -> None:
    found = samples.find(query)
    assert (places(samples, found), found.total) == (expected, len(expected))


def test_blocks_change_nothing(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [Query(), Query(sort="kl"), Query(text="/1"), Query(descending=False, text="/1")]
    whole = [places(samples, samples.find(query)) for query in queries]
    monkeypatch.setattr(reading, "BLOCK", 2)
    monkeypatch.setattr(reading, "TEXT_BLOCK", 2)
    assert [places(samples, samples.find(query)) for query in queries] == whole
    assert samples.find(Query(sort="score"), page=1, size=3).total == 9


def test_missing_numbers_come_last_in_either_order(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path, ["model"], -1)
    scores = [None, 2.0, math.nan, 1.0]
    writer.append([sample(1, number, score=score) for number, score in enumerate(scores)])
    writer.close()
    samples = Samples(tmp_path)
    for descending, expected in ((True, [1, 3, 2, 0]), (False, [3, 1, 0, 2])):
        found = samples.find(Query(sort="score", descending=descending))
        assert [position for _, position in places(samples, found)] == expected


def test_a_sample_is_found_by_its_place(samples: Samples) -> None:
    row = samples.at(2, 1)
    assert row is not None
    assert samples.record(row) == sample(2, 1)
    assert samples.at(2, 7) is None
    assert samples.at(9, 0) is None
    assert samples.last() == 3


def test_a_resume_cuts_both_files_back_to_the_commit(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, [3, 4], kept=2)
    write(tmp_path, [], kept=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


def test_whatever_a_kill_leaves_the_rest_is_read_and_cut(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3])
    whole = {name: (tmp_path / name).read_bytes() for name in (reading.TEXTS, reading.INDEX)}
    for name, content in whole.items():
        for lost in (1, 40, 100, 150):
            for each, before in whole.items():
                (tmp_path / each).write_bytes(before)
            (tmp_path / name).write_bytes(content[:-lost])
            samples = Samples(tmp_path)
            found = places(samples, samples.find(Query(descending=False)))
            assert found == [(1 + n // 3, n % 3) for n in range(len(found))]
            assert 0 < len(found) < 9
            write(tmp_path, [3], kept=2)
            for each, before in whole.items():
                assert (tmp_path / each).read_bytes() == before


def test_an_index_is_made_again_from_the_texts(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    index = tmp_path / reading.INDEX
    before = index.read_bytes()
    for damage in (b"", b"no header\n", b'{"format": 1, "sources": ["others"]}\n'):
        index.write_bytes(damage)
        write(tmp_path, [], kept=2)
        assert index.read_bytes() == before


def test_a_damaged_line_takes_no_other_sample_with_it(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    texts = tmp_path / reading.TEXTS
    texts.write_bytes(
        texts.read_bytes().replace(b'{"iteration": 1, "version": 0, "position": 1', b"x" * 44)
    )
    samples = Samples(tmp_path)
    records = [samples.record(row) for row in samples.find(Query(descending=False)).rows]
    assert [record and record["position"] for record in records] == [0, None, 2, 0, 1, 2]


def test_hostile_text_is_kept_and_found(tmp_path: Path) -> None:
    write(tmp_path, [1], response=HOSTILE)
    samples = Samples(tmp_path)
    found = samples.find(Query(text='EVIL\nquote "'))
    assert found.total == 3
    record = samples.record(found.rows[0])
    assert record is not None
    assert record["response"] == HOSTILE.replace("\ud800", "?")


def test_a_search_that_runs_out_of_time_says_how_far_it_came(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TEXT_BLOCK", 3)
    monkeypatch.setattr(reading, "SEARCH_S", -1.0)
    found = samples.find(Query(text="answer"), size=50)
    assert (found.total, found.reached) == (3, 3)
    assert samples.find(Query(text="answer", ranges={"iteration": (None, 2)})).reached == 2


@pytest.mark.parametrize(
    "ask", [len, Samples.last, lambda samples: samples.find(Query()), lambda s: s.at(1, 1)]
)
def test_a_run_that_is_gone_is_one_clear_message(
    tmp_path: Path, ask: Callable[[Samples], object]
) -> None:
    with pytest.raises(DataError, match="moved or deleted"):
        ask(Samples(tmp_path / "gone"))


def test_pages_far_down_another_order_are_refused(samples: Samples) -> None:
    with pytest.raises(DataError, match="narrow the filters"):
        samples.find(Query(sort="kl"), page=200)
    with pytest.raises(DataError, match="'other'"):
        samples.find(Query(source="other"))


def test_memory_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(reading, "TEXT_BLOCK", 64)
    peaks = []
    for num in (100, 2000):
        folder = tmp_path / str(num)
        write(folder, range(1, num + 1))
        samples = Samples(folder)
        tracemalloc.start()
        for query in (Query(), Query(sort="kl"), Query(text="nowhere"), Query(prompt=1)):
            samples.find(query)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
