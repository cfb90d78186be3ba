"""Atomic commits in the run's folder: a version is saved whole, or not at all.

``checkpoints/<version>/{policy,critic}/`` are PEFT folders that also hold the learner's state.
A version that is no commit any more may keep its policy's adapter (``ppo.keep_adapters``).
``state.json`` holds the rest and every file's digest; ``latest`` and ``best`` link to versions.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_ray.disk import DAMAGE
from rlhf_ray.errors import CheckpointError

PlainMoments = Mapping[str, Sequence[float]]
"""Reward source -> count, sum and sum of squares of its raw scores so far."""
Losses = Mapping[str, Sequence[float]]
"""Watched metric -> its absolute values in the latest iterations."""


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run besides its learners, as a commit holds it."""

    iteration: int = 0
    """Number of finished iterations, rolled-back ones included."""
    version: int = 0
    """Adapter version."""
    prompts_drawn: int = 0
    """Number of prompts learnt from, discarded or filtered."""
    in_flight: Sequence[Mapping[str, Any]] = ()
    """Batches drawn and not learnt yet, as `ledger.Draw`; a resumed run draws their prompts again,
    before those that were never drawn."""
    prompts_returned: Sequence[int] = ()
    """Prompts of batches that were in flight before a resume, and are to be drawn again still."""
    samples_drawn: int | None = None
    """Number of rollouts requested, those in flight included; None in commits of older versions."""
    samples_generated: int = 0
    """Number of rollouts that were learnt from, discarded or filtered."""
    samples_learnt: int = 0
    """Number of rollouts that were learnt from."""
    samples_set_aside: int = 0
    """Number of rollouts discarded by rollbacks."""
    samples_filtered: int = 0
    """Number of rollouts replaced by others, because their prompt's all scored the same."""
    samples_requeued: int = 0
    """Number of rollouts requeued after a generator failed or left."""
    samples_reissued: int = 0
    """Number of rollouts sampled by a second generator because the first was slow."""
    generator_restarts: int = 0
    """Number of restarts of generators."""
    kl_coef: float = 0.0
    """KL coefficient of the next iteration."""
    kl_coef_from: float | None = None
    """``ppo.kl_coef`` from which it has adapted; None in commits of older versions."""
    gap_bound: float | None = None
    """Bound on the log-prob mismatch, nats per token; None until calibrated."""
    reward_moments: PlainMoments = field(default_factory=dict[str, Sequence[float]])
    """Running moments of the reward sources with ``scale: running``."""
    losses: Losses = field(default_factory=dict[str, Sequence[float]])
    """Latest losses and gradient norms; the loss-spike guard compares with their medians."""
    useful_s: float = 0.0
    """Useful seconds up to this commit, see `useful_time`."""
    committed_at: float = 0.0
    """Unix time of this commit; 0 before the first, and in commits of older versions."""
    rollbacks_in_a_row: int = 0
    """Number of rollbacks in a row up to this iteration."""
    best_score: float | None = None
    """Best held-out score so far."""
    weights: Sequence[float] | None = None
    """Weights of the reward sources in it; None in commits of older versions."""

    def weighing(self, weights: Sequence[float]) -> "RunState":
        """Return the state with these weights; a best score by others compares with none."""
        is_same = self.weights is None or list(self.weights) == list(weights)
        best = self.best_score if is_same else None
        return replace(self, weights=list(weights), best_score=best)

    def adapted_kl_coef(self, given: float) -> float | None:
        """Return the coefficient to continue with; None where the config's, ``given``, is new."""
        is_same = self.kl_coef_from is None or self.kl_coef_from == given
        return self.kl_coef if self.iteration and is_same else None


STATE = "state.json"
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
"""Errors of file systems without symbolic links, such as FAT or some network storage."""
GROUPS = ("policy", "critic")
LEAST_KEPT = 2
"""Versions that are kept at least: the newest may prove damaged."""
WRITING = ".writing-"
"""Beginning of the name of a version's folder while it is being written."""


@dataclass(frozen=True, slots=True)
class SavedCommit:
    """A commit read from disk, its digests checked."""

    version: int
    """Adapter version."""
    policy: dict[str, bytes]
    """Files of the policy's folder."""
    critic: dict[str, bytes]
    """Files of the critic's folder; empty if the run has no critic."""
    progress: dict[str, Any]
    """The fields of `RunState`."""
    damaged: tuple[str, ...] = ()
    """Newer versions that were passed over, each with what is wrong with it."""


