"""THE loop: generate, score, learn, commit, publish.

    prompts --> generate --> score ----------> learn --> commit v+1 --> publish, prove --+
       ^        generators   reward, reference  policy                                   |
       |                     policy, critic     critic                                   |
       +----------------------------- next iteration <-----------------------------------+

Each finished shard is scored while others still generate. With `ppo.max_staleness` k the next k
batches are generated meanwhile: they are learnt in order, and none is begun before the version is
published that makes its samples at most k versions old. An iteration starts from the last commit
and ends in the next one, which the driver holds; generators only ever serve committed adapters.
Every `ppo.save_every` iterations the commit is also written to the run's folder, beside the next
iteration. The guards check an iteration before it is committed: they may stop the run or roll the
iteration back.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

from rlhf_ray.algorithms.kl_controller import kl_controller
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import Batches, PromptCursor, ScoredBatch, learn_from, whitens
from rlhf_ray.driver.checkpoint import Checkpoints, PlainMoments, RunState
from rlhf_ray.driver.commits import Commits
from rlhf_ray.driver.evaluation import Evaluator
from rlhf_ray.driver.guards import Guards, remembered
from rlhf_ray.driver.kept_batches import FOLDER, BatchKeeper, Step
from rlhf_ray.driver.ledger import Draw, Ledger
from rlhf_ray.driver.metrics import (
    generator_metrics,
    iteration_metrics,
    num_stepped_on,
    pace_metrics,
    run_summary,
)
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.driver.records.samples import SampleRecords
from rlhf_ray.driver.rollouts import Rollouts
from rlhf_ray.driver.useful_time import UsefulTime
from rlhf_ray.driver.weight_sync import WeightSync
from rlhf_ray.errors import DataLost
from rlhf_ray.interruption import Droppable
from rlhf_ray.observability.progress import Bar
from rlhf_ray.roles import Roles
from rlhf_ray.types import AssembledStats, ScoredShard, StepReport


@dataclass(frozen=True)
class LoopParts:
    """Everything that the loop needs."""

    config: Config
    roles: Roles
    cursor: PromptCursor
    sync: WeightSync
    evaluator: Evaluator
    checkpoints: Checkpoints
    recorder: Recorder
    state: RunState
    """State of the run: that of its last saved commit, or the initial one."""
    bar: Bar
    """Progress on the terminal."""
    token_text: Callable[[int], str] = str
    """Returns the text of a token's id, for the recorded samples."""


