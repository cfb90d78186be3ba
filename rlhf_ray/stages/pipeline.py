"""A whole run: its stages in order, each once, resumed at the first unfinished one."""

import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray import interruption
from rlhf_ray.cluster.session import CARRIED, dashboard_url, ray_session
from rlhf_ray.config import Config
from rlhf_ray.config.identity import Change, adjustments, differences, is_read, settled
from rlhf_ray.config.section import is_mapping
from rlhf_ray.config.stages import BEFORE_PPO, STAGES, SUPERVISED
from rlhf_ray.config.yaml_values import parsed
from rlhf_ray.disk import (
    full_disk_is_an_error,
    temporary_folder,
    unwritable_is_an_error,
    write_atomically,
)
from rlhf_ray.doctor.inputs import files_of_roles, require_inputs
from rlhf_ray.doctor.shared_files import require_same_files
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.observability.lasting_output import keep_output
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.trackers import current, tracking
from rlhf_ray.placement.hardware import hide_gpus, restored_gpus
from rlhf_ray.runs.control import ControlFiles, reporting_status
from rlhf_ray.runs.folder import CHANGES, RunFolder, require_durable_folder
from rlhf_ray.runs.scratch import delete_scratch, large_files_in_scratch
from rlhf_ray.stages.gpu_layout import require_capacity, settle_layout

MOST_SHOWN = 20
"""Changed keys that a refusal lists."""
IMPORT_S = 60.0
"""Longest wait for imports once Ray has started; a slower one goes on beside the run."""


@restored_gpus()
def run(config: Config) -> Path:
    """Run the stages that are not finished; returns the run's folder.

    Raises:
        RlhfError: what a stage raised; finished stages stay finished.
    """
    keep_output()
    hide_gpus(config)
    folder = RunFolder(config)
    interruption.explain(lambda: f"Finished stages are kept. {_resume(folder)}")
    temporary_folder()
    open_run(folder, config.run.stages)
    pending = [stage for stage in config.run.stages if not _finished(folder, stage)]
    require_inputs(config, pending)
    _require_known_arguments(config, pending)
    progress = Progress(config.run.stages)
    config = settle_layout(config, pending, progress.say)
    with ExitStack() as session:
        session.enter_context(large_files_in_scratch(config))
        session.enter_context(tracking(config, folder.path))
        control = session.enter_context(reporting_status(config.run.name, folder.path))
        on_ray = False
        for stage in (stage for stage in STAGES if stage in config.run.stages):
            # Checked only now: whether evaluate is up to date depends on what ppo has just done.
            if _finished(folder, stage):
                progress.say(f"{stage}: {_why_skipped(config, stage)}")
                continue
            # Before prepare already: what comes next starts meanwhile.
            if not on_ray and any(STAGES[name].needs_ray for name in pending):
                _enter_ray(session, folder, progress, pending)
                on_ray = True
            _begin_ahead(stage, folder, config)
            if _stopped_in(stage, config, folder, control):
                control.update(state="stopped")
                asked = "Stopped on request; " if control.requested().stop else ""
                progress.say(f"{asked}run or submit {folder.path} again to resume")
                return folder.path
        delete_scratch(config)
        control.update(state="finished")
    return folder.path


def _begin_ahead(stage: str, folder: RunFolder, config: Config) -> None:
    """Start the processes of this stage's training while it reads its data, and of the next one's.

    They wait for the data, or for models that are still trained.
    """
    due = [name for name in STAGES if name in config.run.stages and not _finished(folder, name)]
    trained = next((name for name in due[:2] if name in SUPERVISED), None)
    if stage == "rank":
        trained = None  # people take their time; nothing holds memory or GPUs meanwhile
    if trained is None:
        CARRIED.close()
    else:
        from rlhf_ray.stages.supervised import ray_train

        ray_train.begin_ahead(config, trained)
    if stage in BEFORE_PPO and due[1:2] == ["ppo"]:
        from rlhf_ray.stages.ppo.stage import begin_ahead

        begin_ahead(config)


def _require_known_arguments(config: Config, stages: Sequence[str]) -> None:
    for stage in stages:
        settings = getattr(config, stage) if stage in SUPERVISED else None
        if settings and (settings.trainer or settings.deepspeed):
            from rlhf_ray.stages.supervised.arguments import refuse_unknown_arguments

            refuse_unknown_arguments(settings)