class Checkpoints:
    """The commits of one run."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        static_files: Mapping[str, Mapping[str, bytes]],
        adapters_every: int = 0,
    ) -> None:
        """
        Args:
            folder: folder of the versions.
            keep: number of newest versions to keep, besides the best one; less than `LEAST_KEPT`
                counts as that.
            static_files: group -> files to add to each version's folder (the tokenizer).
            adapters_every: of this many versions the first saved one keeps its policy's adapter
                when its commit is dropped; 0: none does.
        """
        self._adapters_every = adapters_every
        self._folder = folder
        self._keep = max(keep, LEAST_KEPT)
        self._static_files = static_files
        self._whole: set[int] = set()
        """Versions that this process wrote or read; others may be damaged."""

    def save(
        self,
        version: int,
        groups: Mapping[str, Mapping[str, bytes]],
        progress: Mapping[str, object],
    ) -> None:
        """Write a version, then point ``latest`` at it, then delete old ones.

        The order matters: a process killed between two steps leaves ``latest`` at a whole version.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        temporary = self._folder / f"{WRITING}{version}"
        with self._unwritable_is_an_error(version):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                digests = {}
                for group, files in groups.items():
                    for name, content in {**self._static_files.get(group, {}), **files}.items():
                        _write(temporary / group / name, content)
                        digests[f"{group}/{name}"] = hashlib.sha256(content).hexdigest()
                state = {"version": version, "progress": dict(progress), "sha256": digests}
                _write(temporary / STATE, _json(state))
                target = self._folder / str(version)
                # A version is saved twice only if its first copy is damaged (see `latest`); a
                # folder that is not empty cannot be replaced.
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
                _sync_folder(self._folder)
                self._whole.add(version)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            self._point("latest", version)
        self._drop_old()

    def set_progress(self, version: int, progress: Mapping[str, object]) -> None:
        """Replace the plain values of a saved version; its files stay as they are."""
        path = self._folder / str(version) / STATE
        temporary = path.with_name(f".{STATE}")
        with self._unwritable_is_an_error(version):
            state = json.loads(path.read_text(encoding="utf-8"))
            _write(temporary, _json(state | {"progress": dict(progress)}))
            os.replace(temporary, path)

    def mark_best(self, version: int) -> None:
        """Point ``best`` at a saved version."""
        with self._unwritable_is_an_error(version):
            self._point("best", version)

    def has(self, version: int) -> bool:
        """Return whether a version is saved, and known to be whole."""
        return version in self._whole

    def link(self, version: int, group: str, folder: Path) -> bool:
        """Make a folder of links to a saved group's files; they outlive the version.

        Returns:
            False if the version is not saved, or is just being dropped.
        """
        if not self.has(version):
            return False
        try:
            shutil.copytree(self._folder / str(version) / group, folder, copy_function=_link)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True

    def latest(self) -> SavedCommit | None:
        """Return the newest intact commit, or None if nothing was saved.

        It does not follow the link ``latest``: if that version is damaged, an older one is used.

        Raises:
            CheckpointError: every commit is damaged.
        """
        versions = kept_versions(self._folder, whole=True)
        damage: list[str] = []
        for version in reversed(versions):
            try:
                saved = replace(read_commit(self._folder / str(version)), damaged=tuple(damage))
                self._whole.add(version)
                return saved
            except (*DAMAGE, OSError) as error:
                self._whole.discard(version)
                damage.append(f"{version} ({error})")
        if damage:
            raise CheckpointError(
                f"Every commit in {self._folder} is damaged: {', '.join(damage)}; restore one, or "
                "begin a new run with run.resume=never"
            )
        return None

    @contextmanager
    def _unwritable_is_an_error(self, version: int) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"Cannot write version {version} to {self._folder}: {error.strerror or error}. "
                "Free space or fix the permissions and resume; the earlier commits are intact"
            ) from error

    def _point(self, name: str, version: int) -> None:
        # A link cannot be changed in place; a new one renamed over it is there at every moment.
        temporary = self._folder / f".{name}"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(str(version), target_is_directory=True)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return  # the version is whole, and found without the link
        os.replace(temporary, self._folder / name)

    def _drop_old(self) -> None:
        best = self._folder / "best"
        kept = {str(version) for version in kept_versions(self._folder, whole=True)[-self._keep :]}
        kept |= {os.readlink(best)} if best.is_symlink() else set()
        adapters = self._with_adapter()
        for path in self._folder.iterdir():
            # Also what a kill left: a version that was half written, or half deleted.
            is_ours = path.name.isdigit() or path.name.startswith(WRITING)
            if not is_ours or path.name in kept:
                continue
            if path.name not in adapters:
                shutil.rmtree(path, ignore_errors=True)
            elif (path / STATE).is_file():
                self._whole.discard(int(path.name))
                _keep_adapter(path)

    def _with_adapter(self) -> set[str]:
        """Return the versions that keep their adapter: each the first saved one of its interval.

        Not those at multiples alone: fewer commits are written where the disk is slow.
        """
        firsts = dict[int, str]()
        for version in kept_versions(self._folder) if self._adapters_every else ():
            firsts.setdefault(version // self._adapters_every, str(version))
        return {version for interval, version in firsts.items() if interval}


def read_commit(folder: Path) -> SavedCommit:
    """Read a commit from its folder; damage raises one of `DAMAGE` or OSError."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    groups: dict[str, dict[str, bytes]] = {group: {} for group in GROUPS}
    for name, digest in state["sha256"].items():
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{name} is not what was written")
        group, _, file = name.partition("/")
        groups[group][file] = content
    return SavedCommit(state["version"], groups["policy"], groups["critic"], state["progress"])


def kept_versions(folder: Path, *, whole: bool = False) -> list[int]:
    """Return the versions in a folder of commits, in order.

    Args:
        folder: of the commits.
        whole: leave out those of which the adapter alone is kept.
    """
    held = STATE if whole else "policy"
    names = [path.parent.name for path in folder.glob(f"[0-9]*/{held}")]
    return sorted(int(name) for name in names if name.isdigit())


def _keep_adapter(version: Path) -> None:
    """Leave the policy's adapter alone of a commit; its state goes last, so a kill is made good."""
    shutil.rmtree(version / "critic", ignore_errors=True)
    (version / "policy" / "learner.safetensors").unlink(missing_ok=True)
    (version / STATE).unlink(missing_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _json(state: Mapping[str, object]) -> bytes:
    return json.dumps(state, indent=2).encode()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, *NO_LINKS}:
            raise
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        # Before any rename: a file system may make a rename durable before the file's contents.
        file.flush()
        os.fsync(file.fileno())
