"""The folder of a run's large temporary files: ``run.scratch``, or a folder in ``run.dir``."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.disk import large_files_in, make_private, private_name, unwritable_is_an_error
from rlhf_ray.errors import ConfigError
from rlhf_ray.runs.folder import RunFolder

_TEMPORARY = "tmp"
"""Folder in it for files that nothing reads after their process."""


def scratch_folder(config: Config) -> Path:
    """Return the run's own scratch folder on this node, created if missing.

    It stays until the run is done, so that a resumed run finds what it has written.

    Raises:
        ConfigError: it cannot be written.
    """
    if config.run.scratch is None:
        return RunFolder(config).stage("scratch")
    return _made(config, "run.scratch", config.run.scratch)


def shared_scratch(config: Config) -> Path:
    """Return a folder for what prepare has grouped, which all its processes see.

    Raises:
        ConfigError: it cannot be written.
    """
    if config.prepare.scratch is not None:
        return _made(config, "prepare.scratch", config.prepare.scratch)
    if config.cluster.joins_cluster:
        return RunFolder(config).stage("scratch")
    return scratch_folder(config)


def _made(config: Config, key: str, parent: str) -> Path:
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{key} {parent} cannot be made ({error.strerror}); set it to a folder that you can "
            "write to"
        ) from error
    return make_private(_own_folder(config, parent))


def _own_folder(config: Config, parent: str) -> Path:
    """Return a name that no other run has, of this user or another: many share a disk."""
    run = str(RunFolder(config).path)
    digest = hashlib.blake2b(run.encode(), digest_size=6).hexdigest()
    return Path(parent).absolute() / f"{private_name()}-{config.run.name}-{digest}"


@contextmanager
def large_files_in_scratch(config: Config) -> Iterator[None]:
    """Have the block's large temporary files in ``run.scratch``, where that is set.

    What a killed process of the run left of such files is deleted.
    """
    if config.run.scratch is None:
        yield
        return
    folder = scratch_folder(config) / _TEMPORARY
    shutil.rmtree(folder, ignore_errors=True)
    with unwritable_is_an_error(folder):
        folder.mkdir()
    try:
        with large_files_in(folder):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def delete_scratch(config: Config) -> None:
    """Delete the run's scratch folder on this node: the run is done."""
    parent = config.run.scratch
    folder = RunFolder(config).path / "scratch" if parent is None else _own_folder(config, parent)
    shutil.rmtree(folder, ignore_errors=True)
