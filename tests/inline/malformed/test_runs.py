"""Run folders with torn, odd or missing files: what can be shown is shown, nothing is lost."""

import shutil
from pathlib import Path

import pytest
from command_line import Ends, contents, copy_of

FILES = (
    "config.yaml",
    "status.json",
    "prepare/summary.json",
    "prepare/quality.json",
    "sft/summary.json",
    "sft/metrics.jsonl",
    "reward/summary.json",
    "ppo/summary.json",
    "ppo/metrics.jsonl",
    "ppo/completions.jsonl",
    "ppo/eval.jsonl",
    "evaluate/summary.json",
    "evaluate/samples.jsonl",
    "trace.json",
)
TORN: dict[str, bytes] = {
    "empty": b"",
    "null": b"null\n",
    "number": b"3\n",
    "list": b"[1, 2]\n",
    "empty_mapping": b"{}\n",
    "nested_lists": b'{"models": [[[]]], "iteration": [], "name": {}, "generators": 3}\n',
    "nulls": b'{"models": null, "iteration": null, "reward": null, "stage": null}\n',
    "cut_off": b'{"iteration": 1, "objective/scores": 0.',
    "binary": bytes(range(256)),
    "escape": b'{"stage": "\\u001b[31mred", "iteration": 1, "\\u001b]0;x": 2}\n',
    "nan": b'{"iteration": NaN, "stage": Infinity, "step": NaN}\n',
    "surrogate": b'{"stage": "\\ud800", "prompt": "\\ud800", "iteration": 1}\n',
}


def damage(run: Path, file: str, how: str) -> None:
    """Replace a file; the word ``folder`` puts a folder in its place, ``missing`` nothing."""
    (run / file).unlink()
    if how == "folder":
        (run / file).mkdir()
    elif how != "missing":
        (run / file).write_bytes(TORN[how])


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy whose report is written into the copy."""
    folder = copy_of(whole_run, tmp_path)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(str(whole_run), str(folder)), encoding="utf-8")
    return folder


def check_report(ends: Ends, run: Path) -> None:
    (run / "report.html").unlink()
    assert "report.html" in ends("report", run, codes=(0,))
    assert b"\x1b" not in (run / "report.html").read_bytes()


@pytest.mark.parametrize("how", [*TORN, "missing", "folder"])
def test_report_shows_that_every_file_is_odd(ends: Ends, run: Path, how: str) -> None:
    for file in FILES[1:]:
        damage(run, file, how)
    check_report(ends, run)


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("how", ["nested_lists", "cut_off", "nulls"])
def test_report_shows_the_rest(ends: Ends, run: Path, file: str, how: str) -> None:
    damage(run, file, how)
    check_report(ends, run)


@pytest.mark.parametrize("how", [*TORN, "missing", "folder"])
def test_report_of_an_odd_config_is_refused_or_shown(ends: Ends, run: Path, how: str) -> None:
    damage(run, "config.yaml", how)
    ends("report", run, codes=(0, 2))


@pytest.mark.parametrize("file", ["config.yaml", "status.json", "ppo/metrics.jsonl"])
@pytest.mark.parametrize("how", [*TORN, "missing", "folder"])
def test_status_says_what_is_odd(ends: Ends, run: Path, file: str, how: str) -> None:
    damage(run, file, how)
    ends("status", run, codes=(0, 2))


@pytest.mark.parametrize(
    "file", ["checkpoints/1/state.json", "checkpoints/1/policy/adapter_config.json", "config.yaml"]
)
@pytest.mark.parametrize("how", TORN)
def test_a_damaged_commit_is_not_resumed(
    ends: Ends, run: Path, config_file: Path, file: str, how: str
) -> None:
    damage(run, file, how)
    before = contents(run / "checkpoints")
    ends("ppo", config_file, f"run.dir={run}", "ppo.iterations=2")
    assert contents(run / "checkpoints") == before


@pytest.mark.parametrize("command", ["report", "generate", "merge", "export", "chat"])
@pytest.mark.parametrize("where", ["a_file", "an_empty_folder", "nowhere"])
def test_what_is_no_run_is_refused(ends: Ends, tmp_path: Path, command: str, where: str) -> None:
    path = tmp_path / where
    if where == "a_file":
        path.write_bytes(bytes(range(256)))
    elif where == "an_empty_folder":
        path.mkdir()
    more = ("--out", tmp_path / "out") if command == "export" else ()
    ends(command, path, *more)


def test_a_run_without_any_stage_is_reported(ends: Ends, run: Path) -> None:
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    ends("report", run, codes=(0, 2))
