"""The report of a run with damaged files says which, and shows the rest; it runs no script."""

import json
from pathlib import Path

import pytest
from markupsafe import escape

from rlhf_ray.report import quality, sections
from rlhf_ray.report.report import build


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts without their drawing, which takes most of a report's time."""
    for room, drawings in (
        (sections, ("curves",)),
        (quality, ("histogram", "counts")),
    ):
        for drawing in drawings:
            monkeypatch.setattr(room, drawing, lambda *_: "<svg></svg>")


FILES = (
    "config.yaml",
    "trace.json",
    "prepare/summary.json",
    "prepare/quality.json",
    "reward/summary.json",
    "reward/metrics.jsonl",
    "ppo/summary.json",
    "status.json",
    "branch.json",
    "ppo/metrics.jsonl",
    "ppo/eval.jsonl",
    "ppo/completions.jsonl",
    "ppo/warnings.jsonl",
    "evaluate/summary.json",
    "evaluate/samples.jsonl",
    "evaluate/instructions.jsonl",
)
GARBAGE = {
    "empty": b"",
    "null": b"null",
    "list": b"[1, 2]",
    "number": b"7",
    "bytes": bytes(range(256)),
    "nested": b"[" * 100_000,
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
    "torn": b'{"a": {"b": ',
    "open mapping": b"a: &a [*a]\n",
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("damage", GARBAGE)
def test_a_damaged_file_is_named_and_the_rest_is_shown(run_dir: Path, damage: str) -> None:
    for name in FILES:
        path = run_dir / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(GARBAGE[damage] + b"\n")
        html = build(run_dir).read_text()
        assert "RLHF run report" in html
        if damage not in ("empty", "null") and name != "trace.json":
            assert f"<li>{name}: " in html, name
        path.unlink() if before is None else path.write_bytes(before)
    assert "damaged" not in build(run_dir).read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_folder_in_place_of_a_file_is_named(run_dir: Path) -> None:
    (run_dir / "ppo" / "metrics.jsonl").unlink()
    (run_dir / "ppo" / "metrics.jsonl").mkdir()
    assert "<li>ppo/metrics.jsonl: cannot be read" in build(run_dir).read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("microseconds", [9e17, -9e17])
def test_a_trace_from_no_date_is_drawn(run_dir: Path, microseconds: float) -> None:
    span = {"ph": "X", "name": "a", "tid": 1, "args": {}, "ts": microseconds, "dur": 1}
    (run_dir / "trace.json").write_text(f"[\n{json.dumps(span)}\n]\n")
    assert "<li>" not in build(run_dir).read_text()


ODD = (None, "text", float("nan"), [1], {"a": {}}, "\ud800")


def odd_versions(value: object) -> list[object]:
    """Every version of a record in which one value, at any depth, is of another kind."""
    if not isinstance(value, dict):
        return list(ODD)
    return [
        {**value, key: odd} for key, item in value.items() for odd in odd_versions(item)
    ] or list(ODD)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "name", ["evaluate/summary.json", "prepare/summary.json", "prepare/quality.json"]
)
def test_values_of_another_kind_end_no_report(run_dir: Path, name: str) -> None:
    record = json.loads((run_dir / name).read_text())
    for odd in odd_versions(record):
        (run_dir / name).write_text(json.dumps(odd))
        assert "Reward model accuracy" in build(run_dir).read_text(), odd


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".jsonl")])
def test_records_of_another_kind_end_no_report(run_dir: Path, name: str) -> None:
    path = run_dir / name
    text = path.read_text() if path.exists() else '{"iteration": 1}\n'
    record = json.loads(text.splitlines()[0])
    for odd in odd_versions(record):
        path.write_text(text + json.dumps(odd) + "\n")
        assert "Reward model accuracy" in build(run_dir).read_text(), odd


EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


def test_names_of_data_and_models_run_no_script(run_dir: Path) -> None:
    (run_dir / "data").mkdir()
    quality = (run_dir / "prepare" / "quality.json").read_text()
    (run_dir / "data" / f"{EVIL.replace('/', ' ')}.json").write_text(quality)
    config = (run_dir / "config.yaml").read_text().replace("quickstart", json.dumps(EVIL), 1)
    (run_dir / "config.yaml").write_text(config)
    record = json.loads((run_dir / "evaluate" / "summary.json").read_text())
    record["models"][EVIL] = next(iter(record["models"].values()))
    (run_dir / "evaluate" / "summary.json").write_text(json.dumps(record))
    html = build(run_dir).read_text()
    assert str(escape('"><img')) in html
    assert "<img" not in html
    assert "<script" not in html
    assert "default-src 'none'" in html
