"""Steps 2 and 4: every role on this device, quantised and not; DeepSpeed in bf16 and PyTorch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.critic_learner import CriticLearner
from actors.learner import EngineKind
from actors.likelihood import Likelihood
from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from gpu_checks.lines import Line, Place, checked
from gpu_checks.models import MAX_LENGTH, reward_model, small
from rlhf_ray.config import Config, resolve
from rlhf_ray.engines.scoring import SequenceScorer
from rlhf_ray.types import Prompt, Rollout

LEARNERS = {"policy": PolicyLearner, "critic": CriticLearner}
NUM_ROLLOUTS = 8
SAME_NORM, SAME_UPDATE = 0.05, 0.98
"""Allowed relative difference of gradient norms in bf16; least cosine between weight updates."""


def placed(place: Place, role: str, quantization: str) -> Iterator[Line]:
    """Make roles as a run makes them, and look where their weights are."""
    base = small(place)
    config = _config(base, dtype="bfloat16", quantization=quantization)
    rollouts = _rollouts()
    if role == "frozen":
        for kind in (Reference, Likelihood):
            worker = kind(kind.__name__.lower(), config, base)
            model = worker._model if isinstance(worker, Reference) else worker._slot.model
            worker.logprobs(rollouts) if isinstance(worker, Reference) else worker.loss(rollouts)
            yield _where(place, kind.__name__, model)
        scorer = SequenceScorer(reward_model(place, base), config)
        scorer([rollout.sequence_ids for rollout in rollouts])
        yield _where(place, "reward model", scorer._model)
        return
    learner = _started(role, config, base, "deepspeed")
    _learn(learner, rollouts)
    yield _where(place, f"{role} learner", learner._engine.module)


def _where(place: Place, name: str, model: nn.Module) -> Line:
    """Check that all weights are where this process computes."""
    wanted = "cuda" if place.has_gpu else "cpu"
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.type for tensor in tensors})
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    peak = torch.cuda.max_memory_allocated() / 1e6 if place.has_gpu else None
    return checked(
        f"{name} on {wanted} computes",
        devices == [wanted],
        devices=" ".join(devices),
        dtypes=" ".join(dtypes),
        weights_mb=sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        peak_mb=peak,
    )


def learnt(place: Place, role: str, zero_stage: int) -> Iterator[Line]:
    """Learn the same batch with DeepSpeed and with plain PyTorch, both in bf16."""
    base = small(place)
    config = _config(base, dtype="bfloat16", zero_stage=zero_stage)
    rollouts, norms, updates, dtypes = _rollouts(), {}, {}, {}
    for engine in ("deepspeed", "torch"):
        learner = _started(role, config, base, engine)
        before = learner._engine.export_state()
        norms[engine] = _learn(learner, rollouts).metrics[learner.grad_norm_name]
        after = learner._engine.export_state()
        updates[engine] = torch.cat(
            [(after[name] - before[name]).flatten() for name in after if name.startswith("weight/")]
        )
        head = [p for n, p in learner._engine.module.named_parameters() if "score" in n]
        dtypes[engine] = str(head[0].dtype).removeprefix("torch.") if head else ""
    ours, theirs = updates.values()
    cosine = float(nn.functional.cosine_similarity(ours, theirs, dim=0))
    norm = abs(norms["deepspeed"] / norms["torch"] - 1)
    yield checked(
        f"{role} learns in DeepSpeed as in PyTorch, bf16, ZeRO {zero_stage}",
        norm < SAME_NORM and cosine > SAME_UPDATE,
        grad_norm=norms["deepspeed"],
        grad_norm_torch=norms["torch"],
        update_cosine=cosine,
        largest_difference=float((ours - theirs).abs().max()),
        largest_update=float(theirs.abs().max()),
    )
    if role == "critic":
        yield checked(
            f"the value head stays in float32, ZeRO {zero_stage}",
            set(dtypes.values()) == {"float32"},
            **dtypes,
        )


def _config(base: str, dtype: str, quantization: str = "none", zero_stage: int = 2) -> Config:
    return resolve(
        {
            "cluster": {"mode": "inline"},
            "model": {
                "path": base,
                "dtype": dtype,
                "quantization": quantization,
                "max_length": MAX_LENGTH,
            },
            "policy": {"zero_stage": zero_stage},
            "critic": {"zero_stage": zero_stage, "learning_rate": 1e-3},
            "rollout": {"engine": "transformers", "max_prompt_tokens": 64, "max_tokens": 64},
            "ppo": {
                "batch_size": NUM_ROLLOUTS,
                "mini_batch_size": NUM_ROLLOUTS,
                "epochs": 1,
                "learning_rate": 1e-3,
                "max_grad_norm": 1e9,
            },
        }
    )


def _started(role: str, config: Config, base: str, engine: EngineKind) -> Any:
    learner = LEARNERS[role](f"{role}-0", config, base, engine)
    learner.start(0, 1, "127.0.0.1", learner.free_port())
    return learner


def _learn(learner: Any, rollouts: Sequence[Rollout]) -> Any:
    """Learn one batch, with made-up scores and values."""
    noise = np.random.default_rng(1)

    def drawn(mean: float) -> list[np.ndarray]:
        return [noise.normal(mean, 0.1, len(r.response_ids)).astype(np.float32) for r in rollouts]

    # The policy's own, so that its ratios begin at 1.
    old = learner.logprobs(rollouts)[0] if isinstance(learner, PolicyLearner) else drawn(-6.0)
    scores = [tuple(float(rollout.position % 3) for rollout in rollouts)]
    learner.assemble(0.1, scores, list(rollouts), old, drawn(-6.0), drawn(0.0))
    return learner.learn(0.0, 1.0)


def _rollouts() -> list[Rollout]:
    noise = np.random.default_rng(0)
    return [
        Rollout(
            position=position,
            prompt=Prompt(str(position), "", tuple(noise.integers(3, 250, 32).tolist())),
            response_ids=noise.integers(3, 250, 24 + position),
            rollout_logprobs=np.full(24 + position, -6.0, np.float32),
            finish_reason="length",
            version=0,
            text="",
        )
        for position in range(NUM_ROLLOUTS)
    ]
