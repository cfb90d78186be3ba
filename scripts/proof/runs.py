"""The runs of the proof: what each is, and its doing, in a process of its own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_from_disk
from proof.faults import FAULTS
from transformers import AutoModelForSequenceClassification

import rlhf_ray
from rlhf_ray.config import Config, load
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.loading import load_tokenizer, save_model

CONFIG = Path(__file__).parents[2] / "configs" / "ci" / "prove_recipe.yaml"
REWARDS = Path(__file__).with_name("rewards.py")
RAY_ITERATIONS = 10
CAUGHT = "caught"
"""Suffix of the runs whose fault must be caught, and the file that says how it was."""
KIND = ("hope this helps", "thank you", "good luck")
RUDE = ("lazy", "fool", "should just know")

EXPERIMENTS: Mapping[str, Sequence[str]] = {
    "beta_0.2": (),
    "beta_0.02": ("ppo.kl_coef=0.02", "ppo.kl_target=null"),
    "beta_0": ("ppo.kl_coef=0",),
    "rloo": ("ppo.advantage=rloo", "ppo.samples_per_prompt=4", "ppo.iterations=40"),
    "grpo": ("ppo.advantage=grpo", "ppo.samples_per_prompt=4", "ppo.iterations=40"),
    "staleness_1": ("ppo.max_staleness=1", "ppo.importance_cap=2"),
    "staleness_2": ("ppo.max_staleness=2", "ppo.importance_cap=2"),
    "token_count": (
        f"rewards=[{{type: function, function: '{REWARDS}:count_word'}}]",
        "ppo.iterations=40",
    ),
    "sentiment": (
        "rewards=[{type: classifier, path: SEED/sentiment, reads: response}]",
        "ppo.iterations=40",
    ),
    "pads_as_actions": ("rollout.max_gap=1e9", "ppo.iterations=30"),
    "eos_suppressed": ("rollout.max_gap=1e9", "ppo.iterations=30"),
}
"""Name -> what differs from the config. Those of `FAULTS` run twice: as they are, to be caught, and
with the bound that catches them lifted, to see the damage."""

SAME_CURVE: Mapping[str, Sequence[str]] = {
    "policy_base": ("reference.kind=policy_base", "ppo.iterations=30"),
    "ray": ("cluster.mode=local", "cluster.dashboard=false", f"ppo.iterations={RAY_ITERATIONS}"),
}
"""Other ways to compute what `beta_0.2` does, on the first seed: the reference as the policy with
its adapter off, and every role as a Ray actor."""


@dataclass(frozen=True)
class Job:
    """One PPO run."""

    name: str
    """A key of `EXPERIMENTS` or `SAME_CURVE`, or that of a fault to be caught."""
    seed: int
    base: Path
    """Run of the same seed with the stages up to the reward model."""
    overrides: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.base / self.name

    @property
    def config(self) -> Config:
        """PPO alone, from the models and sets of ``base``."""
        prepared = self.base / "base" / "prepare"
        common = (
            f"run.dir={self.folder}",
            f"run.seed={self.seed}",
            "run.stages=[ppo]",
            f"sft.path={self.base}/base/sft/model",
            f"reward.path={self.base}/base/reward/model",
            f"data.prompts.path={prepared}/rl",
            f"data.eval.path={prepared}/evaluation",
        )
        own = [override.replace("SEED", str(self.base)) for override in self.overrides]
        return load(CONFIG, [*common, *own])


def jobs_of(out: Path, seeds: Sequence[int]) -> list[Job]:
    """Return every run of the proof, in folders under ``out``."""
    jobs = [
        Job(name, seed, out / f"seed{seed}", overrides)
        for name, overrides in EXPERIMENTS.items()
        for seed in seeds
    ]
    caught = [
        Job(f"{name}{CAUGHT}", seed, out / f"seed{seed}", ()) for name in FAULTS for seed in seeds
    ]
    first = out / f"seed{seeds[0]}"
    same = [Job(name, seeds[0], first, overrides) for name, overrides in SAME_CURVE.items()]
    return jobs + caught + same


@contextmanager
def _told_to(log: Path) -> Iterator[None]:
    """Output of this process goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def prepare(folder: Path, seed: int) -> None:
    """Everything up to the reward model, and a classifier of kindness."""
    torch.set_num_threads(1)
    with _told_to(folder / "base.log"):
        stages = "run.stages=[prepare,pretrain,sft,reward]"
        config = load(CONFIG, [f"run.dir={folder}/base", f"run.seed={seed}", stages])
        rlhf_ray.run(config)
        if not (folder / "sentiment").is_dir():
            _train_classifier(folder / "base", folder / "sentiment")


def _train_classifier(run: Path, out: Path) -> None:
    """A text classifier that separates kind answers of the site from rude ones."""
    base, rows = run / "pretrain" / "model", load_from_disk(str(run / "prepare" / "finetune"))
    labelled = [(text, _is_kind(text)) for text in rows["completion"][:1000]]
    texts, kind = zip(*((text, kind) for text, kind in labelled if kind is not None), strict=True)
    tokenizer = load_tokenizer(str(base))
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    ids = {name: number for number, name in names.items()}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, id2label=names, label2id=ids
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, len(texts), 32):
        part = slice(start, start + 32)
        batch = tokenizer(list(texts[part]), padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        model(**batch, labels=torch.tensor(kind[part])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, out)


def _is_kind(text: str) -> int | None:
    """Return 1 for kind words, 0 for rude ones, None for neither or both."""
    kind, rude = (any(mark in text.lower() for mark in marks) for marks in (KIND, RUDE))
    return int(kind) if kind != rude else None


def train(job: Job) -> None:
    """Run PPO to its end, or to where a fault is caught."""
    if (job.folder / CAUGHT).is_file() or (job.folder / "ppo" / "summary.json").is_file():
        return
    torch.set_num_threads(1)
    with _told_to(job.folder / "log.txt"):
        if fault := FAULTS.get(job.name.removesuffix(CAUGHT)):
            fault()
        try:
            rlhf_ray.run(job.config)
        except WeightSyncError as error:
            (job.folder / CAUGHT).write_text(str(error), encoding="utf-8")
