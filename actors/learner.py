"""What policy and critic learners share: set-up, experience, steps over it, state in and out."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from operator import add
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.algorithms.experience import (
    Assembled,
    Assembler,
    Collected,
    Experience,
    micro_batches,
)
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config import Config
from rlhf_ray.engines.protocols import TrainingEngine
from rlhf_ray.models.adapters import tensors_from_bytes, tensors_to_bytes
from rlhf_ray.observability.metrics import metric
from rlhf_ray.types import AssembledStats, Rollout, StepReport

LEARNER_STATE = "learner.safetensors"
EngineKind = Literal["deepspeed", "torch"]


class Learner(ABC):
    """One rank of a learner group. ``start`` comes first, on all ranks at once."""

    grad_norm_name: str
    """Metric of its gradient norm."""

    def __init__(self, name: str, config: Config, model_path: str, engine: EngineKind) -> None:
        self._name = name
        self._config = config
        self._model_path = model_path
        self._engine_kind = engine
        self._assembler = assembler(config)
        self._engine: TrainingEngine

    def __repr__(self) -> str:
        return self._name

    @abstractmethod
    def _build_model(self) -> Any:
        """The model with its adapter attached; only what is trained requires gradients."""

    @abstractmethod
    def _group(self) -> tuple[float, int, Mapping[str, Any]]:
        """Learning rate, ZeRO stage, further DeepSpeed settings."""

    @abstractmethod
    def _loss(self, batch: Experience, num_tokens: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of a micro-batch and what `Tally.add` takes of it, by metric name."""

    @abstractmethod
    def _report(self) -> dict[str, float]:
        """Metrics of the iteration that are not of micro-batches."""

    def free_port(self) -> int:
        """A port on this rank's machine, for the group to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, rank: int = 0, world_size: int = 1, address: str = "", port: int = 0) -> None:
        """Join the group, load the model, make the optimizer."""
        ppo = self._config.ppo
        learning_rate, zero_stage, settings = self._group()
        optimizer = {
            "learning_rate": learning_rate,
            "epsilon": ppo.adam_epsilon,
            "max_grad_norm": ppo.max_grad_norm,
        }
        if self._engine_kind == "torch":
            from rlhf_ray.engines.torch_engine import TorchEngine

            self._engine = TorchEngine(self._build_model(), **optimizer)
            return
        from rlhf_ray.engines.deepspeed.engine import DeepSpeedEngine, join_group

        timeout = self._config.cluster.call_timeout_s
        device = join_group(rank, world_size, address, port, timeout)
        self._engine = DeepSpeedEngine(
            self._build_model().to(device),
            **optimizer,
            zero_stage=zero_stage,
            dtype=self._config.model.dtype,
            settings=settings,
        )

    def assemble(
        self, kl_coef: float, scores: Sequence[tuple[float, ...]], *parts: Any
    ) -> AssembledStats:
        """Make this rank's rows of the batch ready to learn from.

        Args:
            kl_coef: weight of the KL penalty in the token rewards.
            scores: per shard, the score of each rollout.
            parts: per shard its rollouts; then, in the same order, per shard the old log-probs;
                then the reference's; then the values, None without a critic.

        Returns:
            Sums over this rank's rows.
        """
        count = len(scores)
        unordered: list[Rollout] = _flat(parts[:count])
        order = sorted(range(len(unordered)), key=lambda row: unordered[row].position)

        def in_order(shards: Sequence[Sequence[Any]]) -> list[Any]:
            rows = _flat(shards)
            return [rows[row] for row in order]

        rollouts: list[Rollout] = in_order(parts[:count])
        has_critic = self._assembler.estimator.needs_critic
        batch = Collected(
            sequences=[rollout.sequence_ids for rollout in rollouts],
            prompt_lengths=[len(rollout.prompt.token_ids) for rollout in rollouts],
            responses=[rollout.response_ids for rollout in rollouts],
            rollout_logprobs=[rollout.rollout_logprobs for rollout in rollouts],
            old_logprobs=in_order(parts[count : 2 * count]),
            ref_logprobs=in_order(parts[2 * count : 3 * count]),
            values=in_order(parts[3 * count :]) if has_critic else None,
            scores_B=torch.tensor(in_order(scores)),
        )
        whole = self._assembler(batch, kl_coef)
        experience = self._learnt_from(whole)
        self._plan_mini_batches(
            experience.attention_BS.sum(1).tolist(), experience.mask_BT.sum(1).tolist()
        )
        mine = torch.tensor([row for mini_batch in self._my_rows for row in mini_batch])
        self._experience = experience.rows(mine)
        self._kl_coef = kl_coef
        return _stats(self._experience, whole.rewards_BT[mine])

    @abstractmethod
    def _learnt_from(self, whole: Assembled) -> Experience:
        """The batch with the mask over what this learner learns."""

    def _plan_mini_batches(self, lengths: list[int], response_lengths: list[int]) -> None:
        """Which rows of each mini-batch are this rank's, and how they are cut.

        Every rank computes the cut of every rank, because all must take the same number of
        micro-batches: ZeRO averages gradients in each backward pass.
        """
        size, world = self._config.ppo.mini_batch_size, self._engine.world_size
        self._my_rows: list[list[int]] = []
        self._micro: list[list[list[int]]] = []
        self._mini_batch_tokens: list[int] = []
        for first in range(0, len(lengths), size):
            rows = range(first, first + size)
            shares = [rows[rank::world] for rank in range(world)]
            cuts = [self._cut([lengths[row] for row in share], 1) for share in shares]
            most = max(len(cut) for cut in cuts)
            mine = shares[self._engine.rank]
            self._my_rows.append(list(mine))
            self._micro.append(self._cut([lengths[row] for row in mine], most))
            self._mini_batch_tokens.append(sum(response_lengths[row] for row in rows))

    def _cut(self, lengths: list[int], at_least: int) -> list[list[int]]:
        return micro_batches(lengths, self._config.ppo.max_tokens_per_micro_batch, at_least)

    def learn(self, advantage_mean: float, advantage_std: float) -> StepReport:
        """All epochs over the assembled batch.

        Args:
            advantage_mean: over the whole batch, all ranks.
            advantage_std: over the whole batch, all ranks, unbiased.
        """
        self._whiten(advantage_mean, advantage_std)
        stepped, norms = Tally(), []
        for _ in range(self._config.ppo.epochs):
            for index, num_tokens in enumerate(self._mini_batch_tokens):
                mini_batch = self._backward(self._micro_batches(index), num_tokens)
                if self._moves_weights(mini_batch, num_tokens):
                    norms.append(self._engine.step())
                    stepped.merge(mini_batch)
                else:
                    self._engine.discard()
        norm = {self.grad_norm_name: fmean(norms)} if norms else {}
        return StepReport(
            metrics=stepped.means() | norm | self._report(),
            samples_learnt=sum(len(rows) for rows in self._my_rows),
            num_tokens=self._experience.num_tokens,
        )

    @abstractmethod
    def _whiten(self, mean: float, std: float) -> None:
        """Replace the advantages by whitened ones, where the learner uses them."""

    def _micro_batches(self, index: int) -> Iterator[Experience]:
        first = sum(len(rows) for rows in self._my_rows[:index])
        for rows in self._micro[index]:
            batch = self._experience.rows(torch.tensor([first + row for row in rows]))
            yield to_device(batch, self._engine.device)

    def _backward(self, batches: Iterator[Experience], num_tokens: int) -> "Tally":
        """Gradients of a mini-batch of ``num_tokens``, all ranks together.

        The denominator is the mini-batch's token count over the number of ranks, because the
        engine averages over ranks: the step is that of one process with all rows.
        """
        tally, remaining = Tally(), list(batches)
        for number, batch in enumerate(remaining, start=1):
            loss, means = self._loss(batch, num_tokens / self._engine.world_size)
            self._engine.backward(loss, last=number == len(remaining))
            tally.add(means, batch.num_tokens)
        return tally

    def _moves_weights(self, mini_batch: "Tally", num_tokens: int) -> bool:
        """Whether to step on a mini-batch; every rank must say the same.

        Args:
            mini_batch: this rank's rows of it.
            num_tokens: of the whole of it, all ranks.
        """
        return True

    def sleep(self) -> None:
        """Leave the GPU to others."""
        self._engine.sleep()

    def wake(self) -> None:
        """Take the GPU again."""
        self._engine.wake()

    def state(self) -> tuple[dict[str, bytes], None]:
        """Optimizer state and PEFT folder as files; all ranks call, rank 0's is the one to keep."""
        state = self._engine.export_state()
        files = {LEARNER_STATE: tensors_to_bytes(state)} | self._peft_files()
        return files, None

    @abstractmethod
    def _peft_files(self) -> dict[str, bytes]:
        """Contents of the PEFT folder, by file name."""

    def load(self, files: Mapping[str, bytes]) -> None:
        """Go back to a state, whatever number of ranks made it."""
        self._engine.import_state(tensors_from_bytes(files[LEARNER_STATE]))


