"""Whether every node of a cluster sees the run's folder and the same models as the driver does.

Before anything is placed, a task a node reads what the driver wrote to run.dir, writes an answer
there, and lists the files of the models. Small files are compared by their whole SHA-256; those of
over 64 MB by size and the first and last megabyte, where safetensors has names, shapes and offsets.
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
"""Files up to this size are digested whole."""
PART_BYTES = 2**20
IP = (socket.AF_INET, socket.AF_INET6)

Listing = Mapping[str, tuple[int, str]]
"""Path -> size in bytes and digest; a path that cannot be read: -1 and the reason."""


@dataclass(frozen=True)
class Look:
    """What a node found."""

    read: str
    """What it read in run.dir, or why it could not."""
    written: str
    """Why it could not write there; empty: it could."""
    interface: str
    """What is wrong with the network interface that the config names; empty: nothing."""
    files: Listing
    requires_token: bool
    """Whether Ray on it talks to those alone who have its token."""


def require_same_files(folder: Path, paths: Sequence[str], interface: str | None) -> list[str]:
    """Check every node before anything is placed.

    Args:
        folder: run.dir, which exists.
        paths: local model folders and files of the user's functions, by absolute path.
        interface: cluster.interface.

    Returns:
        The names of nodes where Ray asks for no token.

    Raises:
        PlacementError: naming each node that cannot read or write run.dir, has other files, or is
            not on the interface.
    """
    here, nodes = listing(paths), alive_nodes()
    with _probe_folder(folder) as probe:
        word = (probe / "driver").read_text(encoding="utf-8")
        calls = [(str(probe), node.node_id, list(paths), interface, node.address) for node in nodes]
        answers = on_nodes(nodes, look, calls, TIMEOUT_S)
        problems = []
        for answer in answers:
            mirrored = probe / answer.node.node_id
            arrived = mirrored.is_file() and mirrored.read_text(encoding="utf-8") == word
            found = problems_of(answer, folder, word, arrived, here)
            problems += [f"  {answer.node.name}: {problem}" for problem in found]
    if problems:
        raise PlacementError(
            f"Not every one of the {len(nodes)} nodes can take part:\n" + "\n".join(problems) + "\n"
            "run.dir, models and functions must be on storage that all nodes mount at the same "
            "path; mount it there, or take the node out of the cluster"
        )
    looks = {answer.node.name: answer.value for answer in answers}
    return [name for name, look in looks.items() if look and not look.requires_token]


def problems_of(
    answer: Answer[Look], folder: Path, word: str, arrived: bool, here: Listing
) -> Iterator[str]:
    """What is wrong with a node.

    Args:
        answer: the node's.
        folder: run.dir.
        word: that it should have read.
        arrived: whether what it wrote is to be seen by the driver.
        here: the driver's files.
    """
    look = answer.value
    if look is None:
        yield answer.problem
        return
    if look.interface:
        yield look.interface
    if look.read != word:
        yield f"cannot read run.dir {folder} as the driver wrote it ({look.read})"
    elif look.written:
        yield f"cannot write to run.dir {folder} ({look.written})"
    elif not arrived:
        yield f"what it writes to run.dir {folder} is not seen by the driver"
    blind = tuple(f"{path}/" for path, (size, _) in look.files.items() if size < 0)
    for path in sorted(here.keys() | look.files.keys()):
        if path.startswith(blind):
            continue  # told already, by the folder
        expected, (size, digest) = here.get(path), look.files.get(path, (-1, "not there"))
        if (size, digest) == expected:
            continue
        if size < 0:
            yield f"cannot read {path} ({digest})"
        elif expected is None:
            yield f"has {path}, which the driver has not"
        else:
            what = f"{size} bytes, not {expected[0]}" if size != expected[0] else "other contents"
            yield f"has another {path} ({what})"


def look(
    probe: str, node_id: str, paths: Sequence[str], interface: str | None, address: str
) -> Look:
    """A node's view; runs on the node."""
    try:
        read = (Path(probe) / "driver").read_text(encoding="utf-8")
    except OSError as error:
        read = _reason(error)
    try:
        (Path(probe) / node_id).write_text(read, encoding="utf-8")
        written = ""
    except OSError as error:
        written = _reason(error)
    odd = "" if interface is None else problem_of_interface(interface, address)
    return Look(read, written, odd, listing(paths), requires_token())


def requires_token() -> bool:
    """Whether Ray on this node talks to those alone who have its token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def problem_of_interface(interface: str, address: str) -> str:
    """Why this node cannot talk by an interface to others, who know it by ``address``."""
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
    """Size and digest of every file at or below each of the paths; hidden files are left out."""
    found: dict[str, tuple[int, str]] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files = [file for file in inside if not file.name.startswith(".")]
        else:
            files = [path]
        for file in files:
            try:
                found[str(file)] = (file.stat().st_size, digest(file))
            except OSError as error:
                found[str(file)] = (-1, _reason(error))
    return found


def digest(file: Path, whole_bytes: int = WHOLE_BYTES, part_bytes: int = PART_BYTES) -> str:
    """SHA-256 of a file, or of its first and last part where it is larger than ``whole_bytes``."""
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
