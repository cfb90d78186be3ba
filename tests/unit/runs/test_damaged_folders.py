"""Damaged files of a run's folder are one message, or are passed over; nothing raises as it is."""

from pathlib import Path

import pytest

from rlhf_ray.config import dump, load
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.errors import CheckpointError, DataError
from rlhf_ray.models.folders import adapter_task
from rlhf_ray.observability.trackers import Memory
from rlhf_ray.planning import rehearsal
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.lineage import UNKNOWN, model_licence
from rlhf_ray.stages.pipeline import open_run

GARBAGE = [
    *(b"", b"null", b"[1]", b"7", b'"text"', b'{"a": ', bytes(range(256)), b"[" * 100_000),
    b'{"a": ' + b"1" * 5000 + b"}",
]


@pytest.mark.parametrize("text", GARBAGE)
def test_damaged_files_are_one_message_or_passed_over(tmp_path: Path, text: bytes) -> None:
    folder = RunFolder(load(None, [f"run.dir={tmp_path / 'run'}"]))
    summary = folder.stage("sft") / "summary.json"
    summary.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"is damaged .* run the stage again"):
        folder.summary("sft")
    commit = folder.path / "checkpoints" / "1"
    commit.mkdir(parents=True)
    (commit / "state.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"Every commit in .* is damaged"):
        Checkpoints(folder.path / "checkpoints", 1, {}).latest()
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(DataError, match="is not readable JSON"):
        adapter_task(str(tmp_path))
    (folder.path / rehearsal.RESULT).write_bytes(text)
    assert rehearsal.load(folder.config, []) is None
    (folder.path / "trackers.json").write_bytes(text)
    assert Memory(folder.path / "trackers.json").run_id("wandb") is None
    (tmp_path / "README.md").write_bytes(b"---\n" + text + b"\n---\n")
    assert model_licence(str(tmp_path)) == UNKNOWN
    folder.saved.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml (cannot be read|holds no config)"):
        open_run(folder)
    folder.saved.write_text(dump(folder.config))
    open_run(folder)
