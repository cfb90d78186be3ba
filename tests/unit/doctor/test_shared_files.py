"""A node's view of run folder and files is compared with the driver's."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from rlhf_ray.cluster.nodes import Answer, ClusterNode
from rlhf_ray.doctor import shared_files
from rlhf_ray.doctor.shared_files import (
    NodeView,
    digest,
    listing,
    problem_of_interface,
    problems_of,
    view_from_node,
)

NODE = ClusterNode("10.0.0.2", "f" * 56, "10.0.0.2")
RUN = Path("/data/run")


def problems(found: NodeView | None, here: dict[str, tuple[int, str]], arrived: bool = True) -> str:
    answer = Answer(NODE, found, "" if found else "did not answer within 5 s")
    return "; ".join(problems_of(answer, RUN, "word", arrived, here))


def test_a_node_that_sees_the_same_has_no_problem() -> None:
    files = {"/m/config.json": (3, "abc")}
    assert problems(NodeView("word", "", "", files, True), files) == ""


def test_a_silent_node_is_reported() -> None:
    assert problems(None, {}) == "did not answer within 5 s"


def test_a_node_that_dies_during_the_check_takes_no_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = ClusterNode("10.0.0.3", "d" * 56, "10.0.0.3")
    listed = [[NODE, dying], [NODE]]
    monkeypatch.setattr(shared_files, "alive_nodes", lambda: listed.pop(0))

    def answers(nodes: Sequence[ClusterNode], *_: object) -> list[Answer[NodeView]]:
        (probe,) = tmp_path.glob(".*/driver")
        (probe.parent / NODE.node_id).write_text(probe.read_text())
        return [
            Answer(NODE, NodeView(probe.read_text(), "", "", {}, True)),
            Answer(dying, None, "lost: it died"),
        ]

    monkeypatch.setattr(shared_files, "on_nodes", answers)
    assert shared_files.require_same_files(tmp_path, [], None) == []


def test_a_node_that_cannot_read_or_write_the_run_folder_is_reported() -> None:
    blind = NodeView("No such file or directory", "No such file or directory", "", {}, True)
    assert "cannot read run.dir /data/run" in problems(blind, {}, arrived=False)
    read_only = NodeView("word", "Read-only file system", "", {}, True)
    assert "cannot write to run.dir /data/run (Read-only" in problems(read_only, {}, arrived=False)
    assert "the driver does not see what it writes" in problems(
        NodeView("word", "", "", {}, True), {}, arrived=False
    )


def test_different_model_files_are_reported_by_size_and_contents() -> None:
    here = {"/m/a": (3, "x"), "/m/b": (4, "y"), "/m/c": (5, "z")}
    there = {"/m/a": (3, "other"), "/m/b": (2, "y"), "/m/d": (1, "w")}
    text = problems(NodeView("word", "", "", there, True), here)
    assert "another /m/a (other contents)" in text
    assert "another /m/b (2 bytes, not 4)" in text
    assert "cannot read /m/c (not there)" in text
    assert "has /m/d, which the driver does not have" in text


def test_a_missing_model_folder_is_reported_once() -> None:
    there = {"/m": (-1, "No such file or directory")}
    text = problems(NodeView("word", "", "", there, True), {"/m/a": (1, "x"), "/m/b": (1, "y")})
    assert text == "cannot read /m (No such file or directory)"


def test_large_files_are_digested_by_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    def digest_of(contents: bytes) -> str:
        file.write_bytes(contents)
        return digest(file, whole_bytes=8, part_bytes=3)

    assert digest_of(b"abcdefghi") == digest_of(b"abc...ghi")
    assert digest_of(b"abcdefghi") != digest_of(b"abcdefghX")
    assert digest_of(b"abcdefghi") != digest_of(b"Xbcdefghi")
    assert digest_of(b"abcdefgh") != digest_of(b"abcXefgh")  # small: whole


def test_listing_names_every_file_and_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"12")
    (tmp_path / "model" / ".lock").write_bytes(b"")
    found = listing([str(tmp_path / "model"), str(tmp_path / "gone.py")])
    assert {path: size for path, (size, _) in found.items()} == {
        str(tmp_path / "model" / "a"): 2,
        str(tmp_path / "gone.py"): -1,
    }


def test_a_node_reads_the_word_and_writes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver").write_text("word")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert view_from_node(str(tmp_path), "node", [], None, "") == NodeView("word", "", "", {}, True)
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert not view_from_node(str(tmp_path), "node", [], None, "").requires_token
    assert (tmp_path / "node").read_text() == "word"
    gone = view_from_node(str(tmp_path / "elsewhere"), "node", [], None, "")
    assert gone.read == gone.write_problem == "No such file or directory"


def test_the_interface_must_carry_the_address_that_others_know() -> None:
    (loopback,) = [name for name in psutil.net_if_addrs() if name in ("lo", "lo0")]
    assert problem_of_interface(loopback, "127.0.0.1") == ""
    assert "Ray knows it as 10.9.8.7, which is not on lo" in problem_of_interface(
        loopback, "10.9.8.7"
    )
    assert "has no network interface nowhere0" in problem_of_interface("nowhere0", "127.0.0.1")
