"""What this checkout is compared with: other commits of it, and TRL in its own environment."""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRL = "trl==1.12.0"
"""The last version that has PPO."""
INSTALL_S = 600


def commit(name: str) -> str:
    """Return the id of a commit, for `argparse`.

    Raises:
        argparse.ArgumentTypeError: there is none of this name.
    """
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if found.returncode:
        raise argparse.ArgumentTypeError(f"{name!r} is no commit of {ROOT}")
    return found.stdout.strip()


def commit_of(folder: Path) -> str:
    """Return the short id of a checkout's commit; empty where there is none."""
    return _git("-C", str(folder), "describe", "--always", "--dirty").stdout.strip()


@contextmanager
def checked_out(name: str) -> Iterator[str]:
    """Check a commit out into a temporary folder; yield it."""
    with tempfile.TemporaryDirectory(prefix="rlhf-against-") as folder:
        tree = str(Path(folder) / "code")
        added = _git("worktree", "add", "--detach", tree, name)
        if added.returncode:
            raise SystemExit(f"git worktree add failed: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", tree)


def trl_environment() -> str:
    """Install TRL into an environment of its own, unless it is there; return that one's Python.

    It sees this environment's packages, so that both sides compute with the same PyTorch,
    transformers and PEFT; nothing is installed into ours.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "rlhf_ray" / TRL.replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / "complete"
    ours = sysconfig.get_paths()["purelib"]
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == ours:
        return str(python)
    print(f"Installing {TRL} into {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    # Without its dependencies, PyTorch among them: they are ours.
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", TRL]
    ended = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    if ended.returncode:
        raise SystemExit(f"{TRL} could not be installed: {ended.stderr.strip()[-500:]}")
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(own) / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
    stamp.write_text(ours, encoding="utf-8")
    return str(python)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
