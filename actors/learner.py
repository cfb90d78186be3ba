"""The base of policy and critic learners: set-up, experience, optimizer steps, and state."""

import json
import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from actors.tally import Tally
from rlhf_ray.algorithms.experience import (
    Assembled,
    Assembler,
    Collected,
    Experience,
)
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.micro_batches import balanced, micro_batches
from rlhf_ray.algorithms.schedules import learning_rate_share
from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config import Config
from rlhf_ray.engines import served_adapters
from rlhf_ray.engines.protocols import TrainingEngine
from rlhf_ray.models import adapters
from rlhf_ray.models.loading import on_device
from rlhf_ray.observability.phases import LIMIT, count, report
from rlhf_ray.types import AssembledStats, Rollout, StepReport

LEARNER_STATE = "learner.safetensors"
EngineKind = Literal["deepspeed", "torch"]


class Learner(ABC):
    """One rank of a learner group. ``start`` must be called first, on all ranks at once."""

    grad_norm_name: str
    """Name of the metric for its gradient norm."""
    skipped_name: str
    """Name of the metric for steps that were not taken."""
    rate_name: str
    """Name of the metric for its learning rate."""

    def __init__(self, name: str, config: Config, model_path: str, engine: EngineKind) -> None:
        self._name = name
        self._config = config
        self._model_path = model_path
        self._engine_kind = engine
        self._assembler = Assembler.of(config.ppo, config.rollout.max_tokens)
        self._engine: TrainingEngine

    def __repr__(self) -> str:
        return self._name

    @abstractmethod
    def _build_model(self) -> Any:
        """Return the model with its adapter; only trained parameters require gradients."""

    @abstractmethod
    def _group(self) -> tuple[float, int, Mapping[str, Any]]:
        """Return the group's learning rate, ZeRO stage and further DeepSpeed settings."""

    @abstractmethod
    def _loss(self, batch: Experience, num_tokens: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of a micro-batch, and its metrics by name for `Tally.add`."""

    @abstractmethod
    def _report(self) -> dict[str, float]:
        """Return the iteration's metrics that are not computed per micro-batch."""

    def free_port(self) -> int:
        """Return a free port of this rank's machine, for the group's rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, rank: int = 0, world_size: int = 1, address: str = "", port: int = 0) -> None:
        """Join the group, load the model, and make the optimizer.

        Engines are imported here: the inline mode must not need DeepSpeed.
        """
        ppo = self._config.ppo
        learning_rate, zero_stage, settings = self._group()
        optimizer = {
            "learning_rate": learning_rate,
            "epsilon": ppo.adam_epsilon,
            "max_grad_norm": ppo.max_grad_norm,
        }
        if self._engine_kind == "torch":
            from rlhf_ray.engines.torch_engine import TorchEngine

            self._engine = TorchEngine(on_device(self._build_model()), **optimizer)
            return
        from rlhf_ray.engines.deepspeed.engine import DeepSpeedEngine, join_group, wait_for_ranks

        report(f"meeting the other ranks at {address}:{port}", waits=True)
        # Far above what the driver waits: it sees which rank moves, a collective doesn't, and one
        # that is slow to load its model must not end the others.
        cluster = self._config.cluster
        timeout_s = LIMIT * max(cluster.start_timeout_s, cluster.call_timeout_s)
        join_group(rank, world_size, address, port, timeout_s)
        report("loading the model")
        model = on_device(self._build_model())
        wait_for_ranks("loaded it")
        report("making the optimizer")
        self._engine = DeepSpeedEngine(
            model,
            **optimizer,
            zero_stage=zero_stage,
            dtype=self._config.model.dtype,
            settings=settings,
        )

    def assemble(
        self, kl_coef: float, scores: Sequence[tuple[float, ...]], *parts: Any
    ) -> AssembledStats:
        """Compute token rewards and advantages of the batch, and keep this rank's rows.

        Args:
            kl_coef: weight of the KL penalty in the token rewards.
            scores: per shard, the score of each rollout.
            parts: the rollouts of each shard; then, in the same order of shards, the old
                log-probs; then the reference's log-probs; then the values, None without a critic.

        Returns:
            Sums over this rank's rows.
        """
        count = len(scores)
        # By position, whatever the order of shards: mini-batches must not depend on it.
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
            cut_off=[rollout.finish_reason == "length" for rollout in rollouts],
        )
        whole = self._assembler(batch, kl_coef)
        experience = self._learnt_from(whole)
        mine = self._deal(experience)
        self._undealt = experience if self._config.ppo.redraw_mini_batches else None
        self._positions = tuple(rollouts[row].position for row in mine.tolist())
        self._kl_coef = kl_coef
        return _stats(self._experience, whole.rewards_BT[mine])

    @abstractmethod
    def _learnt_from(self, whole: Assembled) -> Experience:
        """Return the batch, masked to the tokens that this learner learns from."""

    def _weighted(self, batch: Experience) -> Experience:
        """Return the batch with the weights of its tokens; mini-batches are consecutive rows."""
        return batch

    def _deal(self, batch: Experience) -> Tensor:
        """Take this rank's rows of a batch, whose mini-batches are consecutive; return which."""
        self._plan_mini_batches(batch.attention_BS.sum(1).tolist(), batch.mask_BT.sum(1).tolist())
        mine = torch.tensor([row for mini_batch in self._my_rows for row in mini_batch])
        self._experience = self._weighted(batch).rows(mine)
        return mine

    def _redraw(self, *seed: int) -> None:
        """Deal the batch in another order, which is the same on all ranks."""
        assert self._undealt is not None
        order = np.random.default_rng(seed).permutation(len(self._undealt.prompt_lengths_B))
        self._deal(self._undealt.rows(torch.from_numpy(order)))

    def _plan_mini_batches(self, lengths: list[int], response_lengths: list[int]) -> None:
        """Choose this rank's rows of each mini-batch, and cut them into micro-batches.

        Every rank computes the cuts of all ranks, because all must run the same number of
        micro-batches: ZeRO averages gradients over ranks in each backward pass, and a rank with
        fewer passes would leave the others waiting.
        """
        size, world = self._config.ppo.mini_batch_size, self._engine.world_size
        self._my_rows: list[list[int]] = []
        self._micro: list[list[list[int]]] = []
        self._mini_batch_tokens: list[int] = []
        for first in range(0, len(lengths), size):
            rows = range(first, first + size)
            shares = [
                [first + row for row in share]
                for share in balanced(lengths[first : first + size], world)
            ]
            cuts = [self._cut([lengths[row] for row in share], 1) for share in shares]
            num_cuts = max(len(cut) for cut in cuts)
            mine = shares[self._engine.rank]
            self._my_rows.append(mine)
            self._micro.append(self._cut([lengths[row] for row in mine], num_cuts))
            self._mini_batch_tokens.append(sum(response_lengths[row] for row in rows))

    def _cut(self, lengths: list[int], at_least: int) -> list[list[int]]:
        most = self._config.ppo.max_tokens_per_micro_batch
        return micro_batches(lengths, most, self._engine.device, at_least)

    def learn(self, advantage_mean: float, advantage_std: float, iteration: int = 1) -> StepReport:
        """Run all epochs over the assembled batch.

        Args:
            advantage_mean: mean over the whole batch, all ranks.
            advantage_std: unbiased standard deviation over the whole batch, all ranks.
            iteration: of the run, from 1 on: the learning rate and redrawn mini-batches follow.
        """
        self._whiten(advantage_mean, advantage_std)
        rate = self._learning_rate(iteration)
        self._engine.set_learning_rate(rate)
        stepped, norms, num_skipped = Tally(), [], 0
        for epoch in range(self._config.ppo.epochs):
            if epoch and self._undealt is not None:
                self._redraw(self._config.run.seed, iteration, epoch)
                self._whiten(advantage_mean, advantage_std)
            seen = Tally()
            for index, num_tokens in enumerate(self._mini_batch_tokens):
                mini_batch = self._backward(self._micro_batches(index), num_tokens)
                seen.merge(mini_batch)
                if self._moves_weights(mini_batch, num_tokens):
                    norm = self._engine.step()
                    if norm is None and self._is_finite_everywhere(mini_batch):
                        num_skipped += 1  # no step: gradients overflowed, not the loss
                    else:
                        norms.append(math.nan if norm is None else norm)
                        stepped.merge(mini_batch)
                else:  # otherwise the next mini-batch would add to these gradients
                    self._engine.discard()
                count(1, "mini-batches learnt")
            if self._ends_after(seen):
                break
        own = {self.grad_norm_name: fmean(norms)} if norms else {}
        own |= {self.skipped_name: float(num_skipped)} if num_skipped else {}
        own |= {self.rate_name: rate} if self._config.ppo.is_scheduled else {}
        return StepReport(
            metrics=stepped.means() | own | self._report(),
            positions=self._positions,
            num_tokens=stepped.num_tokens,
        )

    def _learning_rate(self, iteration: int, num_idle: int = 0) -> float:
        """Return the rate of an iteration, the first ``num_idle`` of which it doesn't learn in."""
        ppo = self._config.ppo
        number, total = iteration - num_idle, ppo.iterations - num_idle
        share = learning_rate_share(number, total, ppo.scheduler, ppo.warmup_iterations)
        return self._group()[0] * share

    def _ends_after(self, epoch: Tally) -> bool:
        """Return whether to end the iteration after an epoch; every rank must return the same."""
        return False

    @abstractmethod
    def _whiten(self, mean: float, std: float) -> None:
        """Whiten the advantages, if the learner uses them."""

    def _micro_batches(self, index: int) -> Iterator[Experience]:
        first = sum(len(rows) for rows in self._my_rows[:index])
        for rows in self._micro[index]:
            batch = self._experience.rows(torch.tensor([first + row for row in rows]))
            yield batch.to(self._engine.device)

    def _backward(self, batches: Iterator[Experience], num_tokens: int) -> Tally:
        """Accumulate the gradients of a mini-batch that has ``num_tokens`` over all ranks.

        The denominator is the mini-batch's token count divided by the number of ranks, because the
        engine averages over ranks: the step equals that of one process with all rows.
        """
        tally, remaining = Tally(), list(batches)
        for number, batch in enumerate(remaining, start=1):
            loss, means = self._loss(batch, num_tokens / self._engine.world_size)
            self._engine.backward(loss, last=number == len(remaining))
            tally.add(means, batch.num_tokens)
            count(1, "micro-batches learnt")
        return tally

    def _is_finite_everywhere(self, mini_batch: Tally) -> bool:
        """Return whether a mini-batch's metrics are finite on every rank; all ranks must call."""
        return self._engine.sum_over_ranks(float(not mini_batch.is_finite())) == 0

    def _moves_weights(self, mini_batch: Tally, num_tokens: int) -> bool:
        """Return whether to step on a mini-batch; every rank must return the same."""
        return True

    def sleep(self) -> None:
        """Move to main memory, to free the GPU for the generators."""
        self._engine.sleep()

    def wake(self) -> None:
        """Move back to the GPU."""
        self._engine.wake()

    def state(self) -> tuple[dict[str, bytes], str]:
        """Return the adapter's digest, and rank 0 the state as files. All ranks must call."""
        state, adapter = self._engine.export_state(), self._read_adapter()
        digest = served_adapters.digest(adapter)
        if self._engine.rank:
            return {}, digest
        settings = adapters.peft_config(self._adapted)
        settings["base_model_name_or_path"] = self._model_path
        return {
            LEARNER_STATE: served_adapters.tensors_to_bytes(state),
            "adapter_model.safetensors": served_adapters.tensors_to_bytes(adapter),
            "adapter_config.json": json.dumps(settings, indent=2).encode(),
        }, digest

    @property
    @abstractmethod
    def _adapted(self) -> Any:
        """The model with its adapter, as PEFT wraps it."""

    def _read_adapter(self) -> served_adapters.TensorDict:
        with self._engine.whole_parameters():
            return adapters.adapter_state(self._adapted)

    def load(self, files: Mapping[str, bytes]) -> None:
        """Restore a state, which may come from another number of ranks."""
        self._engine.import_state(served_adapters.tensors_from_bytes(files[LEARNER_STATE]))


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
