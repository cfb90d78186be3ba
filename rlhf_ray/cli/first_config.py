"""The config that ``rlhf-ray init`` writes from a model, data and GPUs, and that plan has checked.

Each key is written with the reason for its value; keys that are not written keep their defaults.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from rlhf_ray.cli.answers import NO_GPUS, Answers, is_function, preset_of
from rlhf_ray.config import Config, load
from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.hardware import GPU_KINDS
from rlhf_ray.planning.layout_options import Change
from rlhf_ray.planning.plan import plan_for
from rlhf_ray.planning.prediction import Plan
from rlhf_ray.planning.shapes import models_of
from rlhf_ray.planning.throughput import middle
from rlhf_ray.secrecy import printable

_FIRST = ("run", "model", "data")
"""Sections that come first in the file."""
BATCH = 32
"""Rows of a step of the supervised stages on GPUs."""
LARGE = 3e9
"""Parameters from which a model takes the smaller learning rates and the larger adapters."""


@dataclass(frozen=True)
class Draft:
    """A config as the keys that are written."""

    about: str
    """First line of the file."""
    base: str | None
    """Shipped config that it extends."""
    keys: dict[str, object]
    """Dotted key -> value."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Dotted key -> why it has this value."""

    def config(self) -> Config:
        """Return it validated.

        Raises:
            ConfigError: keys do not go together.
        """
        overrides = [f"{key}={json.dumps(value)}" for key, value in self.keys.items()]
        return load(self.base and f"@{self.base}", overrides)

    def text(self) -> str:
        """Return it as YAML with comments."""
        lines = [f"# {self.about}"]
        if self.base:
            lines.append(f'extends: "@{self.base}" # has what is not said here')
        first = {name: number for number, name in enumerate(_FIRST)}
        keys = sorted(self.keys, key=lambda key: first.get(key.partition(".")[0], len(first)))
        return "\n".join([*lines, *self._lines("", keys, "")]) + "\n"

    def _lines(self, section: str, keys: Sequence[str], indent: str) -> Iterator[str]:
        """Yield the lines of the keys within a section, whose dotted name ends in a dot."""
        for name in dict.fromkeys(key.removeprefix(section).partition(".")[0] for key in keys):
            key = section + name
            if key not in self.keys:
                yield f"{indent}{name}:"
                inner = [each for each in keys if each.startswith(f"{key}.")]
                yield from self._lines(f"{key}.", inner, f"{indent}  ")
                continue
            value = yaml.safe_dump(self.keys[key], default_flow_style=True, width=10_000)
            reason = f" # {self.reasons[key]}" if key in self.reasons else ""
            yield f"{indent}{name}: {value.removesuffix('...' + chr(10)).strip()}{reason}"

    def changed(self, change: Change, reason: str) -> "Draft":
        """Return it with more keys, each for the same reason."""
        return replace(
            self,
            keys={**self.keys, **change},
            reasons={**self.reasons, **dict.fromkeys(change, reason)},
        )


def compose(answers: Answers, name: str) -> Draft:
    """Return the config for what was answered, before its layout is fitted to the GPUs.

    Raises:
        ConfigError: the GPUs are of no known kind.
    """
    where = "the CPUs of this machine" if answers.gpus == NO_GPUS else answers.gpus
    about = f"{answers.model or 'The tiny model'} on {where}; written by rlhf-ray init."
    preset = answers.model and preset_of(answers.model)
    stages = _stages(answers)
    draft = Draft(
        printable(about), None, {"run.name": name, "run.stages": stages}, dict(_STAGE_REASONS)
    )
    if answers.model is None:
        draft = replace(draft, base="quickstart")
    elif preset and answers.nodes:
        return replace(draft, base=preset, keys={**draft.keys, **_data(answers)})
    else:
        draft = _of_model(draft, answers.model, preset or None, answers)
    if answers.model is None and answers.datasets:
        draft = draft.changed(_LONGER, "the quick start's questions are shorter than most texts")
    used = _used(draft.keys, stages)
    return replace(draft, keys={**used, **_data(answers)})


def _used(keys: Mapping[str, object], stages: Sequence[str]) -> dict[str, object]:
    """Leave out the keys of sections that no stage of the run reads."""
    readers = {"sft": "sft", "reward": "reward", "policy": "ppo", "critic": "ppo"}
    unused = {section for section, stage in readers.items() if stage not in stages}
    return {key: value for key, value in keys.items() if key.partition(".")[0] not in unused}