class Tally:
    """Metrics of micro-batches, reduced as registered: means over tokens, and maxima."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._totals: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], num_tokens: int) -> None:
        """Count a micro-batch."""
        self._num_tokens += num_tokens
        for name, value in metrics.items():
            self._count(name, float(value) * (1 if _is_maximum(name) else num_tokens))

    def merge(self, other: "Tally") -> None:
        """Count what another one counted."""
        self._num_tokens += other._num_tokens
        for name, total in other._totals.items():
            self._count(name, total)

    def _count(self, name: str, total: float) -> None:
        together = max if _is_maximum(name) else add
        self._totals[name] = together(self._totals[name], total) if name in self._totals else total

    def total(self, name: str) -> float:
        """Sum over tokens."""
        return self._totals[name]

    def means(self) -> dict[str, float]:
        """Every metric; none where nothing was counted."""
        return {
            name: total if _is_maximum(name) else total / self._num_tokens
            for name, total in self._totals.items()
        }


def _is_maximum(name: str) -> bool:
    return metric(name).reduction.how == "maximum"


def assembler(config: Config) -> Assembler:
    """How this run makes advantages.

    Raises:
        ConfigError: a function named in ppo.advantage cannot be had or used.
    """
    ppo = config.ppo
    return Assembler(
        estimator=resolve(ppo.advantage),
        gamma=ppo.gamma,
        lam=ppo.gae_lambda,
        group_size=ppo.samples_per_prompt,
        kl_kind=ppo.kl_estimator,
        kl_in=ppo.kl_in,
        position=ppo.score_position,
        max_tokens=config.rollout.max_tokens,
    )


def to_device(batch: Experience, device: torch.device) -> Experience:
    """The batch on a device."""
    fields = {name: getattr(batch, name).to(device) for name in batch.__dataclass_fields__}
    return Experience(**fields)


def _flat(shards: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for shard in shards for row in shard]


def _stats(batch: Experience, rewards_BT: Tensor) -> AssembledStats:
    mask_BT = batch.mask_BT
    moments = Moments.of(batch.advantages_BT, mask_BT)
    kl = kl_estimate(batch.old_logprobs_BT, batch.ref_logprobs_BT, "k1")[mask_BT].double()
    return AssembledStats(
        num_samples=len(mask_BT),
        num_tokens=batch.num_tokens,
        advantage_total=moments.total,
        advantage_total_sq=moments.total_sq,
        kl_total=float(kl.sum()),
        reward_total=float(rewards_BT.double().sum()),
        neg_logprob_sum=float(-batch.old_logprobs_BT[mask_BT].double().sum()),
    )
