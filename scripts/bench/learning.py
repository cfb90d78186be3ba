"""Rows of the learners: how much padding they compute, and what they add to a bare loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.learner import EngineKind
from actors.policy_learner import PolicyLearner
from bench import models
from bench.figures import ROUNDS, Figure, in_turn, of_rounds
from bench.running import Place
from rlhf_ray.config import Config, resolve
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.loading import load_causal_lm, on_device
from rlhf_ray.types import Prompt, Rollout

EPOCHS = 2
TINY = models.Size(64, 2, 128, 2)
BATCHES = 20
"""Batches whose padding is counted."""


@dataclass
class Counted:
    """Tokens that enter a model."""

    num: int = 0

    def watch(self, model: torch.nn.Module) -> None:
        """Count from now on: ids that are looked up, padding included."""
        model.get_input_embeddings().register_forward_hook(self._count)  # type: ignore[operator]

    def _count(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.num += inputs[0].numel()

    def taken(self) -> int:
        """Return the count since the last call."""
        taken, self.num = self.num, 0
        return taken


def real_tokens(place: Place) -> list[Figure]:
    """Count what a learner processes of skewed batches."""
    base = models.write(place.folder / "model", TINY)
    learner = _started(_config(TINY), base)
    batches = 5 if place.quick else BATCHES
    place.begin(batches + 1)
    counted, shares, scored = Counted(), list[float](), list[float]()
    learner.logprobs(_rollouts([4], 0))  # the model compares its log-probs with its logits once
    counted.watch(learner._engine.module)
    place.step()
    for seed in range(batches):
        lengths = models.skewed_lengths(models.NUM_PROMPTS, place.seed + seed)
        real = sum(lengths) + len(lengths) * models.PROMPT_TOKENS
        batch = Batch(learner, lengths, seed)
        scored.append(real / counted.taken())
        batch.learn()
        shares.append(EPOCHS * real / counted.taken())
        place.step()
    return [of_rounds(shares), of_rounds(scored)]


def learner(place: Place) -> list[Figure]:
    """Time a policy learner's epochs, and a bare loop's over the same tokens, for both engines."""
    size = models.LARGE if place.gpu else models.SMALL
    base = models.write(place.folder / "model", size)
    config = _config(size)
    lengths = models.equal_lengths(models.NUM_PROMPTS, 256 if place.gpu else 64)
    tokens = EPOCHS * (sum(lengths) + len(lengths) * models.PROMPT_TOKENS)
    bare = BareLoop(config, base, _rollouts(lengths, place.seed))
    place.begin(2 * (ROUNDS + 1))
    figures = list[Figure]()
    engines: tuple[EngineKind, ...] = ("deepspeed", "torch")
    for engine in engines:
        batch = Batch(_started(config, base, engine), lengths, place.seed)
        pair = in_turn(_timed(batch.learn), _timed(bare.learn), step=place.step)
        rate = tokens / float(np.median(pair.ours))
        figures.append(pair.speed(tokens_per_s=rate, threads=torch.get_num_threads()))
    return figures


def _timed(call: Any) -> Any:
    """Return the call, followed by a wait for the GPU where there is one."""

    def whole() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return whole


def _config(size: models.Size) -> Config:
    return resolve(
        {
            "cluster": {"mode": "inline"},
            "model": {"dtype": size.name, "max_length": 512},
            "lora": {"r": models.LORA_RANK},
            "rollout": {"engine": "transformers", "max_tokens": models.MAX_LENGTH},
            "ppo": {"epochs": EPOCHS, "batch_size": models.NUM_PROMPTS, "advantage": "reinforce"},
        }
    )


def _started(config: Config, base: str, engine: EngineKind = "torch") -> PolicyLearner:
    started = PolicyLearner("policy-0", config, base, engine)
    started.start(0, 1, "127.0.0.1", started.free_port())
    return started


def _rollouts(lengths: Sequence[int], seed: int) -> list[Rollout]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, 200, models.PROMPT_TOKENS + length) for length in lengths]
    return [
        Rollout(
            position=position,
            prompt=Prompt(str(position), "", tuple(map(int, row[: models.PROMPT_TOKENS]))),
            response_ids=row[models.PROMPT_TOKENS :],
            rollout_logprobs=np.zeros(length, np.float32),
            finish_reason="length",
            version=0,
            text="",
        )
        for position, (row, length) in enumerate(zip(ids, lengths, strict=True))
    ]


@dataclass
class Batch:
    """A batch of random responses at a learner."""

    learner: PolicyLearner
    lengths: Sequence[int]
    seed: int
    rollouts: list[Rollout] = field(init=False)

    def __post_init__(self) -> None:
        self.rollouts = _rollouts(self.lengths, self.seed)
        logprobs, _ = self.learner.logprobs(self.rollouts)
        scores = tuple(np.random.default_rng(self.seed).normal(size=len(self.lengths)).tolist())
        self.learner.assemble(0.0, [scores], self.rollouts, logprobs, logprobs, None)

    def learn(self) -> None:
        """Run all epochs."""
        self.learner.learn(0.0, 1.0)


class BareLoop:
    """The plain way to learn from responses of one length: as little as PPO's loss needs."""

    def __init__(self, config: Config, base: str, rollouts: Sequence[Rollout]) -> None:
        model = load_causal_lm(base, config.model)
        self._model = on_device(attach(model, config.lora, "CAUSAL_LM", seed=0, dropout=0.0).eval())
        trained = [each for each in self._model.parameters() if each.requires_grad]
        self._trained = trained
        self._optimizer = torch.optim.AdamW(trained, config.ppo.learning_rate)
        ids = np.stack([rollout.sequence_ids for rollout in rollouts])
        self._ids_BS = torch.tensor(ids, device=self._model.device)
        self._advantages_B1 = torch.randn(len(ids), 1, device=self._model.device)
        with torch.no_grad():
            self._old_BT = self._logprobs()

    def _logprobs(self) -> Tensor:
        logits_BSV = self._model(input_ids=self._ids_BS, use_cache=False).logits
        logits_BTV = logits_BSV[:, models.PROMPT_TOKENS - 1 : -1].float()
        tokens_BT1 = self._ids_BS[:, models.PROMPT_TOKENS :, None]
        return logits_BTV.log_softmax(-1).gather(-1, tokens_BT1).squeeze(-1)

    def learn(self) -> None:
        """Run all epochs."""
        for _ in range(EPOCHS):
            ratio_BT = (self._logprobs() - self._old_BT).exp()
            clipped_BT = ratio_BT.clamp(0.8, 1.2)
            gains_BT = torch.min(ratio_BT * self._advantages_B1, clipped_BT * self._advantages_B1)
            (-gains_BT.mean()).backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
