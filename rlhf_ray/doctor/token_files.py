"""Check that files with this user's keys and tokens can be read by nobody else."""

import os
from pathlib import Path

from rlhf_ray.doctor.preflight import NOTE, Check

FILES = ("~/.ray/auth_token", "~/.cache/huggingface/token", "~/.netrc", "~/.aws/credentials")
VARIABLES = ("RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH", "NETRC")


def check_token_files() -> Check:
    """Name the files that others can read, or that another user could have written."""
    files = [*FILES, *(os.environ[name] for name in VARIABLES if os.environ.get(name))]
    found = [path for file in files if (path := Path(file).expanduser()).is_file()]
    exposed = [str(path) for path in found if _is_exposed(path)]
    if exposed:
        remedy = f"chmod 600 {' '.join(exposed)}; if others use this machine, make new tokens"
        return Check("token files", f"{len(exposed)} open to others", NOTE, remedy)
    return Check("token files", f"{len(found)}, yours alone" if found else "none")


def _is_exposed(path: Path) -> bool:
    found = path.stat()
    return bool(found.st_mode & 0o077) or found.st_uid not in (0, os.getuid())
