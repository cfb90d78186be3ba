"""The stages of a run: one entry each, in pipeline order.

Whatever depends on the stage asks this table: the command line, the pipeline, resume, lineage,
input checks, the plan and the report.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import field_validator, model_validator

from rlhf_ray.config.section import Section, changeable, duplicates, fixed, is_mapping

StageName = Literal[
    "prepare", "pretrain", "sft", "rank", "reward", "dpo", "ppo", "evaluate", "report"
]
Made = Literal["datasets", "language model", "policy", "preferences", "reward model", "numbers"]


@dataclass(frozen=True)
class Stage:
    """One stage, as the rest of the system sees it."""

    function: str
    """``module:name``; called with the Config, writes ``<stage>/summary.json`` last."""
    does: str
    """One sentence for the command line."""
    makes: Made
    """Kind of result that it leaves in the run's folder."""
    sections: tuple[str, ...] = ()
    """Config sections that it reads; once it has begun, their fixed keys may not change."""
    datasets: tuple[str, ...] = ()
    """Keys under ``data`` that it reads, the one that it learns from first."""
    prepared: str | None = None
    """The set of prepare that it reads where ``data`` names none."""
    after: tuple[str, ...] = ()
    """Stages that its model may have gone through before, in order."""
    needs_ray: bool = True
    """True if it starts processes (on Ray, unless cluster.mode is inline)."""
    is_supervised: bool = False
    """Trained by transformers.Trainer, with a section of `config.supervised`."""
    is_default: bool = True
    """True if it is in the default of ``run.stages``."""

    def load(self) -> Callable[..., object]:
        """Import its function, and with it what only this stage needs."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


_EVERYWHERE = ("run", "model", "template", "data")

STAGES: Mapping[str, Stage] = {
    "prepare": Stage(
        function="rlhf_ray.stages.prepare:run",
        does="Split a Stack Exchange dump into the data sets of the other stages.",
        makes="datasets",
        sections=("run", "prepare"),
        needs_ray=False,
    ),
    "pretrain": Stage(
        function="rlhf_ray.stages.supervised.pretrain:run",
        does="Train a causal language model on packed text.",
        makes="language model",
        sections=(*_EVERYWHERE, "pretrain"),
        datasets=("pretrain",),
        prepared="finetune",
        is_supervised=True,
    ),
    "sft": Stage(
        function="rlhf_ray.stages.supervised.sft:run",
        does="Fine-tune on questions and answers with LoRA, then merge the adapter.",
        makes="policy",
        sections=(*_EVERYWHERE, "sft"),
        datasets=("sft",),
        prepared="finetune",
        after=("pretrain",),
        is_supervised=True,
    ),
    "rank": Stage(
        function="rlhf_ray.stages.rank:run",
        does="Sample pairs of answers of the SFT model, and wait for people to rank them.",
        makes="preferences",
        sections=(*_EVERYWHERE, "sft", "rank"),
        datasets=("prompts", "eval"),
        prepared="rl",
        after=("pretrain", "sft"),
        is_default=False,  # it waits for people
    ),
    "reward": Stage(
        function="rlhf_ray.stages.supervised.reward:run",
        does="Train the reward model on pairs or rated answers.",
        makes="reward model",
        sections=(*_EVERYWHERE, "sft", "reward"),
        datasets=("preferences",),
        prepared="reward",
        after=("pretrain", "sft", "rank"),
        is_supervised=True,
    ),
    "dpo": Stage(
        function="rlhf_ray.stages.supervised.dpo:run",
        does="Train the policy on preference pairs directly, without a reward model.",
        makes="policy",
        sections=(*_EVERYWHERE, "sft", "dpo"),
        datasets=("preferences",),
        prepared="reward",
        after=("pretrain", "sft", "rank"),
        is_supervised=True,
        is_default=False,  # another way from pairs to a policy than reward and ppo
    ),
    "ppo": Stage(
        function="rlhf_ray.stages.ppo.stage:run",
        does="Train the policy with PPO; resume from its last commit.",
        makes="policy",
        sections=(*_EVERYWHERE, "sft", "reward", "rewards", "lora", "critic", "ppo", "rollout"),
        datasets=("prompts", "eval"),
        prepared="rl",
        after=("pretrain", "sft", "rank", "reward"),
    ),
    "evaluate": Stage(
        function="rlhf_ray.stages.evaluate.stage:run",
        does="Compare the run's policies on held-out prompts.",
        makes="numbers",
        datasets=("prompts", "eval"),
    ),
    "report": Stage(
        function="rlhf_ray.report.report:run",
        does="Draw the HTML report of a run again.",
        makes="numbers",
        needs_ray=False,
    ),
}

DEFAULT_STAGES: tuple[StageName, ...] = tuple(
    name for name in get_args(StageName) if STAGES[name].is_default
)
"""Stages of a run that names none."""

SUPERVISED = tuple(name for name, stage in STAGES.items() if stage.is_supervised)
"""Stages that transformers.Trainer runs."""

SAMPLING = ("rank", "ppo", "evaluate")
"""Stages with generators."""

BEFORE_PPO = ("reward", "dpo")
"""Stages beside which PPO's processes start, where it comes next."""

