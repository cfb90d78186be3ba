import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.driver.checkpoint import Checkpoints, RunState, SavedCommit, kept_versions
from rlhf_ray.errors import CheckpointError


def groups(tag: str) -> dict[str, dict[str, bytes]]:
    """Return files of both groups whose contents depend on ``tag``."""
    return {
        "policy": {"learner.safetensors": f"policy {tag}".encode(), "adapter_config.json": b"{}"},
        "critic": {"learner.safetensors": f"critic {tag}".encode()},
    }


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    """A store that keeps two versions and adds a tokenizer to every policy folder."""
    return Checkpoints(tmp_path, 2, {"policy": {"tokenizer.json": b"[1]"}})


def versions(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


def latest(store: Checkpoints) -> SavedCommit:
    saved = store.latest()
    assert saved is not None
    return saved


def test_what_is_saved_comes_back(store: Checkpoints, tmp_path: Path) -> None:
    assert store.latest() is None
    assert not store.has(3)
    store.save(3, groups("three"), {"iteration": 3, "kl_coef": 0.1, "best_score": None})
    saved = latest(store)
    assert saved.version == 3
    assert saved.progress == {"iteration": 3, "kl_coef": 0.1, "best_score": None}
    assert saved.policy == groups("three")["policy"] | {"tokenizer.json": b"[1]"}
    assert saved.critic == groups("three")["critic"]
    assert store.has(3)
    assert os.readlink(tmp_path / "latest") == "3"
    assert (tmp_path / "3" / "policy" / "tokenizer.json").read_bytes() == b"[1]"


def test_old_versions_go_and_the_best_stays(store: Checkpoints, tmp_path: Path) -> None:
    for version in (1, 2, 10):
        store.save(version, groups(str(version)), {})
        if version == 1:
            store.mark_best(1)
    assert versions(tmp_path) == ["1", "10", "2"]
    store.save(11, groups("11"), {})
    assert versions(tmp_path) == ["1", "10", "11"]  # by number, not by name
    store.mark_best(11)
    store.save(12, groups("12"), {})
    assert versions(tmp_path) == ["11", "12"]
    assert os.readlink(tmp_path / "best") == "11"


@pytest.mark.parametrize(
    ("every", "saved", "kept"),
    [
        (1, range(1, 6), ["1", "2", "3"]),
        (2, range(1, 8), ["2", "4"]),
        (5, (4, 8, 12, 16, 20, 24), ["8", "12", "16"]),
        (0, range(1, 6), []),
    ],
)
def test_dropped_commits_leave_their_adapter_where_asked(
    tmp_path: Path, every: int, saved: Sequence[int], kept: list[str]
) -> None:
    store = Checkpoints(tmp_path, 2, {"policy": {"tokenizer.json": b"[1]"}}, every)
    for version in saved:
        store.save(version, groups(str(version)), {})
    newest = [str(version) for version in saved[-2:]]
    assert versions(tmp_path) == sorted([*kept, *newest])
    assert kept_versions(tmp_path, whole=True) == [*saved[-2:]]
    for name in kept:
        files = [str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.*")]
        assert sorted(files) == ["policy/adapter_config.json", "policy/tokenizer.json"]
        assert not store.has(int(name))
    assert latest(store).version == saved[-1]


def test_a_kill_while_a_commit_becomes_an_adapter_is_made_good(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 2, {}, 1)
    for version in (1, 2):
        store.save(version, groups("x"), {})
    shutil.rmtree(tmp_path / "1" / "critic")  # it got this far
    Checkpoints(tmp_path, 2, {}, 1).save(3, groups("x"), {})
    assert [path.name for path in (tmp_path / "1").rglob("*.*")] == ["adapter_config.json"]


def _flip(folder: Path) -> None:
    path = folder / "policy" / "learner.safetensors"
    path.write_bytes(b"X" + path.read_bytes()[1:])


def _tear(folder: Path) -> None:
    path = folder / "critic" / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _lose(folder: Path) -> None:
    (folder / "critic" / "learner.safetensors").unlink()


def _tear_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text()[:20])


def _empty_state(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize("damage", [_flip, _tear, _lose, _tear_state, _empty_state])
def test_a_damaged_newest_commit_gives_way_to_the_one_before(
    damage: Any, store: Checkpoints, tmp_path: Path
) -> None:
    store.save(4, groups("four"), {"iteration": 4})
    store.save(6, groups("six"), {"iteration": 6})
    damage(tmp_path / "6")
    saved = latest(store)
    assert (saved.version, saved.progress) == (4, {"iteration": 4})
    assert [each.split(" ")[0] for each in saved.damaged] == ["6"]
    assert not store.has(6), "it is not whole"
    # Learnt again, the version is whole.
    store.save(6, groups("again"), {"iteration": 6})
    assert latest(store).policy["learner.safetensors"] == b"policy again"


def test_a_single_commit_to_keep_still_has_one_before_it(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 1, {})
    for version in (1, 2, 3):
        store.save(version, groups(str(version)), {})
    assert versions(tmp_path) == ["2", "3"]
    _flip(tmp_path / "3")
    assert latest(store).version == 2


def test_all_commits_damaged_is_an_error(store: Checkpoints, tmp_path: Path) -> None:
    for version in (1, 2):
        store.save(version, groups(str(version)), {})
        _flip(tmp_path / str(version))
    with pytest.raises(CheckpointError, match=r"Every commit .* is damaged: 2 \(policy/learner"):
        store.latest()


def test_what_a_kill_left_half_written_is_no_commit(store: Checkpoints, tmp_path: Path) -> None:
    store.save(1, groups("one"), {"iteration": 1})
    shutil.copytree(tmp_path / "1", tmp_path / ".writing-2")
    (tmp_path / "3").mkdir()
    assert latest(store).version == 1
    store.save(2, groups("two"), {"iteration": 2})
    assert latest(store).policy["learner.safetensors"] == b"policy two"
    assert versions(tmp_path) == ["1", "2"], "what a kill left of a write or a deletion is gone"


@pytest.mark.parametrize("fails_at", range(5))
def test_a_full_disk_loses_nothing(
    fails_at: int, store: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version has five files; if any of them does not fit, the previous commit stays."""
    store.save(1, groups("one"), {"iteration": 1})
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"Cannot write version 2 .*No space left") as caught:
        store.save(2, groups("two"), {"iteration": 2})
    assert "Free space" in str(caught.value)
    assert versions(tmp_path) == ["1"]
    assert os.readlink(tmp_path / "latest") == "1"
    assert latest(store).progress == {"iteration": 1}
    monkeypatch.undo()
    store.save(2, groups("two"), {"iteration": 2})
    assert latest(store).version == 2


def test_every_file_is_synced_before_the_version_appears(
    store: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appeared = []
    monkeypatch.setattr(os, "fsync", lambda _: appeared.append((tmp_path / "7").exists()))
    store.save(7, groups("seven"), {})
    # Its five files, then the folder that holds its name.
    assert appeared == [False] * 5 + [True]


def test_progress_is_replaced_and_files_stay(store: Checkpoints, tmp_path: Path) -> None:
    store.save(1, groups("one"), {"iteration": 1, "best_score": None})
    before = (tmp_path / "1" / "policy" / "learner.safetensors").stat().st_ino
    store.set_progress(1, {"iteration": 1, "best_score": 0.5})
    assert latest(store).progress == {"iteration": 1, "best_score": 0.5}
    assert (tmp_path / "1" / "policy" / "learner.safetensors").stat().st_ino == before
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["critic", "policy", "state.json"]


def test_a_full_disk_leaves_the_old_progress(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(1, groups("one"), {"iteration": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        store.set_progress(1, {"iteration": 2})
    assert latest(store).progress == {"iteration": 1}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write version 1"):
        Checkpoints(tmp_path / "file", 2, {}).save(1, groups("one"), {})


def test_the_state_names_every_file(store: Checkpoints, tmp_path: Path) -> None:
    store.save(1, groups("one"), {})
    state = json.loads((tmp_path / "1" / "state.json").read_text())
    assert set(state["sha256"]) == {
        "policy/tokenizer.json",
        "policy/learner.safetensors",
        "policy/adapter_config.json",
        "critic/learner.safetensors",
    }


def test_a_best_score_counts_only_under_the_weights_that_it_was_reached_with() -> None:
    new = RunState().weighing([1.0, 0.5])
    assert replace(new, best_score=2.0).weighing([1.0, 0.5]).best_score == 2.0
    other = replace(new, best_score=2.0).weighing([0.5, 0.5])
    assert (other.best_score, other.weights) == (None, [0.5, 0.5])
    of_an_older_version = RunState(best_score=2.0)
    assert of_an_older_version.weighing([1.0]).best_score == 2.0
