"""Checks of what a run takes from its surroundings: temporary folder, RAY_ADDRESS, run folder."""

import os
import tempfile
from pathlib import Path

from rlhf_ray.cluster.connection import VARIABLE, require_cluster
from rlhf_ray.cluster.session import ray_folder
from rlhf_ray.config import Config
from rlhf_ray.disk import takes_links, temporary_folder
from rlhf_ray.doctor.inputs import require_inputs
from rlhf_ray.doctor.preflight import FAIL, NOTE, Check
from rlhf_ray.errors import RlhfError


def check_environment(config: Config | None) -> list[Check]:
    """Return the checks of this machine; with a config, also those of its folder and inputs."""
    checks = [check_temporary_folder(), check_ray_address(config)]
    if config is not None:
        checks += [check_run_folder(config), check_inputs(config)]
    return checks


def check_temporary_folder() -> Check:
    """Check that temporary files can be written, and that Ray's sockets have short enough names."""
    given = os.environ.get("TMPDIR")
    try:
        folder, ray = temporary_folder(), ray_folder()
    except RlhfError as error:
        return _failed("TMPDIR", error)
    if given and Path(given) != folder:
        remedy = f"make {given} a folder that you can write to, or unset TMPDIR"
        return Check("TMPDIR", f"{given} cannot be used, {folder} is", NOTE, remedy)
    where = "" if ray.is_relative_to(folder) else f"; too long for Ray's sockets, which get {ray}"
    return Check("TMPDIR", f"{folder}{where}")


def check_ray_address(config: Config | None) -> Check:
    """Check that the cluster that a run would join answers."""
    given = os.environ.get(VARIABLE)
    if not (config or Config()).cluster.joins_cluster:
        state = f"{given}, not used (cluster.mode)" if given else "not set"
        return Check(VARIABLE, f"{state}: runs start Ray on this machine")
    try:
        require_cluster()
    except RlhfError as error:
        return _failed(VARIABLE, error)
    return Check(VARIABLE, f"{given or 'not set'}: the cluster answers (all its nodes: --cluster)")


def check_run_folder(config: Config) -> Check:
    """Check that the run's folder can be written, and takes the links that commits are found by."""
    folder = Path(config.run.dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            if takes_links(Path(scratch)):
                return Check("run.dir", f"{folder}: can be written, takes links")
    except OSError as error:
        remedy = "fix its permissions, or set run.dir to another folder"
        return Check("run.dir", f"{place}: {error.strerror or error}", FAIL, remedy)
    remedy = "checkpoints/latest and best will be missing; set run.dir to a file system with links"
    return Check("run.dir", f"{folder}: its file system takes no symbolic links", NOTE, remedy)


def check_inputs(config: Config) -> Check:
    """Check that models, data and functions of all of the run's stages are there."""
    try:
        require_inputs(config, config.run.stages)
    except RlhfError as error:
        return _failed("inputs", error)
    return Check("inputs", "models, data and functions are there")


def _failed(name: str, error: RlhfError) -> Check:
    reading, _, remedy = " ".join(str(error).split()).partition(". ")
    return Check(name, reading, FAIL, remedy or "see docs/config.md")