POLICIES = tuple(name for name, stage in STAGES.items() if stage.makes == "policy")
"""Stages that leave a policy, which is called by the stage's name."""


LONGEST_NAME = 100
"""Bytes of run.name, which is part of names of files and of Ray's namespace."""


class RecordConfig(Section):
    """What PPO records of each iteration's samples."""

    samples: int = changeable(
        64,
        unit="–",
        ge=0,
        description="Samples of an iteration whose texts, scores and KL are recorded; at most the "
        "batch.",
    )
    tokens: int = changeable(
        16,
        unit="–",
        ge=0,
        description="Samples among them with values of each token: advantage, KL and log-prob "
        "mismatch.",
    )


class RunConfig(Section):
    """Name, folder, seed and stages of a run."""

    name: str = changeable("run", min_length=1, description="Name of the run.")
    dir: str = changeable("", description="Folder of the run; default runs/<run.name>.")
    scratch: str | None = changeable(
        None,
        min_length=1,
        description="Local folder for large temporary files, which lie in a folder of the run's "
        "own in it and are deleted when the run is done; on a cluster each node has its own. None: "
        "what a resumed run reads again is in run.dir/scratch, and the rest in TMPDIR.",
    )
    seed: int = fixed(
        0, unit="–", ge=0, le=2**32 - 1, description="Seed that every random state derives from."
    )
    stages: list[StageName] = changeable(
        list(DEFAULT_STAGES),
        min_length=1,
        description="Stages to run, in pipeline order; default all but rank and dpo.",
    )
    resume: Literal["auto", "never", "must"] = changeable(
        "auto",
        description="auto: resume the folder's run if there is one; never: move an old run aside "
        "and start a new one; must: fail if there is no run to resume.",
    )
    callbacks: list[str] = changeable(
        [],
        description="Classes of yours, as module:Class or file.py:Class, whose objects are called "
        "with the run's events in the driver (docs/watching.md).",
    )
    full_disk_wait_s: float = changeable(
        3600.0,
        unit="s",
        ge=0,
        description="Longest time for which PPO waits where run.dir is full or does not answer.",
    )

    keep_batches: Literal["none", "warned", "last", "all"] = changeable(
        "last",
        description="Batches that PPO keeps in ppo/batches, each with the commit before it, for "
        "rlhf-ray replay. warned: the newest five that a guard warned of; last: the last one, and "
        "those; all: every one.",
    )
    record: RecordConfig = fixed(
        RecordConfig(), description="How many samples of an iteration PPO records."
    )

    @field_validator("callbacks")
    @classmethod
    def _are_named(cls, specs: list[str]) -> list[str]:
        for spec in specs:
            if not all(spec.rpartition(":")):
                raise ValueError(f"{spec!r} must have the form module:Class or file.py:Class")
        if repeated := duplicates(specs):
            raise ValueError(f"names {repeated} more than once")
        return specs

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, values: object) -> object:
        if is_mapping(values) and not values.get("dir"):
            return {**values, "dir": f"runs/{values.get('name', 'run')}"}
        return values

    @field_validator("dir")
    @classmethod
    def _is_printable(cls, folder: str) -> str:
        if not folder.strip() or not folder.isprintable():
            raise ValueError("is blank or holds a control character")
        return folder

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if (
            not name.strip()
            or not name.isprintable()
            or "/" in name
            or "\\" in name
            or name in (".", "..")
        ):
            raise ValueError(
                "must be the name of a folder: no slashes, no control characters, not . or .."
            )
        # A rehearsal adds its suffix to the run's name.
        if len(name.removesuffix("-rehearsal").encode()) > LONGEST_NAME:
            raise ValueError(f"has more than {LONGEST_NAME} bytes")
        return name

    @model_validator(mode="after")
    def _stages_once(self) -> "RunConfig":
        if repeated := duplicates([*self.stages]):
            raise ValueError(f"run.stages names {repeated} more than once")
        return self
