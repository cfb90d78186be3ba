"""A new run that starts from a commit of another one, with other settings."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.config import Config, dump
from rlhf_ray.config.identity import Change, adjustments, differences
from rlhf_ray.config.stages import STAGES
from rlhf_ray.disk import DAMAGE, full_disk_is_an_error, unwritable_is_an_error
from rlhf_ray.driver.checkpoint import Checkpoints, SavedCommit, kept_versions, read_commit
from rlhf_ray.errors import CheckpointError, ConfigError, DataError
from rlhf_ray.models.folders import BASE_MODEL, relative_base
from rlhf_ray.observability.samples.index import INDEX, TEXTS
from rlhf_ray.observability.samples.writing import SampleWriter
from rlhf_ray.observability.sinks import JsonlSink, read_jsonl
from rlhf_ray.runs.datasets import RENDERED
from rlhf_ray.runs.folder import CHANGES, ORIGIN, RunFolder
from rlhf_ray.runs.lineage import Origin
from rlhf_ray.runs.models import not_kept, shortened

RECORDS = ("metrics.jsonl", "eval.jsonl", "warnings.jsonl")
"""Records of PPO that a branch takes over up to its commit, besides the samples."""
PREPARED = ("rl", "evaluation", "summary.json", "quality.json")
"""What PPO and evaluate read of what prepare wrote."""
AFTER_PPO = list(STAGES)[list(STAGES).index("ppo") + 1 :]


@dataclass(frozen=True)
class Branch:
    """A run that starts from another one's commit."""

    folder: Path
    origin: Origin
    changes: Sequence[Change]
    """Keys that differ from the other run's, and count from the next iteration on."""
    num_left: int
    """Iterations that are left of ppo.iterations."""


def branch(parent: Config, wanted: Config, version: str) -> Branch:
    """Write the folder of a run that continues from a commit; the other run is only read.

    The commit, PPO's records up to it and its prompts are copied. The models below the policy stay
    where they are, and the branch names them by path (sft.path, reward.path, critic.path).

    Args:
        parent: config of the run that has the commit.
        wanted: the same with the branch's overrides; its run.dir, unless given, is beside the
            other's folder.
        version: number of the commit, latest or best.

    Raises:
        DataError: there is no such commit, or not its whole state.
        ConfigError: the branch has no name of its own, its folder exists, or a key differs that
            must stay.
        CheckpointError: the commit is damaged.
    """
    source, target = RunFolder(parent), _target(parent, wanted)
    saved_commit = _whole(source.path / "checkpoints", version)
    changes = _allowed(parent, wanted)
    iteration = int(saved_commit.progress["iteration"])
    origin = Origin(parent.run.name, str(source.path), saved_commit.version, iteration)
    config = _config(source, wanted, target)
    temporary = target.with_name(f".{target.name}.branch")
    with full_disk_is_an_error(target.parent), unwritable_is_an_error(target):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(mode=0o700, parents=True)
            _write_commit(config, temporary, saved_commit)
            _copy_records(source, temporary, iteration)
            (temporary / ORIGIN).write_text(json.dumps(asdict(origin), indent=2) + "\n")
            here = RunFolder(_at(config, temporary))
            if changes:
                here.record_changes(changes, {"ppo": iteration}, ())
            here.saved.write_text(dump(config), encoding="utf-8")
            os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Branch(target, origin, changes, config.ppo.iterations - iteration)


def _target(parent: Config, wanted: Config) -> Path:
    """Return the folder of the branch, which must be new."""
    old = Path(parent.run.dir).absolute()
    if wanted.run.name == parent.run.name:
        raise ConfigError(
            f"A branch is a run of its own: give it a name, such as run.name={parent.run.name}-2"
        )
    is_given = Path(wanted.run.dir).absolute() != old
    target = Path(wanted.run.dir).absolute() if is_given else old.parent / wanted.run.name
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists; choose another run.name, or set run.dir")
    if old.resolve() in target.resolve().parents:
        raise ConfigError(
            f"run.dir {target} lies in the folder of the run that it branches from; set run.dir "
            "to one beside it"
        )
    return target