def _stopped_in(stage: str, config: Config, folder: RunFolder, control: ControlFiles) -> bool:
    """Run a stage; return whether the run ends with it: on request, or until people have answered.

    Raises:
        KeyboardInterrupt: by a signal without a request; the run is to be started again.
    """
    control.begin_stage(stage)
    current().begin_stage(stage)
    interruption.explain(lambda: _kept(folder, stage))
    try:
        if run_stage(config, stage) is None and stage == "rank":
            return True
        current().end_stage(stage, folder.path / stage)
        if interruption.exit_code() is not None:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not control.requested().stop:
            raise
    return control.requested().stop


def _kept(folder: RunFolder, stage: str) -> str:
    """Say what a stage that was interrupted has kept, and how to resume."""
    saved, unit = folder.position(stage), "version" if stage == "ppo" else "step"
    if folder.summary(stage) is not None:
        what = f"The stage {stage} is finished"
    elif stage == "prepare":
        what = "The stage prepare goes on after the parts of its dumps that are done"
    elif saved is None:
        what = f"The stage {stage} has saved nothing yet and begins again; finished ones are kept"
    else:
        what = f"The stage {stage} is saved up to {unit} {saved}"
    return f"{what}. {_resume(folder)}"


def _resume(folder: RunFolder) -> str:
    return f"To resume, run or submit {folder.path} again"


def run_stage(config: Config, stage: str) -> object:
    """Run one stage, in the Ray session that the caller opened."""
    with full_disk_is_an_error(RunFolder(config).path):
        return STAGES[stage].load()(config)


@restored_gpus()
def run_single(config: Config, stage: str) -> Path:
    """Run one stage as a command of its own, even if it is finished."""
    keep_output()
    hide_gpus(config)
    folder = RunFolder(config)
    interruption.explain(lambda: f"Finished stages are kept. {_resume(folder)}")
    temporary_folder()
    open_run(folder, [stage])
    config = settle_layout(config, [stage], Progress().say)
    with ExitStack() as session:
        session.enter_context(large_files_in_scratch(config))
        session.enter_context(tracking(config, folder.path))
        control = session.enter_context(reporting_status(config.run.name, folder.path))
        if STAGES[stage].needs_ray:
            _enter_ray(session, folder, Progress(), [stage])
        stopped = _stopped_in(stage, config, folder, control)
        if not stopped:
            delete_scratch(config)
        control.update(state="stopped" if stopped else "finished")
    return folder.path


@contextmanager
def _imported_meanwhile(stages: Collection[str]) -> Iterator[None]:
    """Import the first stage that needs Ray while the block waits for Ray's own processes."""

    def load() -> None:
        with suppress(Exception):  # the stage itself meets the error again
            next(s for name, s in STAGES.items() if name in stages and s.needs_ray).load()

    importing = threading.Thread(target=load, name="imports", daemon=True)
    importing.start()
    try:
        yield
    finally:
        importing.join(IMPORT_S)


def _enter_ray(
    session: ExitStack, folder: RunFolder, progress: Progress, stages: Collection[str]
) -> None:
    """Start or join Ray for the length of a session; check the nodes of a joined cluster."""
    config = folder.config
    with _imported_meanwhile(stages):
        session.enter_context(ray_session(config))
    if config.cluster.joins_cluster:
        files = files_of_roles(folder)
        if unguarded := require_same_files(folder.path, files, config.cluster.interface):
            progress.say(
                f"Warning: Ray requires no token on {', '.join(unguarded)}: anyone who reaches "
                "its ports can run code; start it with RAY_AUTH_MODE=token (docs/security.md)"
            )
        require_capacity(config, stages)
    if url := dashboard_url():
        progress.say(f"Ray dashboard: {url} (its token: ray get-auth-token)")


