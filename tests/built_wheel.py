"""The wheel of this checkout, and an environment with a client's packages alone."""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
UV = Path(sys.executable).with_name("uv")
"""Installed by set-up where it could be had; pip takes some ten times as long."""


def build_wheel(folder: Path) -> Path:
    """Build the wheel in a folder; returns its path.

    The build writes beside its sources, so it gets a copy of what is committed or new.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for file in [Path(os.fsdecode(name)) for name in files if name]:
        if file.parts[0] in ("rlhf_ray", "actors", "configs") or len(file.parts) == 1:
            target = folder / "source" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / file).read_bytes())
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist")]
    subprocess.run([*PIP, *build, str(folder / "source")], check=True)
    (wheel,) = (folder / "dist").glob("rlhf_ray-*.whl")
    return wheel


def install_client(folder: Path) -> Path:
    """Install the wheel without extras into a new environment; returns the folder of its programs.

    Its packages come from the package index, in the versions of the lock file.
    """
    wheel, environment = build_wheel(folder), folder / "environment"
    venv.create(environment, symlinks=True)
    lock = (ROOT / "scripts" / "requirements" / "cpu.txt").read_text("utf-8").splitlines()
    versions = folder / "versions.txt"
    pins = [line.rstrip("\\ ") for line in lock if line[:1] not in ("", " ", "#")]
    versions.write_text("\n".join(pins), "utf-8")
    if UV.is_file():
        command = [str(UV), "pip", "install", "-q", "--python", str(environment)]
    else:
        command = [*PIP, "--python", str(environment), "install"]
    subprocess.run([*command, "-c", str(versions), str(wheel)], check=True)
    return environment / "bin"