def _whole(commits: Path, version: str) -> SavedCommit:
    """Read a commit with its whole state; refuse one that is gone, or an adapter alone."""
    whole, kept = kept_versions(commits, whole=True), kept_versions(commits)
    if not whole:
        raise DataError(f"{commits} holds no whole commit, so no run can start from one")
    name = os.readlink(commits / version) if (commits / version).is_symlink() else version
    name = str(whole[-1]) if name == "latest" else name
    if not name.isdigit():
        raise DataError(
            f"{commits} has no version {version!r}: name latest, best or a number; whole ones are "
            f"{shortened(whole)}"
        )
    number = int(name)
    if number not in whole:
        what = "The whole state of version" if number in kept else "Version"
        raise DataError(not_kept(commits, number, whole, what))
    try:
        return read_commit(commits / name)
    except (*DAMAGE, OSError) as error:
        others = [each for each in whole if each != number]
        raise CheckpointError(
            f"Version {name} in {commits} is damaged ({error}); branch from another one"
            + (f": {shortened(others)}" if others else "")
        ) from error


def _allowed(parent: Config, wanted: Config) -> Sequence[Change]:
    """Return the changed keys that may change on resume; refuse the others."""
    saved = parent.model_dump(mode="json")
    if fixed := differences(saved, wanted, ("ppo",)):
        listed = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in fixed)
        raise ConfigError(
            f"A branch continues {parent.run.name}, so what cannot change on resume stays "
            f"(docs/config.md says which):\n{listed}\nLeave these keys out, or begin a new run"
        )
    return adjustments(saved, wanted, ("ppo",))


def _config(source: RunFolder, wanted: Config, target: Path) -> Config:
    """Return the branch's config: the stages from PPO on, the models before it by path."""
    config = source.config
    stages = ["ppo", *(stage for stage in wanted.run.stages if stage in AFTER_PPO)]
    paths = {"sft": source.sft_model(), "reward": source.reward_model()}
    if config.critic.path:
        paths["critic"] = source.critic_model()
    update = {
        name: getattr(wanted, name).model_copy(update={"path": path})
        for name, path in paths.items()
        if path is not None
    }
    return _at(wanted.model_copy(update=update), target, stages=stages, resume="auto")


def _at(config: Config, folder: Path, **run: object) -> Config:
    changed = config.run.model_copy(update={**run, "dir": str(folder)})
    return config.model_copy(update={"run": changed})


def _write_commit(config: Config, folder: Path, commit: SavedCommit) -> None:
    """Write the commit as the branch's own, with the bases' paths as seen from there."""
    here = RunFolder(config)
    groups = {"policy": commit.policy, "critic": commit.critic}
    bases = {"policy": here.sft_model(), "critic": here.critic_model() if commit.critic else ""}
    for name, files in groups.items():
        if BASE_MODEL in files:
            committed = here.path / "checkpoints" / "0" / name
            files[BASE_MODEL] = relative_base(committed, bases[name]).encode()
    # The best version stays where it is: the branch finds one of its own.
    progress = {**commit.progress, "best_score": None}
    held = {name: files for name, files in groups.items() if files}
    Checkpoints(folder / "checkpoints", config.ppo.keep_checkpoints, {}).save(
        commit.version, held, progress
    )


def _copy_records(run: RunFolder, folder: Path, iteration: int) -> None:
    """Copy what PPO reads of prepare, and its records up to an iteration."""
    source, stage = run.path, folder / "ppo"
    stage.mkdir()
    for name in (*RECORDS, TEXTS, INDEX):
        if (source / "ppo" / name).is_file():
            shutil.copyfile(source / "ppo" / name, stage / name)
    for name in RECORDS:
        JsonlSink(stage / name).truncate_after("iteration", iteration)
    SampleWriter(stage, [each.name for each in run.config.rewards], iteration).close()
    if (source / "ppo" / RENDERED).is_dir():  # it draws prompts as the other run does
        (stage / RENDERED).mkdir()
    for record in read_jsonl(source / CHANGES):
        if record.get("after", {}).get("ppo", iteration) < iteration:
            JsonlSink(folder / CHANGES).append(record)
    if (source / "prepare").is_dir():
        (folder / "prepare").mkdir()
    for path in (source / "prepare" / name for name in PREPARED):
        if path.is_dir():
            shutil.copytree(path, folder / "prepare" / path.name)
        elif path.is_file():
            shutil.copyfile(path, folder / "prepare" / path.name)