def open_run(folder: RunFolder, stages: Collection[str] = tuple(STAGES)) -> None:
    """Make the run's folder, or check that the run in it is this config's.

    Args:
        folder: the run's.
        stages: the requested ones. What finished ones were run with stays in the saved config where
            this config says nothing of it.

    Raises:
        CheckpointError: the folder holds another run's models, data or algorithm.
        ConfigError: run.resume is must and there is no run; the folder is not writable, or another
            process writes to it.
    """
    config, saved = folder.config, folder.saved
    folder.require_own()
    ControlFiles(folder.path).require_free()  # first: another process may be writing there
    if config.cluster.joins_cluster:
        require_durable_folder(config)
    if config.run.resume == "never" and saved.is_file():
        old = Path(os.path.realpath(folder.path))  # a link to other storage stays
        aside = old.with_name(f"{old.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        with unwritable_is_an_error(old):
            old.rename(aside)
        Progress().say(f"run.resume is never: the old run is now {aside}")
    values = config.model_dump(mode="json")
    adjusted: list[Change] = []
    if saved.is_file():
        adjusted = _continue(folder, _read_saved(saved), stages, values)
    elif config.run.resume == "must":
        raise ConfigError(f"run.resume is must, and {folder.path} holds no run; check run.dir")
    folder.make()
    _record(folder, adjusted)
    write_atomically(saved, yaml.safe_dump(values, sort_keys=False))


def _read_saved(path: Path) -> Mapping[str, object]:
    try:
        saved = parsed(path.read_text(encoding="utf-8"), path.name)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore or remove it") from error
    if not is_mapping(saved):
        raise CheckpointError(f"{path} holds no config; restore or remove it")
    return saved


def _continue(
    folder: RunFolder, saved: Mapping[str, object], stages: Collection[str], values: dict[str, Any]
) -> list[Change]:
    """Refuse another run; return the adjustments to this one.

    ``values``, the config that will be saved, takes over what finished stages were run with.
    """
    begun = [stage for stage in STAGES if folder.has_begun(stage)]
    active = [stage for stage in STAGES if stage in stages or folder.summary(stage) is None]
    changes, adjusted = (find(saved, folder.config, begun) for find in (differences, adjustments))
    kept = settled(saved, folder.config, [*changes, *adjusted], active)
    if changed := [change for change in changes if change[0] not in kept]:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, old, new in changed[:MOST_SHOWN]]
        if more := len(changed) - len(lines):
            lines.append(f"  and {more} more")
        listed = "\n".join(lines)
        raise CheckpointError(
            f"{folder.path} holds a run with another model, data or algorithm:\n{listed}\n"
            "Choose another run.name, set these back, or begin a new run with run.resume=never "
            "(the folder of the old one is renamed)"
        )
    for key, value in kept.items():
        *sections, name = key.split(".")
        reduce(getitem, sections, values)[name] = value
    return [change for change in adjusted if change[0] not in kept]


def _record(folder: RunFolder, adjusted: Sequence[Change]) -> None:
    """Append adjustments to changes.jsonl, and print them."""
    if not adjusted:
        return
    done = [stage for stage in STAGES if folder.summary(stage) is not None]
    concerned = [s for s in STAGES if any(is_read(key, [s]) for key, _, _ in adjusted)]
    # The last iteration or optimizer step of each stage that was done without the change.
    after = {s: last for s in concerned if (last := folder.position(s)) is not None}
    folder.record_changes(adjusted, after, done)
    listed = "; ".join(f"{key} {old!r} -> {new!r}" for key, old, new in adjusted)
    Progress().say(f"Changed on resume, recorded in {CHANGES}: {listed}")


def _finished(folder: RunFolder, stage: str) -> bool:
    """Return whether a stage has nothing left to do under this config."""
    config = folder.config
    if stage == "report":
        return False
    summary = folder.summary(stage)
    if stage == "reward" and config.reward.benchmark is not None:
        return summary is not None and "benchmark" in summary
    if config.external_model(stage):
        return True
    if stage == "ppo" and summary is not None:  # more iterations may be configured by now
        return summary["iterations"] >= config.ppo.iterations
    if stage == "evaluate" and summary is not None:
        policy, has_dpo = folder.summary("ppo"), folder.summary("dpo") is not None
        # Evaluate is due again after more PPO, after dpo, or where it is configured otherwise.
        is_newest = policy is None or summary["policy_version"] == policy["adapter_version"]
        awaits_dpo = has_dpo and config.evaluate.models is None and "dpo" not in summary["models"]
        return is_newest and not awaits_dpo and summary.get("asked") == config.evaluate.asked
    return summary is not None


def _why_skipped(config: Config, stage: str) -> str:
    model = config.external_model(stage)
    return f"given as {model}" if model else "finished before"
