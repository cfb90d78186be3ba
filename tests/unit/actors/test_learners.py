"""Tests of policy and critic learners in one process: steps, and the split of rows over ranks."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.critic_learner import CriticLearner
from actors.policy_learner import PROBE_SHIFT, PolicyLearner, compare_shifts
from actors.reference import Reference
from rlhf_ray.cluster.learner_groups import merge_reports
from rlhf_ray.driver.guards import non_finite
from rlhf_ray.driver.weight_sync import probe_requests
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.models.adapters import adapter_state
from rlhf_ray.types import AssembledStats, Prompt, Rollout, StepReport

Columns = tuple[list[tuple[float, ...]], list[Any]]
SCORES = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.25, 1.0]


def columns(
    rollouts: list[Rollout], old: list[np.ndarray], shard_sizes: tuple[int, ...] = (3, 3, 2)
) -> Columns:
    """Return scores by shard, and the further arguments of assemble."""
    ref = [logprobs - 0.1 for logprobs in old]
    values = [np.linspace(0, 0.5, len(logprobs), dtype=np.float32) for logprobs in old]
    ends = np.cumsum(shard_sizes)

    def by_shard(rows: list[Any]) -> list[list[Any]]:
        return [rows[end - size : end] for size, end in zip(shard_sizes, ends, strict=True)]

    parts = [shard for column in (rollouts, old, ref, values) for shard in by_shard(column)]
    return [tuple(scores) for scores in by_shard(SCORES)], parts


def assemble(learner: Any, policy: Any, rollouts: list[Rollout]) -> AssembledStats:
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    return learner.assemble(0.2, scores, *parts)


def learnt_state(learner: Any) -> dict[str, torch.Tensor]:
    return learner._engine.export_state()


class TestSharing:
    """Tests of the split over two ranks, without processes."""

    LENGTHS = (30, 10, 10, 10, 20, 20, 5, 5)
    RESPONSES = (3, 1, 1, 1, 2, 2, 4, 4)

    def plan(self, policy: PolicyLearner, rank: int, world_size: int) -> PolicyLearner:
        policy._engine = SimpleNamespace(rank=rank, world_size=world_size)  # type: ignore[assignment]
        policy._plan_mini_batches(list(self.LENGTHS), list(self.RESPONSES))
        return policy

    @pytest.fixture
    def unstarted(self, make_config: Callable[..., Any], base: str) -> PolicyLearner:
        return PolicyLearner(
            "policy-0",
            make_config(ppo={"max_tokens_per_micro_batch": 48}),
            base,
            "torch",
        )

    def test_rows_of_a_mini_batch_go_to_the_ranks_in_turn(self, unstarted: PolicyLearner) -> None:
        first = self.plan(unstarted, 0, 2)
        assert first._my_rows == [[0, 2], [4, 6]]
        second = self.plan(unstarted, 1, 2)
        assert second._my_rows == [[1, 3], [5, 7]]
        # The denominator is of the whole mini-batch, whichever rank holds its rows.
        assert first._mini_batch_tokens == second._mini_batch_tokens == [6, 12]

    def test_ranks_take_the_same_number_of_micro_batches(self, unstarted: PolicyLearner) -> None:
        # Rank 0 holds rows of 30 and 10 tokens: 2 * 30 > 48, so two; rank 1's 10 and 10 fit in one.
        first = [list(cut) for cut in self.plan(unstarted, 0, 2)._micro]
        second = [list(cut) for cut in self.plan(unstarted, 1, 2)._micro]
        assert first == [[[0], [1]], [[0, 1]]]
        assert second == [[[0], [1]], [[0, 1]]]
        # A single rank cuts by its own rows only.
        alone = self.plan(unstarted, 0, 1)
        assert [len(cut) for cut in alone._micro] == [2, 2]


def test_stats_are_sums_over_real_tokens(policy: PolicyLearner, rollouts: list[Rollout]) -> None:
    old, _ = policy.logprobs(rollouts)
    stats = assemble(policy, policy, rollouts)
    tokens = sum(len(row.response_ids) for row in rollouts)
    assert (stats.num_samples, stats.num_tokens) == (8, tokens)
    assert stats.kl_total == pytest.approx(0.1 * tokens, rel=1e-4)  # the reference is .1 below
    assert stats.reward_total == pytest.approx(sum(SCORES) - 0.2 * 0.1 * tokens, rel=1e-4)
    assert stats.neg_logprob_sum == pytest.approx(-sum(float(row.sum()) for row in old), rel=1e-5)


def test_the_order_of_shards_does_not_matter(
    policy: PolicyLearner, rollouts: list[Rollout], make_learner: Callable[..., Any]
) -> None:
    other = make_learner(PolicyLearner)
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    order = [2, 0, 1]
    shuffled = [parts[column * 3 + shard] for column in range(4) for shard in order]
    one = policy.assemble(0.2, scores, *parts)
    two = other.assemble(0.2, [scores[shard] for shard in order], *shuffled)
    assert one == two
    policy.learn(0.1, 0.9)
    other.learn(0.1, 0.9)
    for name, tensor in learnt_state(policy).items():
        assert torch.equal(tensor, learnt_state(other)[name]), name


@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
def test_a_step_does_not_depend_on_the_micro_batches(
    kind: type, make_learner: Callable[..., Any], policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    """One row per micro-batch or all rows in one: equal gradients, so equal first moments."""
    moments, norms, reports = [], [], []
    for max_tokens in (48, 100_000):
        ppo = {"max_tokens_per_micro_batch": max_tokens, "mini_batch_size": 8}
        learner = make_learner(kind, ppo=ppo)
        assemble(learner, policy, rollouts)
        num_micro = sum(len(cut) for cut in learner._micro)
        assert num_micro == 1 if max_tokens == 100_000 else num_micro > 3
        report = learner.learn(0.1, 0.9)
        reports.append(report)
        norms.append(next(v for k, v in report.metrics.items() if k.endswith("grad_norm")))
        state = learnt_state(learner)
        moments.append(
            torch.cat([t.flatten() for n, t in state.items() if n.startswith("exp_avg/")])
        )
        assert report.samples_learnt == 8
    assert norms[0] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-6)
    for name, value in reports[0].metrics.items():
        assert reports[1].metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_first_step_starts_at_ratio_one(
    make_learner: Callable[..., Any], policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    learner = make_learner(PolicyLearner, ppo={"mini_batch_size": 8})
    stats = assemble(learner, policy, rollouts)
    mean = stats.advantage_total / stats.num_tokens
    report = learner.learn(mean, 1.0)
    assert report.metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert report.metrics["val/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert report.metrics["policy/clipfrac_avg"] == 0
    # At ratio 1 the loss is minus the mean advantage, which whitening made 0.
    assert report.metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-4)


def test_learning_makes_good_responses_likelier(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    learner = make_learner(PolicyLearner, ppo={"mini_batch_size": 8, "epochs": 3})
    before, _ = learner.logprobs(rollouts)
    stats = assemble(learner, learner, rollouts)
    learner.learn(stats.advantage_total / stats.num_tokens, 1.0)
    after, _ = learner.logprobs(rollouts)
    gains = [float((a - b).mean()) for a, b in zip(after, before, strict=True)]
    best, worst = int(np.argmax(SCORES)), int(np.argmin(SCORES))
    assert gains[best] > 0 > gains[worst]


def test_a_state_takes_a_learner_back(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    one, other = make_learner(PolicyLearner), make_learner(PolicyLearner)
    assemble(one, one, rollouts)
    one.learn(0.0, 1.0)
    files, _ = one.state()
    assert set(files) == {
        "learner.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    other.load(files)
    assert other.adapter(1)[1].digest == one.adapter(1)[1].digest
    for learner in (one, other):
        assemble(learner, learner, rollouts)
        learner.learn(0.0, 1.0)
    for name, tensor in learnt_state(one).items():
        assert torch.equal(tensor, learnt_state(other)[name]), name


@pytest.mark.parametrize(("overflows", "skipped"), [([True, False], 1), ([True, True], 2)])
def test_steps_that_float16_skips_are_no_steps(
    make_learner: Callable[..., Any],
    rollouts: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
    overflows: list[bool],
    skipped: int,
) -> None:
    policy = make_learner(PolicyLearner, ppo={"mini_batch_size": 4})
    assemble(policy, policy, rollouts)
    engine: Any = policy._engine
    engine._overflows = True
    clip, left = torch.nn.utils.clip_grad_norm_, iter(overflows)

    def clipped(weights: Any, largest: float) -> torch.Tensor:
        norm = clip(weights, largest)
        return torch.tensor(math.inf) if next(left) else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    report = policy.learn(0.0, 1.0)
    assert report.metrics["policy/steps_skipped"] == skipped
    assert report.samples_learnt == 8
    assert engine._num_steps() == 2 - skipped
    assert ("policy/grad_norm" in report.metrics) == (skipped < 2)
    assert report.num_tokens == sum(policy._mini_batch_tokens[skipped:])


def test_a_loss_that_is_not_finite_is_no_overflow(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    policy = make_learner(PolicyLearner, guards={"ratio": {"action": "off"}})
    assemble(policy, policy, rollouts)
    engine: Any = policy._engine
    engine._overflows = True
    with torch.no_grad():
        for param in engine._trainable.values():
            param.fill_(math.nan)
    report = policy.learn(0.0, 1.0)
    assert "policy/steps_skipped" not in report.metrics
    assert non_finite(report.metrics)


def as_group(learners: list[Any], call: Callable[[Any], Any]) -> list[Any]:
    """Call the learners as the ranks of one group, which wait for each other in sums."""
    values, meeting = [0.0] * len(learners), threading.Barrier(len(learners), timeout=60)
    computing = threading.Lock()  # one at a time: models are patched while they compute

    def at(rank: int) -> Any:
        def sum_over_ranks(value: float) -> float:
            values[rank] = value
            computing.release()
            meeting.wait()
            total = sum(values)
            meeting.wait()
            computing.acquire()
            return total

        engine = learners[rank]._engine
        engine.rank, engine.world_size = rank, len(learners)
        engine.sum_over_ranks = sum_over_ranks
        with computing:
            return call(learners[rank])

    with ThreadPoolExecutor(len(learners)) as pool:
        return list(pool.map(at, range(len(learners))))


@pytest.mark.parametrize("kind", [CriticLearner, PolicyLearner])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_is_no_overflow_on_any(
    make_learner: Callable[..., Any],
    policy: PolicyLearner,
    rollouts: list[Rollout],
    kind: type[Any],
    broken: int,
) -> None:
    def learn(learner: Any) -> StepReport:
        assemble(learner, policy, rollouts)
        if learner._engine.rank == broken:
            learner._experience.returns_BT.fill_(math.nan)
            learner._experience.old_logprobs_BT.fill_(math.nan)
        learner._engine.step = learner._engine.discard  # the group's gradients are not finite
        return learner.learn(0.0, 1.0)

    learners = [make_learner(kind, guards={"ratio": {"action": "off"}}) for _ in range(2)]
    report = merge_reports(as_group(learners, learn))
    assert kind.skipped_name not in report.metrics
    assert non_finite(report.metrics)


def test_rank_0_alone_returns_what_is_the_same_on_all_ranks(policy: PolicyLearner) -> None:
    files, digest = policy.state()
    tensors, update = policy.adapter(1)
    policy._engine.rank = 1
    assert policy.state() == ({}, digest)
    assert policy.adapter(1) == (b"", update)
    assert update.digest == digest
    assert files["adapter_model.safetensors"] == tensors


def test_the_base_is_the_reference_whatever_was_learnt(
    policy: PolicyLearner, rollouts: list[Rollout], make_config: Callable[..., Any], base: str
) -> None:
    assemble(policy, policy, rollouts)
    policy.learn(0.0, 1.0)
    learnt = policy.logprobs(rollouts)[0]
    reference, _ = Reference("reference-0", make_config(), base).logprobs(rollouts)
    answers, scalars = policy.ref_logprobs(rollouts)
    assert scalars is None
    for ours, theirs in zip(answers, reference, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.allclose(np.concatenate(learnt), np.concatenate(reference), atol=1e-3)
    for before, after in zip(learnt, policy.logprobs(rollouts)[0], strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_critic_starts_at_zero_and_learns_returns(
    critic: CriticLearner, policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    values, _ = critic.values(rollouts)
    assert all((row == 0).all() for row in values)
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    parts[9:] = [values[:3], values[3:6], values[6:]]
    losses = []
    for _ in range(4):
        critic.assemble(0.0, scores, *parts)
        losses.append(critic.learn(0.0, 1.0).metrics["loss/value_avg"])
    assert losses[-1] < losses[0]


def test_explained_variance_is_of_the_values_that_it_was_given(
    critic: CriticLearner, policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    # Without KL, with gamma 1, values that equal the score leave GAE nothing: returns = values.
    values = [
        np.full(len(row.response_ids), score, np.float32)
        for row, score in zip(rollouts, SCORES, strict=True)
    ]
    parts[9:] = [values[:3], values[3:6], values[6:]]
    critic.assemble(0.0, scores, *parts)
    assert critic._explained_variance == pytest.approx(1.0, abs=1e-6)


def test_ranks_report_the_explained_variance_of_the_whole_batch(
    make_learner: Callable[..., Any], policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    critic = make_learner(CriticLearner, ppo={"gae_lambda": 1.0})
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    # As above, but each value is off by .5, up or down; the returns stay the scores. Four ranks
    # hold two rows each, whose variances are not the batch's.
    values = [
        np.full(len(row.response_ids), score + (0.5 if place % 2 else -0.5), np.float32)
        for place, (row, score) in enumerate(zip(rollouts, SCORES, strict=True))
    ]
    returns = np.repeat(SCORES, [len(row.response_ids) for row in rollouts])
    errors = returns - np.concatenate(values)
    parts[9:] = [values[:3], values[3:6], values[6:]]
    reports = []
    for rank in range(4):
        critic._engine = SimpleNamespace(rank=rank, world_size=4)  # type: ignore[assignment]
        critic.assemble(0.0, scores, *parts)
        reports.append(StepReport(critic._report(), (0, 1), critic._experience.num_tokens))
    merged = merge_reports(reports).metrics["val/explained_variance"]
    assert merged == pytest.approx(1 - errors.var() / returns.var(), rel=1e-5)


def test_a_rank_weighs_its_means_by_the_tokens_of_the_steps_taken(
    policy: PolicyLearner, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(policy, policy, rollouts)
    steps = iter([True, False])
    monkeypatch.setattr(policy, "_moves_weights", lambda *_: next(steps))
    report = policy.learn(0.0, 1.0)
    assert report.num_tokens == sum(len(row.response_ids) for row in rollouts[:4])


class TestProbe:
    @pytest.fixture
    def canaries(self) -> Any:
        prompts = [Prompt(str(i), "", tuple(range(10 + i, 30 + i))) for i in range(4)]
        return probe_requests(prompts, 16, seed=0)

    def test_it_moves_the_canaries_and_gives_the_policy_back(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)  # a policy that is not zero
        own = adapter_state(policy._engine.module)  # type: ignore[arg-type]
        tensors, update = policy.probe(-1, canaries)
        state = tensors_from_bytes(tensors)
        assert digest(state) == update.digest
        assert update.version == -1
        assert policy._mean_shift(state, canaries) >= PROBE_SHIFT >= 0.5
        assert policy._mean_shift(own, canaries) < 0.5
        self.same(own, policy)

    def test_it_is_the_same_for_a_policy_that_has_learnt(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        _, before = policy.probe(-1, canaries)
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)
        assert policy.probe(-1, canaries)[1].digest == before.digest

    def test_ranks_whose_shifts_differ_make_the_same_probe(
        self, make_learner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, canaries: Any
    ) -> None:
        """Kernels that are not deterministic may put them on two sides of PROBE_SHIFT."""
        shifts = [iter([0.1, 0.9999, 2.0]), iter([0.1, 1.0002, 2.0])]
        monkeypatch.setattr(
            PolicyLearner, "_mean_shift", lambda learner, *_: next(shifts[learner._engine.rank])
        )
        ranks = [make_learner(PolicyLearner) for _ in shifts]
        one, other = as_group(ranks, lambda learner: learner.probe(-1, canaries)[1].digest)
        assert one == other

    def test_comparing_gives_the_policy_back(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)
        own = adapter_state(policy._engine.module)  # type: ignore[arg-type]
        tensors, update = policy.probe(-1, canaries)
        comparison = policy.compare(update, tensors, rollouts)
        assert comparison.shift > 0.5
        self.same(own, policy)

    def test_the_zero_adapter_is_the_base(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)
        tensors, _ = policy.zero_adapter(0)
        assert policy._mean_shift(tensors_from_bytes(tensors), canaries) == pytest.approx(
            0, abs=1e-6
        )

    def same(self, own: dict[str, torch.Tensor], policy: PolicyLearner) -> None:
        now = adapter_state(policy._engine.module)  # type: ignore[arg-type]
        assert all(torch.equal(own[name], now[name]) for name in own)


def test_a_comparison_is_along_the_learners_shift() -> None:
    base = np.zeros(4, np.float32)
    learner = np.array([1.0, -1.0, 2.0, 0.0], np.float32)
    shift = (6 / 4) ** 0.5
    exact = compare_shifts(learner, learner, base)
    assert (exact.shift, exact.engine_shift, exact.error) == pytest.approx((shift, shift, 0))
    half = compare_shifts(learner / 2, learner, base)
    assert half.engine_shift == pytest.approx(shift / 2)
    assert half.error == pytest.approx(0.5)
    assert compare_shifts(base, learner, base).engine_shift == 0
    assert compare_shifts(-learner, learner, base).engine_shift == pytest.approx(-shift)
    assert compare_shifts(base, base, base).shift == 0


def test_the_gap_is_the_engines_distance(policy: PolicyLearner, rollouts: list[Rollout]) -> None:
    own, gap = policy.logprobs(rollouts)
    differences = np.abs(np.concatenate(own) + 5.0)  # the rollouts' log-probs are all -5
    assert gap.mean == pytest.approx(float(differences.mean()), rel=1e-5)
    assert gap.largest == pytest.approx(float(differences.max()), rel=1e-5)
    assert gap.num_tokens == len(differences)


def test_kl_of_a_sample_is_its_token_sum(policy: PolicyLearner, rollouts: list[Rollout]) -> None:
    own, _ = policy.logprobs(rollouts)
    ref = [logprobs - 0.25 for logprobs in own]
    expected = [0.25 * len(row) for row in own]
    assert policy.sample_kl(rollouts, ref) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
def test_learning_over_a_quantised_base_with_recomputed_activations(
    kind: type,
    quantization: str,
    wide_base: str,
    make_config: Callable[..., Any],
    rollouts: list[Rollout],
) -> None:
    states = []
    for recompute in (False, True):
        config = make_config(
            model={"max_length": 64, "quantization": quantization},
            policy={"gradient_checkpointing": recompute},
            critic={"gradient_checkpointing": recompute, "learning_rate": 1e-2, "lora": {"r": 4}},
        )
        learner = kind("learner-0", config, wide_base, "torch")
        learner.start()
        old = [np.full(len(row.response_ids), -5.0, np.float32) for row in rollouts]
        scores, parts = columns(rollouts, old)
        learner.assemble(0.2, scores, *parts)
        learner.learn(0.1, 0.9)
        states.append(learnt_state(learner))
        # B starts at zero: what is not zero was learnt.
        assert all(tensor.any() for name, tensor in states[-1].items() if "lora_B" in name)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=1e-4)
