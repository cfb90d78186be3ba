"""Pack the part of the working folder that a job needs: code, configs and small files."""

import os
import re
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rlhf_ray.errors import ConfigError

GIT_TIMEOUT_S = 60.0
MAX_BYTES = 100 * 10**6
"""Largest sum of file sizes; Ray's job server refuses requests over 100 MiB."""

EXCLUDED_AT_TOP = ("runs", "data")
"""Top-level folders that the cluster reads from its own storage; deeper down the names may be
code."""

EXCLUDED_ANYWHERE = (
    *(".git", ".venv", "venv", "node_modules", "wandb", "mlruns"),
    *("__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".ipynb_checkpoints"),
    *("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.arrow", "*.parquet", "*.7z"),
)
"""Patterns of names of files and folders."""

SECRETS = (
    # Keys and certificates.
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.p8", "*.jks", "*.keystore", "*.ppk", "*.keytab"),
    *("*.kdbx", "*.gpg", "*.asc", "*.ovpn", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    # Environments.
    *(".env", ".env.*", "*.env", ".envrc"),
    # What command-line tools and clouds keep.
    *(".ssh", ".gnupg", ".aws", ".azure", ".gcloud", "gcloud", ".kube", "kubeconfig*", ".docker"),
    *(".dockercfg", ".netrc", "_netrc", ".npmrc", ".yarnrc*", ".pypirc", ".git-credentials"),
    *(".pgpass", ".my.cnf", ".htpasswd", ".boto", ".s3cfg", ".databrickscfg", ".vault-token"),
    *(".terraform", "*.tfstate*", "*.tfvars*", ".huggingface", ".ray", ".streamlit"),
    # By what they are called.
    *("credentials", "credentials.[!p]*", "credentials.p[!y]*", "*credentials*.json"),
    *("*service*account*.json", "kaggle.json", ".kaggle", "rclone.conf", ".mylogin.cnf"),
    *("client_secret*", "secrets.json", "secrets.y*ml", "secrets.toml", "secrets.txt", "*.secret"),
    *("*.token", ".ray-token*", "auth_token", "api_key*.txt", "*password.txt", "*passwords.txt"),
    "*token.txt",
)
"""Patterns of names of files and folders that hold keys, whatever their case."""

_PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:\s|\\[nr])*(?:Proc-Type|[A-Za-z0-9+/=]{20})"
)
_LOOKED_AT = 100_000
"""Bytes of a file in which a private key is looked for."""

NUM_LISTED = 5
"""How many of the largest files, and of those withheld, are named."""


@dataclass(frozen=True)
class Contents:
    """What of a working folder travels with a job."""

    sizes: Mapping[Path, int]
    """Bytes of each file, by its path in the folder."""
    withheld: Sequence[Path]
    """Files that stay because they hold keys."""

    def __str__(self) -> str:
        total = sum(self.sizes.values())
        lines = [f"{len(self.sizes)} files travel, {_megabytes(total)}; the largest:"]
        lines += self.largest()
        if self.withheld:
            names = ", ".join(str(path) for path in self.withheld[:NUM_LISTED])
            more = ", ..." if len(self.withheld) > NUM_LISTED else ""
            lines.append(f"{len(self.withheld)} files stay here, as they hold keys: {names}{more}")
        return "\n".join(lines)

    def largest(self) -> list[str]:
        """Return a line for each of the largest files."""
        paths = sorted(self.sizes, key=lambda path: -self.sizes[path])[:NUM_LISTED]
        return [f"  {_megabytes(self.sizes[path]):>11}  {path}" for path in paths]


def contents(folder: Path) -> Contents:
    """Return what of a folder travels: not the exclusions above, nor what Git ignores.

    Raises:
        ConfigError: there is no such folder, a link leads out of it, or the files are too large.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no working folder {folder}; name one with --working-dir")
    listed = _known_to_git(folder)
    candidates = _walk(folder) if listed is None else listed
    found = sorted(p for p in candidates if not _is_excluded(p) and (folder / p).is_file())
    withheld = [path for path in found if _is_secret(path) or _holds_key(folder / path)]
    files = [path for path in found if path not in set(withheld)]
    root = folder.resolve()
    for path in files:
        target = (folder / path).resolve()
        if not target.is_relative_to(root):
            raise ConfigError(
                f"{path} is a link that leads out of the working folder, to {target}, and the file "
                "would travel with the job. Copy it into the folder, remove the link, or list it "
                "in .gitignore"
            )
        if _is_excluded(inside := target.relative_to(root)) or _is_secret(inside):
            withheld.append(path)
    sizes = {path: (folder / path).stat().st_size for path in files if path not in set(withheld)}
    found_contents = Contents(sizes, withheld)
    _require_small(folder, found_contents)
    return found_contents


def pack(folder: Path, extra: dict[str, str], archive: Path) -> int:
    """Write the archive of a working folder and return its number of files.

    Args:
        folder: see `contents`.
        extra: name in the archive -> text of further files, which replace any of that name.
        archive: the zip file to write.

    Raises:
        ConfigError: see `contents`.
    """
    files = [path for path in contents(folder).sizes if path.as_posix() not in extra]
    # Not strict: a zip holds no dates before 1980, which files of some build systems have.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
        for path in files:
            packed.write(folder / path, path)
        for name, text in extra.items():
            packed.writestr(name, text)
    return len(files) + len(extra)


def _is_excluded(path: Path) -> bool:
    if path.parts[0] in EXCLUDED_AT_TOP and len(path.parts) > 1:
        return True
    return any(fnmatch(part, pattern) for part in path.parts for pattern in EXCLUDED_ANYWHERE)


def _is_secret(path: Path) -> bool:
    return any(fnmatch(part.lower(), pattern) for part in path.parts for pattern in SECRETS)


def _holds_key(path: Path) -> bool:
    """Return whether a file is a private key or a service account, whatever its name."""
    try:
        with path.open("rb") as file:
            return _PRIVATE_KEY.search(file.read(_LOOKED_AT)) is not None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}) and sent") from error


def _known_to_git(folder: Path) -> list[Path] | None:
    """Return the files that Git does not ignore; None outside a Git work tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(
            command, cwd=folder, capture_output=True, check=True, timeout=GIT_TIMEOUT_S
        ).stdout
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"git ls-files in {folder} did not end within {GIT_TIMEOUT_S:g} s; see whether its "
            "file system answers"
        ) from None
    except (OSError, subprocess.CalledProcessError):
        return None
    return [Path(os.fsdecode(name)) for name in listing.split(b"\0") if name]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not _is_skipped(Path(parent), here / name)]
        yield from (here / name for name in names)


def _is_skipped(parent: Path, folder: Path) -> bool:
    """Whether to pack nothing below a folder: excluded by name, or a Python environment."""
    return _is_excluded(folder / "_") or (parent / folder.name / "pyvenv.cfg").is_file()


def _require_small(folder: Path, found: Contents) -> None:
    total = sum(found.sizes.values())
    if total > MAX_BYTES:
        named = "\n".join(found.largest())
        raise ConfigError(
            f"The working folder {folder} has {total / 1e6:.0f} MB to send, more than the limit of "
            f"{MAX_BYTES / 1e6:.0f} MB. The largest files:\n{named}\nMove data and models to "
            "storage that the cluster's nodes can read, list what the run does not need in "
            ".gitignore, or choose another folder with --working-dir"
        )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
