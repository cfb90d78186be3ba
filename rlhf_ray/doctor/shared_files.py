"""Check that every node of a cluster sees the same run folder and models as the driver.

Before anything is placed, a task on each node reads what the driver wrote to run.dir, writes it
back there, and lists the files of the models. Files up to 64 MB are compared by their SHA-256,
larger ones by their size and their first and last megabyte: the first holds names, shapes and
offsets of a safetensors file.
"""

import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.cluster.nodes import Answer, alive_nodes, on_nodes
from rlhf_ray.errors import PlacementError

TIMEOUT_S = 120.0
WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""
PART_BYTES = 2**20
IP = (socket.AF_INET, socket.AF_INET6)

Listing = Mapping[str, tuple[int, str]]
"""Path -> size in bytes and digest; -1 and the reason for a path that cannot be read."""


@dataclass(frozen=True)
class NodeView:
    """The view that a node has of run.dir, its network interface and the files."""

    read: str
    """What it read in run.dir, or why it could not."""
    write_problem: str
    """Why it could not write there; empty if it could."""
    interface_problem: str
    """What is wrong with the network interface that the config names; empty if nothing is."""
    files: Listing
    requires_token: bool
    """Whether its Ray accepts only clients that have the cluster's token."""


def require_same_files(folder: Path, paths: Sequence[str], interface: str | None) -> list[str]:
    """Check every node before anything is placed.

    Returns:
        The names of nodes where Ray requires no token.

    Raises:
        PlacementError: names each node that cannot read or write run.dir, has other files, or is
            not on the interface.
    """
    expected, nodes = listing(paths), alive_nodes()
    with _probe_folder(folder) as probe:
        word = (probe / "driver").read_text(encoding="utf-8")
        calls = [(str(probe), node.node_id, list(paths), interface, node.address) for node in nodes]
        answers = on_nodes(nodes, view_from_node, calls, TIMEOUT_S)
        # Ray lists a node that has died as alive for half a minute: a run that resumes after the
        # death of a node and of its driver must not end for it.
        alive = {node.node_id for node in alive_nodes()}
        answers = [answer for answer in answers if answer.node.node_id in alive]
        problems = []
        for answer in answers:
            echo = probe / answer.node.node_id
            echoed = echo.is_file() and echo.read_text(encoding="utf-8") == word
            problems += [
                f"  {answer.node.name}: {problem}"
                for problem in problems_of(answer, folder, word, echoed, expected)
            ]
    if problems:
        raise PlacementError(
            f"Some of the {len(nodes)} nodes cannot take part in the run:\n"
            + "\n".join(problems)
            + "\nrun.dir, models and functions must be on storage that all nodes mount at the same "
            "path; mount it there, or take the node out of the cluster"
        )
    views = {answer.node.name: answer.value for answer in answers}
    return [name for name, view in views.items() if view and not view.requires_token]


def problems_of(
    answer: Answer[NodeView], folder: Path, word: str, echoed: bool, expected: Listing
) -> Iterator[str]:
    """Yield what is wrong with a node, which should read ``word`` in run.dir and write it back."""
    view = answer.value
    if view is None:
        yield answer.problem
        return
    if view.interface_problem:
        yield view.interface_problem
    if view.read != word:
        yield f"cannot read run.dir {folder} as the driver wrote it ({view.read})"
    elif view.write_problem:
        yield f"cannot write to run.dir {folder} ({view.write_problem})"
    elif not echoed:
        yield f"the driver does not see what it writes to run.dir {folder}"
    missing_folders = tuple(f"{path}/" for path, (size, _) in view.files.items() if size < 0)
    for path in sorted(expected.keys() | view.files.keys()):
        if path.startswith(missing_folders):
            continue  # the folder itself is reported
        file, (size, digest) = expected.get(path), view.files.get(path, (-1, "not there"))
        if (size, digest) == file:
            continue
        if size < 0:
            yield f"cannot read {path} ({digest})"
        elif file is None:
            yield f"has {path}, which the driver does not have"
        else:
            difference = f"{size} bytes, not {file[0]}" if size != file[0] else "other contents"
            yield f"has another {path} ({difference})"


def view_from_node(
    probe: str, node_id: str, paths: Sequence[str], interface: str | None, address: str
) -> NodeView:
    """Return this node's view; runs on the node."""
    try:
        read = (Path(probe) / "driver").read_text(encoding="utf-8")
    except OSError as error:
        read = _reason(error)
    try:
        (Path(probe) / node_id).write_text(read, encoding="utf-8")
        write_problem = ""
    except OSError as error:
        write_problem = _reason(error)
    interface_problem = "" if interface is None else problem_of_interface(interface, address)
    return NodeView(read, write_problem, interface_problem, listing(paths), requires_token())


def requires_token() -> bool:
    """Return whether Ray on this node accepts only clients that have the cluster's token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def problem_of_interface(interface: str, address: str) -> str:
    """Return why others, who know this node by ``address``, cannot reach it on an interface."""
    addresses = psutil.net_if_addrs()
    if interface not in addresses:
        return f"has no network interface {interface} (cluster.interface), only {sorted(addresses)}"
    if not psutil.net_if_stats()[interface].isup:
        return f"its network interface {interface} (cluster.interface) is down"
    own = [entry.address for entry in addresses[interface] if entry.family in IP]
    if address not in own:
        return (
            f"Ray knows it as {address}, which is not on {interface} (cluster.interface), where it "
            f"has {', '.join(own) or 'no address'}; start Ray there with --node-ip-address"
        )
    return ""


def listing(paths: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return size and digest of every file at or below the paths; hidden files are left out."""
    entries: dict[str, tuple[int, str]] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files = [file for file in inside if not file.name.startswith(".")]
        else:
            files = [path]
        for file in files:
            try:
                entries[str(file)] = (file.stat().st_size, digest(file))
            except OSError as error:
                entries[str(file)] = (-1, _reason(error))
    return entries


def digest(file: Path, whole_bytes: int = WHOLE_BYTES, part_bytes: int = PART_BYTES) -> str:
    """Return the SHA-256 of a file, or of its first and last part if over ``whole_bytes``."""
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        size = file.stat().st_size
        if size <= whole_bytes:
            sha.update(stream.read())
        else:
            sha.update(stream.read(part_bytes))
            stream.seek(size - part_bytes)
            sha.update(stream.read(part_bytes))
    return sha.hexdigest()


@contextmanager
def _probe_folder(folder: Path) -> Iterator[Path]:
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.mkdir(mode=0o700)
    try:
        (probe / "driver").write_text(uuid.uuid4().hex, encoding="utf-8")
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
