"""Calls to the members of a group and their arguments, over workers that record them."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.cluster.learner_groups import (
    CriticClient,
    PolicyBaseClient,
    PolicyClient,
    merge_reports,
)
from rlhf_ray.cluster.role_clients import Crew, GeneratorClient, ReferenceClient, ScorerClient
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.errors import ActorFailure
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Mismatch,
    ScoredShard,
    Shard,
    ShardInfo,
    StepReport,
)

MISMATCH = Mismatch(0.0, 0.0, 1)


class FakeWorker:
    """Answers every call with what it was told to, and remembers the calls."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.name = name
        self.calls: list[tuple[Any, ...]] = []
        self._answers = answers

    async def address(self) -> str:
        return "127.0.0.1"

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        self.calls.append((method.__name__, *args))
        return self._answers[method.__name__]

    async def call_split(self, method: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        return await self.call(method, *args)


def test_a_generator_gets_the_bytes_beside_the_description() -> None:
    worker = FakeWorker("generator-0", publish="served")
    update = AdapterUpdate(3, "abc", {"r": 1}, "handle")
    assert asyncio.run(GeneratorClient(worker).publish(update)) == "served"
    ((method, described, tensors),) = worker.calls
    assert (method, tensors) == ("publish", "handle")
    assert described == AdapterUpdate(3, "abc", {"r": 1}, None)


SHARD = Shard(ShardInfo(0, (0,), (1,), (True,), (0,)), "rollouts")


def test_stateless_roles_are_called_in_turn() -> None:
    scorers = [FakeWorker("reward-0", score=(1.0,)), FakeWorker("reward-1", score=(2.0,))]
    references = [FakeWorker("reference-0", logprobs=("a", None))]

    async def ask() -> list[Any]:
        scorer, reference = ScorerClient(Crew(scorers)), ReferenceClient(Crew(references))
        scores = [await scorer.score(SHARD) for _ in range(3)]
        return [*scores, await reference.logprobs(SHARD)]

    assert asyncio.run(ask()) == [(1.0,), (2.0,), (1.0,), "a"]
    assert scorers[0].calls == [("score", "rollouts")] * 2


def ranks(**answers: Any) -> list[FakeWorker]:
    return [FakeWorker(f"policy-{rank}", **answers) for rank in range(2)]


def test_what_one_rank_can_answer_goes_to_the_ranks_in_turn() -> None:
    workers = ranks(logprobs=("handle", MISMATCH))

    async def ask() -> None:
        client = PolicyClient(workers, zero_stage=2)
        for _ in range(4):
            assert await client.logprobs(SHARD) == ("handle", MISMATCH)

    asyncio.run(ask())
    assert [len(worker.calls) for worker in workers] == [2, 2]


def test_where_weights_are_sharded_every_rank_computes() -> None:
    workers = ranks(logprobs=("handle", MISMATCH))
    assert asyncio.run(PolicyClient(workers, zero_stage=3).logprobs(SHARD)) == ("handle", MISMATCH)
    assert [len(worker.calls) for worker in workers] == [1, 1]
    critics = ranks(values=("values", None))
    assert asyncio.run(CriticClient(critics, zero_stage=3).values(SHARD)) == "values"
    assert [len(worker.calls) for worker in critics] == [1, 1]


@pytest.mark.parametrize(("zero_stage", "num_calls"), [(2, [1, 0]), (3, [1, 1])])
def test_the_policys_ranks_answer_for_the_reference(zero_stage: int, num_calls: list[int]) -> None:
    workers = ranks(ref_logprobs=("base's", None))
    reference = PolicyBaseClient(PolicyClient(workers, zero_stage))
    assert asyncio.run(reference.logprobs(SHARD)) == "base's"
    assert [len(worker.calls) for worker in workers] == num_calls
    assert workers[0].calls == [("ref_logprobs", "rollouts")]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_changes_or_reads_the_group_goes_to_every_rank(zero_stage: int) -> None:
    update = AdapterUpdate(1, "d", {}, None)
    report = StepReport({}, (0,), 1)
    workers = ranks(
        learn=report,
        state=("files", None),
        load=None,
        adapter=("bytes", update),
        zero_adapter=("bytes", update),
        probe=("bytes", update),
        compare="comparison",
        sample_kl=(0.5,),
    )
    client = PolicyClient(workers, zero_stage)

    async def ask() -> None:
        await client.learn(0.0, 1.0)
        assert await client.state() == "files"
        await client.load("files")
        for sent in (client.adapter(1), client.zero_adapter(1), client.probe(1, [])):
            assert await sent == AdapterUpdate(1, "d", {}, "bytes")
        assert await client.compare(AdapterUpdate(1, "d", {}, "bytes"), SHARD) == "comparison"
        assert await client.sample_kl(SHARD, "ref") == (0.5,)

    asyncio.run(ask())
    assert workers[0].calls == workers[1].calls
    assert len(workers[0].calls) == 8
    assert ("compare", update, "bytes", "rollouts") in workers[0].calls


@pytest.mark.parametrize("method", ["state", "adapter", "zero_adapter", "probe"])
def test_ranks_whose_adapters_differ_are_a_failure_of_the_group(method: str) -> None:
    workers = [
        FakeWorker(f"policy-{rank}", **{method: ("", f"{rank}a" if method == "state" else update)})
        for rank, update in enumerate(AdapterUpdate(1, f"{rank}a", {}, None) for rank in range(2))
    ]
    call = getattr(PolicyClient(workers, zero_stage=2), method)
    arguments = {"state": (), "probe": (1, [])}.get(method, (1,))
    with pytest.raises(ActorFailure, match=r"differ, by digest: policy-0 0a, policy-1 1a"):
        asyncio.run(call(*arguments))


def test_a_batch_is_passed_by_column_and_sums_are_added() -> None:
    stats = AssembledStats(1, 10, 0.5, 1.5, 2.0, 3.0, 4.0)
    workers = ranks(assemble=stats)
    batch = [
        ScoredShard(
            shard=Shard(SHARD.info, f"rollouts{i}"),
            raw_scores={},
            scores=(float(i),),
            old_logprobs=f"old{i}",
            ref_logprobs=f"ref{i}",
            values=f"v{i}",
            mismatch=MISMATCH,
        )
        for i in range(2)
    ]
    total = asyncio.run(PolicyClient(workers, 2).assemble(batch, 0.2))
    assert total == AssembledStats(2, 20, 1.0, 3.0, 4.0, 6.0, 8.0)
    columns = ["rollouts0", "rollouts1", "old0", "old1", "ref0", "ref1", "v0", "v1"]
    assert workers[1].calls == [("assemble", 0.2, [(0.0,), (1.0,)], *columns)]


def test_reports_are_merged_by_tokens_and_maxima_by_maximum() -> None:
    merged = merge_reports(
        [
            StepReport({"loss/policy_avg": 1.0, "val/ratio_max": 1.5}, (0, 2, 4), 10),
            StepReport({"loss/policy_avg": 4.0, "val/ratio_max": 1.2}, (1, 3, 5, 6, 7), 30),
        ]
    )
    assert merged.metrics == {"loss/policy_avg": 3.25, "val/ratio_max": 1.5}  # (10 + 120) / 40
    assert (merged.samples_learnt, merged.num_tokens) == (8, 40)


class _Role:
    def twice(self, number: int) -> int:
        return 2 * number

    async def later(self, number: int) -> int:
        await asyncio.sleep(0)
        return 3 * number

    def split(self) -> tuple[list[int], str]:
        return [1, 2], "scalars"


def test_an_inline_worker_has_a_deadline_for_what_it_awaits() -> None:
    class Hanging:
        async def score(self) -> None:
            await asyncio.sleep(60)

    worker = InlineWorker("reward-0", Hanging(), lambda *_: None, timeout_s=0.05)
    with pytest.raises(
        ActorFailure, match=r"reward-0 did not answer score, .* last 0\.05 s \(clus"
    ):
        asyncio.run(worker.call(Hanging.score))


def test_an_inline_worker_calls_plain_and_async_methods_and_tells() -> None:
    told: list[tuple[Any, ...]] = []
    worker = InlineWorker("role-0", _Role(), lambda *call: told.append(call))

    async def ask() -> list[Any]:
        return [
            await worker.call(_Role.twice, 2),
            await worker.call(_Role.later, 2),
            await worker.call_split(_Role.split),
            await worker.hold([3]),
        ]

    assert asyncio.run(ask()) == [4, 6, ([1, 2], "scalars"), [3]]
    assert [(name, method) for name, method, _, _ in told] == [
        ("role-0", "twice"),
        ("role-0", "later"),
        ("role-0", "split"),
    ]
    assert all(started <= ended for _, _, started, ended in told)