class PpoLoop:
    """Drives the roles through the iterations of a run."""

    def __init__(self, parts: LoopParts) -> None:
        config, state = parts.config, parts.state
        self._config = config
        self._roles = parts.roles
        self._recorder = parts.recorder
        self._parts = parts
        self._state = state
        self._ledger = Ledger(state)
        self.time = UsefulTime(parts.recorder.outages, state, parts.recorder.seen_at)
        bound = config.rollout.max_gap or state.gap_bound
        self._mismatch_guard = parts.sync.mismatch_guard(bound)
        has_batches = config.run.keep_batches != "none"
        self._guards = Guards(config.guards, parts.recorder, FOLDER if has_batches else None)
        is_whitened = whitens(config.ppo)  # asked once: it may load a file of the user's
        self._learn_from = partial(learn_from, ppo=config.ppo, whitened=is_whitened)
        warn, fetch, max_staleness = self._guards.warn, parts.roles.fetch, config.ppo.max_staleness
        self._commits = Commits(config, parts.roles, parts.checkpoints, parts.recorder, warn)
        self._rollouts = Rollouts(
            parts.roles, self._mismatch_guard, parts.recorder, warn, max_staleness
        )
        self._keeper = BatchKeeper(config, parts.recorder, parts.checkpoints, fetch, warn)
        self._batches = Batches(config, self._rollouts, self._ledger, parts.cursor, warn)
        self._samples = SampleRecords(config, fetch, parts.token_text, whitened=is_whitened)
        self._kl = kl_controller(config.ppo, state.adapted_kl_coef(config.ppo.kl_coef))
        self._stop_requested = False
        self._droppable = Droppable()
        self._recorded = state.iteration
        self._at_end = state.iteration >= config.ppo.iterations

    @property
    def state(self) -> RunState:
        """The current state of the run."""
        return self._state

    def request_stop(self) -> None:
        """End the run after the current iteration, with its commit saved."""
        self._stop_requested = True

    def interrupt(self) -> None:
        """End the run without what can be sampled again; learning ends, and is committed."""
        self._stop_requested = True
        self._droppable.drop()
        self.time.interrupted()

    async def run(self) -> dict[str, object]:
        """Prove the generators, then iterate to the end; return the summary.

        Raises:
            asyncio.CancelledError: interrupted, or cancelled; the last commit is saved.
        """
        # At Python's own 700, batches of 10,000 samples are searched for cycles again and again.
        gc.set_threshold(20_000, *gc.get_threshold()[1:])
        try:
            return await self._run()
        except asyncio.CancelledError:
            await self._commits.save_last(self._recorded, newer_than=self._parts.state.version)
            self.time.interrupted()
            raise
        finally:
            await self._rollouts.close()
            await self._keeper.written()
            await self._commits.written()

    async def _run(self) -> dict[str, object]:
        config = self._config
        self._keeper.drop_after(self._state.iteration)
        self._check_prompts()
        await self._commits.hold(self._state)  # what a rollback of the first iteration restores
        self._show_commit()
        # Prove before the first publication: the proof leaves probe adapters in the engines.
        proof = await self._parts.sync.proof()
        await self._droppable.wait(self._roles.generators.prove(proof))
        await self._droppable.wait(self._publish())
        self.time.ready()
        if self._evaluation_is_due():
            await self._droppable.wait(self._evaluate())
        while not self._at_end:
            await self._iterate()
        if self._droppable.is_dropped and self._state.iteration < config.ppo.iterations:
            raise asyncio.CancelledError
        self.time.stopped()
        self._state = replace(self._state, **self._generators_so_far())
        recorder = self._recorder
        summary = run_summary(recorder.history(), asdict(self._state), recorder.warnings())
        return summary | {
            "ledger": self._ledger.counts(),
            **self.time.summary(self._state.generator_restarts),
            "stopped": self._state.iteration < config.ppo.iterations,
            "peak_memory_bytes": await self._roles.peak_memory(),
        }

    async def _iterate(self) -> None:
        config, state = self._config, self._state
        started = time.monotonic()
        draw = self._draw()
        iteration = draw.batch
        scored, stats, reports = await self._commits.despite_losses(
            state, iteration, self._sampled_and_learnt, draw.num_samples
        )
        draw, batch = self._ledger.next_in_flight, scored.shards  # with refills
        metrics = iteration_metrics(
            config.rewards, batch, stats, reports, self._kl.coef, state.version
        )
        metrics |= scored.metrics
        found = self._guards.check(iteration, metrics, state.losses)
        has_warned = self._guards.has_warned(iteration)
        step = Step(iteration, self._kl.coef, self._commits.held, dict(metrics), has_warned)
        await self._keeper.keep(step, batch)
        if self._guards.require_rollback(iteration, found, state.rollbacks_in_a_row):
            await self._roll_back(draw)
        else:
            await self._commit(draw, scored.reward_moments, stats, metrics)
        if draw.filtered:
            self._check_prompts()
        self._show_commit()
        # Only what is committed is published: were a generator ahead of the commit, samples of a
        # policy that a failure has undone would be learnt from after the restore.
        with self._recorder.phase("sync", iteration):
            if not self._droppable.is_dropped:
                await self._publish()
        metrics |= generator_metrics(self._roles.generators.report(), self._state)
        price, num_gpus = config.cluster.gpu_hour_price, self._roles.num_gpus()
        metrics |= pace_metrics(stats, time.monotonic() - started, price, num_gpus)
        await self._record(batch, stats, metrics)
        self._at_end = self._stop_requested or iteration == config.ppo.iterations
        if self._at_end:
            await self._commits.save(iteration)
        elif self._commits.is_due(iteration):
            self._commits.save_beside(iteration)
        if self._evaluation_is_due():
            await self._droppable.wait(self._evaluate())

    def _check_prompts(self) -> None:
        """Warn if the prompts will not do: refills draw more of them than the batches."""
        state, config = self._state, self._config
        num_left = config.ppo.iterations - state.iteration
        num_drawn = state.prompts_drawn + num_left * config.num_prompts_per_iteration
        self._guards.check_prompts(num_drawn, len(self._parts.cursor))

    def _draw(self) -> Draw:
        """Draw batches until as many are in flight as may be; return the one to learn next."""
        ppo, num_prompts = self._config.ppo, self._config.num_prompts_per_iteration
        num_left = ppo.iterations - self._state.iteration
        while self._ledger.num_in_flight < min(1 + ppo.max_staleness, num_left):
            draw = self._ledger.draw(num_prompts, ppo.batch_size, self._state.version)
            if ppo.max_staleness:
                self._rollouts.begin(self._batches.requests(draw), draw.batch)
        return self._ledger.next_in_flight

    async def _sampled_and_learnt(
        self,
    ) -> tuple[ScoredBatch, AssembledStats, Sequence[StepReport]]:
        """Take the steps that need a batch's data, and that are taken again where it is lost."""
        state, draw = self._state, self._ledger.next_in_flight
        scoring = self._batches.scored(draw, state.version, state.reward_moments)
        scored = await self._droppable.wait(scoring)
        return scored, *await self._learn(scored.shards)

    async def _learn(
        self, batch: Sequence[ScoredShard]
    ) -> tuple[AssembledStats, Sequence[StepReport]]:
        """Learn, policy and critic at the same time, and check that each learnt all positions."""
        draw = self._ledger.next_in_flight
        with self._recorder.phase("learn", draw.batch):
            stats, reports = await self._learn_from(
                batch, self._roles.learners, self._kl.coef, iteration=draw.batch
            )
        self._ledger.learnt(draw, reports)
        return stats, [*reports.values()]

    async def _commit(
        self,
        draw: Draw,
        reward_moments: PlainMoments,
        stats: AssembledStats,
        metrics: Mapping[str, float],
    ) -> None:
        """Commit the iteration; a later failure restores this state."""
        per_token = self._config.ppo.kl_target_per_token is not None
        num_kls = stats.num_tokens if per_token else stats.num_samples
        num_samples = num_stepped_on(stats.num_samples, metrics, self._config.ppo, draw.batch)
        self._kl.update(stats.kl_total / num_kls, num_samples)
        state, window = self._state, self._config.guards.loss_spike.window
        self._state = replace(
            self._state_behind(draw, is_learnt=True),
            reward_moments=reward_moments,
            losses=remembered(state.losses, metrics, window),
            rollbacks_in_a_row=0,
        )
        with self._recorder.phase("commit", draw.batch):
            await self._commits.hold(self._state)

    async def _roll_back(self, draw: Draw) -> None:
        """Restore the last commit under the next version; the batch is discarded.

        A new version, because versions grow by one each iteration: the version of a shard then
        always identifies its batch.
        """
        self._state = replace(
            self._state_behind(draw, is_learnt=False),
            rollbacks_in_a_row=self._state.rollbacks_in_a_row + 1,
        )
        with self._recorder.phase("commit", draw.batch):
            await self._commits.restore(self._state)

    def _state_behind(self, draw: Draw, *, is_learnt: bool) -> RunState:
        """Return the state after an iteration, whether its batch was committed or discarded."""
        state, version = self._state, self._state.version + 1
        return replace(
            state,
            iteration=draw.batch,
            version=version,
            **self._ledger.settle(draw, version, is_learnt=is_learnt),
            **self.time.settle(time.time(), is_learnt=is_learnt),
            **self._generators_so_far(),
            kl_coef=self._kl.coef,
            kl_coef_from=self._config.ppo.kl_coef,
            # A bound from the config is not saved: it must not outlive its key in the config.
            gap_bound=(
                state.gap_bound if self._config.rollout.max_gap else self._mismatch_guard.bound
            ),
        )

    def _generators_so_far(self) -> dict[str, int]:
        """Return the run's counts of generators, including those of earlier driver processes."""
        report, before = self._roles.generators.report(), self._parts.state
        requeued = report.samples_requeued + self._commits.samples_lost
        return {
            "samples_requeued": before.samples_requeued + requeued,
            "samples_reissued": before.samples_reissued + report.samples_reissued,
            "generator_restarts": before.generator_restarts + report.restarts,
        }

    def _show_commit(self) -> None:
        counts = {f"ledger/{name}": num for name, num in self._ledger.counts().items()}
        self._recorder.committed({**counts, "effective_time_ratio": self.time.ratio})

    async def _publish(self) -> None:
        await self._rollouts.publish(await self._roles.policy.adapter(self._state.version))

    async def _record(
        self, batch: Sequence[ScoredShard], stats: AssembledStats, metrics: Mapping[str, float]
    ) -> None:
        state, iteration = self._state, self._state.iteration
        metrics = {
            **metrics,
            "policy/version": state.version,
            "episode": state.samples_learnt,
            "episode_set_aside": state.samples_set_aside,
        }
        self._recorder.log(iteration, metrics)
        with suppress(DataLost):  # it is learnt and committed: its texts alone are missing
            kl_coef = metrics["objective/kl_coef"]
            samples = await self._samples.of(iteration, batch, stats, kl_coef)
            self._recorder.completions(iteration, samples)
        self._recorded = iteration
        self._parts.bar.advance(1, reward=metrics["objective/scores"], kl=metrics["objective/kl"])

    def _evaluation_is_due(self) -> bool:
        """Return whether an evaluation is due, also one that an earlier process did not reach."""
        iteration = self._state.iteration
        due = iteration % self._config.ppo.eval_every == 0
        return due and not self._recorder.has_evaluation(iteration)

    async def _evaluate(self) -> None:
        """Score the served version on held-out prompts; keep the best version."""
        state = self._state
        with self._recorder.phase("eval", state.iteration):
            evaluate = partial(self._parts.evaluator.evaluate, self._roles, state.version)
            record = await self._commits.despite_losses(state, state.iteration, evaluate)
        if state.best_score is None or record["eval/score"] > state.best_score:
            self._state = replace(state, best_score=record["eval/score"])
            if state.iteration:
                await self._commits.keep_best(self._state)
        self._recorder.evaluation({"iteration": state.iteration, **record})