_STAGE_REASONS = {
    "data.overlong": "a prompt keeps its end, an answer its beginning",
    "sft.preferred_only": "that is for Stack Exchange's answers",
    "reward.path": "a finished reward model, so that none is trained",
    "data.prompts": "what PPO's policy answers; a tenth is held out for evaluate",
    "data.preferences": "pairs of answers, of which the reward model learns",
    "data.sft": "answers to learn before PPO",
}
_LONGER: Change = {
    "model.max_length": 256,
    "rollout.max_prompt_tokens": 128,
    "rollout.max_tokens": 64,
}


def _stages(answers: Answers) -> list[str]:
    """Return the stages of the run: those for which there is data."""
    tiny, synthetic = answers.model is None, not answers.datasets
    pairs = synthetic or bool(answers.of_kind("preferences"))
    learnt = synthetic or bool(answers.of_kind("demonstrations", "preferences"))
    samples = pairs or bool(answers.reward)
    chosen = {
        "prepare": synthetic,
        "pretrain": tiny,
        "sft": learnt,
        "reward": pairs and not answers.reward,
        "ppo": samples,
        "evaluate": samples,
        "report": True,
    }
    return [stage for stage, is_chosen in chosen.items() if is_chosen]


def _data(answers: Answers) -> dict[str, object]:
    """Return the keys of the datasets and the reward."""
    keys: dict[str, object] = {}
    demonstrations = answers.of_kind("demonstrations", "preferences")
    sections = {
        "pretrain": (demonstrations or answers.of_kind("prompts")) if answers.model is None else [],
        "sft": demonstrations,
        "preferences": [] if answers.reward else answers.of_kind("preferences"),
        "prompts": answers.of_kind("prompts", "preferences", "demonstrations"),
    }
    for section, paths in sections.items():
        sources = [{"path": _absolute(path)} for path in paths]
        if sources:
            keys[f"data.{section}"] = sources[0] if len(sources) == 1 else sources
    if answers.datasets:
        keys["data.overlong"] = "truncate"
    if demonstrations:
        keys["sft.preferred_only"] = False
    if answers.reward is None:
        return keys
    if is_function(answers.reward):
        file, _, function = answers.reward.rpartition(":")
        return {
            **keys,
            "rewards": [{"type": "function", "function": f"{_absolute(file)}:{function}"}],
        }
    return {**keys, "reward.path": _absolute(answers.reward)}


def _absolute(path: str) -> str:
    """Return a path from anywhere; what is not here is a name on the hub or a module."""
    here = Path(path).expanduser()
    return str(here.resolve()) if here.exists() else path


def _of_model(draft: Draft, model: str, preset: str | None, answers: Answers) -> Draft:
    """Return a config of its own for a model: on CPUs to try it, on GPUs to train it."""
    described = None if preset is None else load(f"@{preset}").model.shape
    shape = {} if described is None else {"model.shape": described.model_dump(exclude_none=True)}
    keys: dict[str, object] = {"model.path": _absolute(model), **shape}
    base = models_of(load(None, [f"{key}={json.dumps(value)}" for key, value in keys.items()])).base
    folder = Path(base.folder or ".")
    kinds = [GPU_KINDS[node.gpu_kind or ""] for node in answers.nodes]
    if kinds and all(kind.has_bf16 for kind in kinds):
        keys["model.dtype"] = "bfloat16"
    longest = 1024 if kinds else 256
    with suppress(OSError, ValueError, TypeError, KeyError):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        longest = min(longest, int(config["max_position_embeddings"]))
    keys |= {
        "model.max_length": longest,
        "rollout.max_prompt_tokens": longest // 2,
        "rollout.max_tokens": longest // 2,
        "sft.block_size": longest,
    }
    if _has_chat_template(folder):
        keys["template.kind"] = "chat"
    keys |= _training(base.shape.size.parameters > LARGE) | _amounts(bool(kinds))
    if kinds:
        keys |= _on_gpus(_num_gpus(answers))
    return replace(draft, keys={**draft.keys, **keys}, reasons={**draft.reasons, **_REASONS})


