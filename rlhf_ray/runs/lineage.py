"""The lineage of a model: its base, the stages it went through, their data and licences."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config.identity import is_read
from rlhf_ray.config.section import masked
from rlhf_ray.config.stages import STAGES
from rlhf_ray.config.yaml_values import parsed
from rlhf_ray.disk import DAMAGE
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models.folders import cached_file
from rlhf_ray.runs.folder import ORIGIN, RunFolder

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Source:
    """A data set or model from outside the run."""

    name: str
    licence: str


@dataclass(frozen=True)
class Step:
    """One stage that a model went through."""

    stage: str
    result: str
    """The model that it wrote, or the external one that replaces it."""
    external: bool
    """Made outside this run, so nothing is known of its training."""
    data: tuple[Source, ...]
    numbers: Mapping[str, float | str]
    """Numbers and texts of its summary."""


@dataclass(frozen=True)
class Retuned:
    """A config key that was changed when the run was resumed."""

    key: str
    before: object
    now: object
    after: Mapping[str, int]
    """The last iteration or optimizer step, by stage, that was done without the change."""


@dataclass(frozen=True)
class Origin:
    """The commit of another run from which a branch started, as branch.json holds it."""

    run: str
    """Name of the other run."""
    folder: str
    """Its folder, absolute, when the branch was made."""
    version: int
    iteration: int


def origin_of(folder: Path) -> Origin | None:
    """Return what the run in a folder was branched from; None: it began by itself.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    path = folder / ORIGIN
    try:
        return Origin(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (*DAMAGE, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore or remove it") from error


@dataclass(frozen=True)
class Lineage:
    """The lineage of a model."""

    base: Source
    """What the first stage started from."""
    steps: tuple[Step, ...]
    settings: Mapping[str, object]
    """Config values that differ from the defaults, of the sections that the steps read, without
    secrets."""
    changes: tuple[Retuned, ...] = ()
    """What was changed on resume of the keys that the steps read, without secrets."""
    origin: Origin | None = None
    """The commit that a branch started from."""


def lineage(config: Config, model: str, version: str | None = None) -> Lineage:
    """Return the lineage of one of a run's models."""
    folder = RunFolder(config)
    stages = [
        stage
        for stage in (*STAGES[model].after, model)
        if not (stage == "reward" and model == "ppo" and not config.needs_reward_model)
        # A model given by path did not go through this run's earlier stages.
        and not (stage == "pretrain" and config.sft.path)
    ]
    summaries = {stage: folder.summary(stage) for stage in stages}
    if version is not None:
        summaries["ppo"] = {**(summaries["ppo"] or {}), "version": version}
    steps = [
        step
        for stage, summary in summaries.items()
        if (step := _step(config, folder, stage, summary)) is not None
    ]
    if model == "ppo":
        steps += _reward_sources(config)
    base = config.sft.path or config.model.path
    start = Source(base, model_licence(base)) if base else Source("a small random Llama", "none")
    changes = tuple(_changes(folder, [step.stage for step in steps if not step.external]))
    origin = origin_of(folder.path) if model == "ppo" else None
    return Lineage(start, tuple(steps), _settings(config, stages), changes, origin)


def model_licence(path: str) -> str:
    """Return the licence in the front matter of a model's card; "unknown" if there is none."""
    card = Path(path) / "README.md"
    if not card.is_file() and not Path(path).is_dir():
        cached = cached_file(path, "README.md")
        card = Path(cached) if cached else card
    if not card.is_file():
        return UNKNOWN
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return UNKNOWN
    try:
        front = parsed(parts[1], card.name)
    except ConfigError:  # whatever a stranger wrote there
        return UNKNOWN
    return str(front.get("license", UNKNOWN)) if isinstance(front, dict) else UNKNOWN


def _step(
    config: Config, folder: RunFolder, stage: str, summary: Mapping[str, object] | None
) -> Step | None:
    if given := config.external_model(stage):
        return Step(stage, given, True, (), {})
    if summary is None:
        return None
    numbers = {
        name: value
        for name, value in summary.items()
        if isinstance(value, int | float | str) and not name.startswith("seconds")
    }
    return Step(stage, str(folder.path / stage), False, _data(config, folder, stage), numbers)


def _reward_sources(config: Config) -> list[Step]:
    """Return the reward sources other than the run's own reward model."""
    steps = []
    for source in config.rewards:
        if source.type == "model" and source.path is None:
            continue
        values = masked(source.model_dump())
        origins = [values[key] for key in ("path", "function", "model", "url") if key in values]
        result = " ".join([source.type, *map(str, origins[:1])])
        steps.append(Step(f"rewards: {source.name}", result, True, (), {}))
    return steps


def _data(config: Config, folder: RunFolder, stage: str) -> tuple[Source, ...]:
    user_data = getattr(config.data, STAGES[stage].datasets[0])
    if user_data is not None:
        return tuple(
            Source(masked(source.label), source.licence or UNKNOWN) for source in user_data
        )
    part = STAGES[stage].prepared
    prepared = folder.summary("prepare") or {}
    if prepared.get("synthetic"):
        return (Source(f"synthetic Stack Exchange site, part {part}", "none (generated)"),)
    dumps = ", ".join(config.prepare.dumps) or folder.path / "prepare"
    dump = f"Stack Exchange dump {dumps}, part {part}"
    return (Source(dump, "CC BY-SA, of each post's author"),)


def _changes(folder: RunFolder, stages: Sequence[str]) -> Iterator[Retuned]:
    for record in folder.changes():
        after = {s: last for s, last in record.get("after", {}).items() if s in stages}
        for key, change in record.get("changes", {}).items():
            if is_read(key, stages):
                name = key.rpartition(".")[2]
                before, now = (masked(change[which], name) for which in ("before", "now"))
                yield Retuned(key, before, now, after)


def _settings(config: Config, stages: Sequence[str]) -> dict[str, object]:
    sections = {section for stage in stages for section in STAGES[stage].sections}
    changed = config.model_dump(
        mode="json", exclude_defaults=True, include=sections - {"run", "data"}
    )
    return {"run": {"seed": config.run.seed}, **masked(changed)}
