"""THE loop: generate, score, learn, commit, publish.

    prompts --> generate --> score ----------> learn --> commit v+1 --> publish, prove --+
       ^        generators   reward, reference  policy                                   |
       |                     policy, critic     critic                                   |
       +----------------------------- next iteration <-----------------------------------+

Each finished shard is scored while others still generate. An iteration starts from the last
commit and ends in the next one, which the driver holds; generators only ever serve committed
adapters. Every `ppo.save_every` iterations the commit is written to the run's folder as well.
Before it is committed, the guards look at an iteration: they may stop the run, or ask to go back.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.algorithms.kl_controller import AdaptiveKL, FixedKL, KLController
from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import (
    PromptCursor,
    num_rollouts,
    require_all_learnt,
    require_whole,
    sample_requests,
    shard_requests,
)
from rlhf_ray.driver.checkpoint import Checkpoints, RunState
from rlhf_ray.driver.evaluation import Evaluator
from rlhf_ray.driver.guards import Guards, MismatchGuard, remembered
from rlhf_ray.driver.metrics import (
    generator_metrics,
    iteration_metrics,
    pace_metrics,
    run_summary,
    with_scores,
)
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.driver.weight_sync import WeightSync
from rlhf_ray.observability.progress import Bar
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.roles import Roles
from rlhf_ray.types import AssembledStats, Commit, Handle, ScoredShard, Shard, StepReport, TokenRows


class PpoLoop:
    """Drives the roles through the iterations of a run."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        cursor: PromptCursor,
        sync: WeightSync,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        recorder: Recorder,
        state: RunState,
        progress_bar: Bar,
    ) -> None:
        self._config = config
        self._roles = roles
        self._cursor = cursor
        self._sync = sync
        self._evaluator = evaluator
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._state = self._first_state = state
        self._bar = progress_bar
        self._guard = MismatchGuard(
            config.engine_is_exact, config.rollout.max_gap or state.gap_bound
        )
        self._watch = Guards(config.guards, recorder)
        self._kl = _kl_controller(config)
        self._whitens = _whitens(config)
        if state.iteration:
            self._kl.load_state_dict({"coef": state.kl_coef})
        self._stop_asked = False
        self._at_end = state.iteration >= config.ppo.iterations

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self._state

    def request_stop(self) -> None:
        """End after the iteration that is being done, with its commit saved."""
        self._stop_asked = True

    async def run(self) -> dict[str, Any]:
        """Prove the generators, then iterate to the end; returns the summary."""
        config = self._config
        num_drawn = config.ppo.iterations * config.num_prompts_per_iteration
        self._watch.check_prompts(num_drawn, len(self._cursor))
        if config.guards.loss_spike.action == "rollback":
            await self._hold_commit()  # what the first iteration goes back to
        self._recorder.committed()
        await self._roles.generators.prove(await self._sync.proof())
        await self._publish()
        if self._evaluation_is_due():
            await self._evaluate()
        while not self._at_end:
            await self._iterate()
        self._state = replace(self._state, **self._generators_so_far())
        recorder = self._recorder
        summary = run_summary(recorder.history(), asdict(self._state), recorder.warnings())
        return summary | {
            "stopped": self._state.iteration < config.ppo.iterations,
            "peak_memory_bytes": await self._roles.peak_memory(),
        }

    async def _iterate(self) -> None:
        iteration = self._state.iteration + 1
        started = time.time()
        batch = await self._rollout(iteration)
        stats, reports = await self._learn(batch, iteration)
        state = self._state
        metrics = iteration_metrics(
            self._config.rewards, batch, stats, reports, self._kl.coef, state.version
        )
        if self._watch.asks_to_go_back(iteration, metrics, state.losses, state.rollbacks_in_a_row):
            await self._go_back(batch, iteration)
        else:
            await self._commit(batch, stats, metrics, iteration)
        self._recorder.committed()
        with self._recorder.phase("sync", iteration):
            await self._publish()
        metrics |= generator_metrics(self._roles.generators.report(), self._state)
        metrics |= pace_metrics(stats, time.time() - started, self._price_per_hour())
        await self._record(batch, metrics, iteration)
        self._at_end = self._stop_asked or iteration == self._config.ppo.iterations
        if self._at_end or iteration % self._config.ppo.save_every == 0:
            await self._save()
        if self._evaluation_is_due():
            await self._evaluate()

    async def _rollout(self, iteration: int) -> list[ScoredShard]:
        """Generate a batch; score each shard as soon as it is there, then combine its sources."""
        config = self._config
        prompts = self._cursor.take(self._state.prompts_drawn, config.num_prompts_per_iteration)
        samples = sample_requests(
            prompts, config.ppo.samples_per_prompt, config.run.seed, iteration
        )
        requests = shard_requests(samples, config.rollout.shard_size, self._state.version)
        scoring = []
        with self._recorder.phase("gen", iteration):
            async for shard in self._roles.generators.generate(requests):
                scoring.append(asyncio.ensure_future(self._score(shard)))
        with self._recorder.phase("score", iteration):
            batch = sorted(await asyncio.gather(*scoring), key=lambda s: s.shard.info.index)
        require_whole(batch, config.ppo.batch_size, self._state.version)
        self._guard.check(batch)
        batch, self._reward_moments = with_scores(
            batch, config.rewards, self._state.reward_moments, config.ppo.missing_eos_penalty
        )
        return batch

    async def _score(self, shard: Shard) -> ScoredShard:
        roles = self._roles
        raw_scores, ref_logprobs, (old_logprobs, gap), values = await asyncio.gather(
            roles.scorer.score(shard),
            roles.reference.logprobs(shard),
            roles.policy.logprobs(shard),
            self._values(shard),
        )
        return ScoredShard(shard, raw_scores, old_logprobs, ref_logprobs, values, gap)

    async def _values(self, shard: Shard) -> Handle[TokenRows] | None:
        return await self._roles.critic.values(shard) if self._roles.critic else None

    async def _learn(
        self, batch: Sequence[ScoredShard], iteration: int
    ) -> tuple[AssembledStats, Sequence[StepReport]]:
        """Assemble, whiten over the whole batch, learn; policy and critic at the same time."""
        learners = self._roles.learners.values()
        with self._recorder.phase("learn", iteration):
            stats, *_ = await asyncio.gather(
                *(learner.assemble(batch, self._kl.coef) for learner in learners)
            )
            moments = Moments(stats.num_tokens, stats.advantage_total, stats.advantage_total_sq)
            mean, std = (moments.mean, moments.std()) if self._whitens else (0.0, 1.0)
            reports = await asyncio.gather(*(learner.learn(mean, std) for learner in learners))
        for report in reports:
            require_all_learnt(report, num_rollouts(batch))
        return stats, reports

    async def _commit(
        self,
        batch: Sequence[ScoredShard],
        stats: AssembledStats,
        metrics: Mapping[str, float],
        iteration: int,
    ) -> None:
        """Make the iteration's outcome the state that everything starts from."""
        per_token = self._config.ppo.kl_target_per_token is not None
        num_kls = stats.num_tokens if per_token else stats.num_samples
        self._kl.update(stats.kl_total / num_kls, stats.num_samples)
        state, window = self._state, self._config.guards.loss_spike.window
        self._state = replace(
            self._state_behind(batch, iteration),
            samples_learnt=state.samples_learnt + num_rollouts(batch),
            reward_moments=self._reward_moments,
            losses=remembered(state.losses, metrics, window),
            rollbacks_in_a_row=0,
        )
        with self._recorder.phase("commit", iteration):
            await self._hold_commit()

    async def _go_back(self, batch: Sequence[ScoredShard], iteration: int) -> None:
        """Make the last commit the next version again; the batch is set aside."""
        state, groups = self._state, self._last_commit.groups
        self._state = replace(
            self._state_behind(batch, iteration),
            samples_set_aside=state.samples_set_aside + num_rollouts(batch),
            rollbacks_in_a_row=state.rollbacks_in_a_row + 1,
        )
        with self._recorder.phase("commit", iteration):
            learners = self._roles.learners
            await asyncio.gather(
                *(learner.load(groups[name]) for name, learner in learners.items())
            )
            self._last_commit = Commit(self._state.version, groups, asdict(self._state))

    def _state_behind(self, batch: Sequence[ScoredShard], iteration: int) -> RunState:
        """What holds after an iteration, whatever became of its batch."""
        state = self._state
        return replace(
            state,
            iteration=iteration,
            version=state.version + 1,
            prompts_drawn=state.prompts_drawn + self._config.num_prompts_per_iteration,
            samples_generated=state.samples_generated + num_rollouts(batch),
            **self._generators_so_far(),
            kl_coef=self._kl.coef,
            # A bound that was given holds for as long as it is given.
            gap_bound=state.gap_bound if self._config.rollout.max_gap else self._guard.bound,
        )

    def _generators_so_far(self) -> dict[str, int]:
        """What the run's generators came to, those of earlier processes too."""
        report, before = self._roles.generators.report(), self._first_state
        return {
            "samples_requeued": before.samples_requeued + report.samples_requeued,
            "generator_restarts": before.generator_restarts + report.restarts,
        }

    async def _hold_commit(self) -> None:
        learners = self._roles.learners
        states = await asyncio.gather(*(learner.state() for learner in learners.values()))
        groups = dict(zip(learners, states, strict=True))
        self._last_commit = Commit(self._state.version, groups, asdict(self._state))

    async def _save(self) -> None:
        """Write the last commit to the run's folder, as the last act of its iteration.

        What is recorded of later iterations is cut off when the run goes on, so the records of
        this one must be there before.
        """
        commit = self._last_commit
        with self._recorder.phase("save", self._state.iteration):
            groups: Mapping[str, Mapping[str, bytes]] = {
                name: await self._roles.fetch(state) for name, state in commit.groups.items()
            }
            self._checkpoints.save(commit.version, groups, commit.progress)

    async def _publish(self) -> None:
        adapter = await self._roles.policy.adapter(self._state.version)
        await self._roles.generators.publish(adapter)

    async def _record(
        self, batch: Sequence[ScoredShard], metrics: Mapping[str, float], iteration: int
    ) -> None:
        state = self._state
        metrics = {
            **metrics,
            "policy/version": state.version,
            "episode": state.samples_learnt,
            "episode_set_aside": state.samples_set_aside,
        }
        self._recorder.log(iteration, metrics)
        rollouts = await self._roles.fetch(batch[0].shard.rollouts)
        scores = raw_sums(self._config.rewards, batch[0].raw_scores)
        self._recorder.completions(iteration, rollouts, scores)
        self._bar.advance(1, reward=metrics["objective/scores"], kl=metrics["objective/kl"])

    def _price_per_hour(self) -> float | None:
        price = self._config.cluster.gpu_hour_price
        return None if price is None else price * self._roles.num_gpus()

    def _evaluation_is_due(self) -> bool:
        """Also where a run goes on from a commit that it did not live to evaluate."""
        iteration = self._state.iteration
        due = iteration % self._config.ppo.eval_every == 0
        return due and not self._recorder.has_evaluation(iteration)

    async def _evaluate(self) -> None:
        """Held-out score of the version that is served; keeps the best version."""
        state = self._state
        record = await self._evaluator.evaluate(self._roles, state.version)
        if state.best_score is None or record["eval/score"] > state.best_score:
            self._state = replace(state, best_score=record["eval/score"])
            if state.iteration:
                await self._keep_best()
        self._recorder.evaluation({"iteration": state.iteration, **record})

    async def _keep_best(self) -> None:
        """Save the current version if it is not saved, and point at it.

        The score is written last: a run killed before that evaluates, and points, once more.
        """
        version = self._state.version
        if not self._checkpoints.has(version):
            await self._save()
        self._checkpoints.mark_best(version)
        self._checkpoints.set_progress(version, asdict(self._state))


def _kl_controller(config: Config) -> KLController:
    ppo = config.ppo
    target = ppo.kl_target or ppo.kl_target_per_token
    if target is None or ppo.kl_coef == 0:
        return FixedKL(ppo.kl_coef)
    return AdaptiveKL(ppo.kl_coef, target, ppo.kl_horizon)


def _whitens(config: Config) -> bool:
    chosen = config.ppo.whiten_advantages
    return resolve(config.ppo.advantage).whitened if chosen is None else chosen