def _training(is_large: bool) -> dict[str, object]:
    """Return the keys that depend on the size of the model alone."""
    return {
        "sft.learning_rate": 1e-4 if is_large else 2e-4,
        "reward.learning_rate": 1e-4 if is_large else 2e-4,
        "ppo.learning_rate": 5e-6 if is_large else 2e-5,
        "critic.learning_rate": 1e-5 if is_large else 2e-5,
        "ppo.kl_coef": 0.05,
        "ppo.kl_target": 8.0,
        "lora.r": 32 if is_large else 16,
        "lora.alpha": 64.0 if is_large else 32.0,
        "lora.dropout": 0.0,
    }


def _amounts(on_gpus: bool) -> dict[str, object]:
    """Return steps and batches: few where CPUs compute."""
    stage = {
        "steps": 500 if on_gpus else 20,
        "batch_size": BATCH if on_gpus else 8,
        "warmup_steps": 20 if on_gpus else 2,
    }
    return {
        **{f"{name}.{key}": value for name in ("sft", "reward") for key, value in stage.items()},
        "ppo.iterations": 200 if on_gpus else 10,
        "ppo.batch_size": 128 if on_gpus else 16,
        "ppo.mini_batch_size": 32 if on_gpus else 16,
        "ppo.epochs": 2,
        "ppo.max_tokens_per_micro_batch": 4096,
    }


def _on_gpus(num_gpus: int) -> dict[str, object]:
    """Return how stages use GPUs: the supervised ones all that divide a batch, PPO as it fits."""
    workers = max(n for n in range(1, BATCH + 1) if BATCH % n == 0 and n <= num_gpus)
    keys: dict[str, object] = {}
    for name in ("sft", "reward"):
        keys |= {
            f"{name}.train_workers": workers,
            f"{name}.gradient_checkpointing": True,
            f"{name}.trainer.gradient_accumulation_steps": max(1, BATCH // workers // 4),
        }
    return {**keys, "policy.gradient_checkpointing": True, "critic.gradient_checkpointing": True}


_REASONS = {
    "model.shape": "for rlhf-ray plan, which downloads nothing",
    "model.dtype": "half of float32's memory; adapters are float32",
    "template.kind": "the model's tokenizer has a chat template",
    "sft.learning_rate": "an adapter takes ten times that of full fine-tuning",
    "reward.steps": "more passes over the pairs learn them by heart",
    "lora.dropout": "off in PPO anyway",
    "ppo.kl_target": "nats a response, from the SFT model",
    "ppo.iterations": "few to try it; the reward's curve says when to stop",
    "ppo.max_tokens_per_micro_batch": "a pass of the learners; less takes less memory",
    "critic.learning_rate": "its head starts from nothing",
}


def _num_gpus(answers: Answers) -> int:
    return sum(node.gpus for node in answers.nodes)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    with suppress(OSError, ValueError, TypeError):
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return False


def fitted(draft: Draft, answers: Answers) -> tuple[Draft, Plan]:
    """Return the config with the layout that fits the GPUs best, and its plan.

    On several GPUs the fastest layout that learns the same is taken, else what makes it fit.

    Raises:
        PlacementError: it does not fit; says what is short and what would help.
    """
    cluster = answers.gpus if answers.nodes else None
    plan, changes, layouts = plan_for(
        draft.config(), cluster, () if _num_gpus(answers) > 1 else None
    )
    same = [layout for layout in layouts or () if layout.learns_the_same]
    if same:
        best = min(same, key=lambda layout: middle(layout.days))
        if best.changes:
            draft = draft.changed(best.changes, "layout by plan --optimize")
    elif not plan.fits and changes:
        draft = draft.changed(changes[0], "so that it fits")
    else:
        _require_fitting(plan, answers)
        return draft, plan
    plan, _, _ = plan_for(draft.config(), cluster)
    _require_fitting(plan, answers)
    return draft, plan


def _require_fitting(plan: Plan, answers: Answers) -> None:
    if plan.fits:
        return
    reasons = "; ".join(shortage.reason for shortage in plan.shortages)
    raise PlacementError(
        f"{answers.model or 'The tiny model'} does not fit on {answers.gpus} ({reasons}); name "
        "more or larger GPUs, or a smaller model"
    )
