"""Stage rank: the SFT model answers prompts twice, and people say which answer is better.

The pairs are sampled first. Then generators and their GPUs are free, and the stage shows the page
of `rlhf-ray rank` and waits; verdicts from other servers on the same folder count as well.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, groupby

from rlhf_ray import interruption
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.cluster.workers import fetch
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import sample_requests, shard_requests
from rlhf_ray.engines.served_adapters import digest, tensors_to_bytes
from rlhf_ray.models.merging import zero_adapter
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.people.pairs import (
    Candidate,
    Pair,
    choose_pairs,
    make_pair,
    read_pairs,
    shown_fields,
    write_pairs,
)
from rlhf_ray.people.ranking import Ranking
from rlhf_ray.placement.layout import held_at_once
from rlhf_ray.runs.control import INTERVAL_S, ControlFiles
from rlhf_ray.runs.datasets import sampled_prompts
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.ppo.drains import drains_followed
from rlhf_ray.stages.ppo.generators import spawn_generators
from rlhf_ray.types import AdapterUpdate, Rollout, SampleRequest
from rlhf_ray.web.rank import RankPages
from rlhf_ray.web.server import served

SAMPLES_PER_PROMPT = 2


def run(config: Config) -> dict[str, object] | None:
    """Gather ``rank.answers`` verdicts; returns the summary that it wrote.

    None: some are missing, and ``rank.wait`` is false or the run was requested to stop.

    Raises:
        DataError: the SFT model gives equal answers to every prompt.
    """
    folder, progress = RunFolder(config), Progress(config.run.stages)
    if not read_pairs(folder.path):
        write_pairs(folder.path, _sampled_pairs(config, folder, progress))
    pages = RankPages(folder.path)
    if problem := pages.damage():
        progress.say(problem)
    _gather(config, folder, pages, progress)
    found, needed = pages.ranking.progress(), config.rank.answers
    if found.num_answers < needed:
        progress.say(
            f"rank: {found.num_answers} of {needed} verdicts. Show the pairs to people with "
            f"rlhf-ray rank {folder.path}"
        )
        return None
    summary: dict[str, object] = {
        "pairs": found.num_pairs,
        "answers": found.num_answers,
        "people": len(found.people),
    }
    folder.write_summary("rank", summary)
    return summary


def _gather(config: Config, folder: RunFolder, pages: RankPages, progress: Progress) -> None:
    """Show the page until there are enough verdicts, or for as long as the run may wait."""
    ranking, needed = pages.ranking, config.rank.answers
    if not config.rank.wait or ranking.progress().num_answers >= needed:
        return
    if len(ranking.pairs) < needed:
        progress.say(
            f"Warning: each person can rank {len(ranking.pairs)} pairs, and rank.answers is "
            f"{needed}: ask several people, or lower rank.answers"
        )
    with served(pages.routes()) as address:
        progress.say(f"rank: waiting for people, at {address}")
        progress.say(f"From elsewhere: rlhf-ray rank {folder.path}, on a machine that has it")
        done = ranking.progress().num_answers
        with progress.stage("rank", needed, "verdict", done) as bar:
            interruption.run(_enough(ranking, needed, ControlFiles(folder.path), bar))


async def _enough(ranking: Ranking, needed: int, control: ControlFiles, bar: Bar) -> None:
    """Return when there are enough verdicts, or the run is requested to stop."""
    while bar.done < needed and not control.requested().stop:
        await asyncio.sleep(INTERVAL_S)
        if new := ranking.progress().num_answers - bar.done:
            bar.advance(new)


def _sampled_pairs(config: Config, folder: RunFolder, progress: Progress) -> list[Pair]:
    """Sample two answers to each of some prompts of PPO's."""
    base, num_pairs = folder.sft_model(), config.rank.num_pairs
    prompts = sampled_prompts(config, folder, load_tokenizer(base, config.model), num_pairs)
    requests = sample_requests(prompts, SAMPLES_PER_PROMPT, config.run.seed, "rank")
    with progress.stage("rank", len(requests), "sample") as bar:
        rollouts = interruption.run(_sampled(config, base, requests, bar, progress.say))
    seeds = {request.position: request.seed for request in requests}
    return choose_pairs(_pairs(rollouts, seeds), "random", num_pairs, config.run.seed)


async def _sampled(
    config: Config,
    base: str,
    requests: Sequence[SampleRequest],
    bar: Bar,
    say: Callable[[str], None],
) -> list[Rollout]:
    """Sample from the SFT model, as PPO's generators would; return rollouts by position."""
    spawner = RoleSpawner(config, lambda *_: None, say=say)
    await spawner.place(held_at_once(config, ["rank"])["rank"])
    generators = spawn_generators(spawner, config, base, say)
    rollouts: list[Rollout] = []
    try:
        async with drains_followed(spawner, {}, say):
            await generators.start()
            await generators.publish(_unchanged(config, base))
            shards = shard_requests(requests, config.rollout.shard_size, version=0)
            async for shard in generators.generate(shards):
                rollouts += await fetch(shard.rollouts)
                bar.advance(len(rollouts) - bar.done)
    finally:
        await generators.close()
        await spawner.stop_all()
    return sorted(rollouts, key=lambda rollout: rollout.position)


def _unchanged(config: Config, base: str) -> AdapterUpdate:
    """Return the adapter under which generators sample from the SFT model itself."""
    peft_config, tensors = zero_adapter(base, config.model, config.lora)
    return AdapterUpdate(0, digest(tensors), peft_config, tensors_to_bytes(tensors))


def _pairs(rollouts: Sequence[Rollout], seeds: dict[int, int]) -> Iterator[Pair]:
    for _, answers in groupby(rollouts, lambda each: each.position // SAMPLES_PER_PROMPT):
        for first, second in combinations(answers, 2):
            prompt = first.prompt
            sides = (Candidate(each.text, "sft", seeds[each.position]) for each in (first, second))
            yield make_pair(prompt.text, shown_fields(prompt.text, prompt.fields), *sides)
