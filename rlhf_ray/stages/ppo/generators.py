"""Starts and ends the processes of generators one by one, for the elastic pool."""

from collections.abc import Callable
from functools import partial

from actors.generator import Generator
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import Config
from rlhf_ray.config.rollout import AutoscaleConfig
from rlhf_ray.driver.weight_sync import publish_to
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.placement.layout import demands
from rlhf_ray.roles import GeneratorProcess


class GeneratorFactory:
    """Makes generators over a base model; the `Factory` of `generators.pool`."""

    def __init__(self, spawner: RoleSpawner, config: Config, base: str) -> None:
        self._spawner = spawner
        self._demand = next(d for d in demands(config) if d.role == "generator")
        stop = stop_token_ids(base, config.template, config.model)
        self._args = (partial(generation_engine, config, base, stop), partial(load_tokenizer, base))

    def spawn(self, name: str) -> GeneratorClient:
        """Make a generator that is not started."""
        return GeneratorClient(self._spawner.spawn_one(Generator, name, *self._args))

    async def start(self, name: str) -> GeneratorClient:
        """Make and start a generator on a slot of its own."""
        await self._spawner.place_one(self._demand, int(name.rpartition("-")[2]))
        generator = self.spawn(name)
        try:
            await self.load(generator)
        except BaseException:  # cancelled, too: the pool may have shrunk meanwhile
            await self.end(generator)
            raise
        return generator

    async def load(self, generator: GeneratorClient) -> None:
        """Load the base of a generator that `spawn` made."""
        await generator.worker.call(GeneratorProcess.start)

    async def end(self, generator: GeneratorClient) -> None:
        """End a generator's process."""
        await self._spawner.end_one(generator.worker)

    def request_capacity(self, num: int) -> None:
        """Request capacity for ``num`` generators beside the other roles."""
        self._spawner.request_generators(num)


def spawn_generators(
    spawner: RoleSpawner,
    config: Config,
    base: str,
    say: Callable[[str], None],
    autoscale: AutoscaleConfig | None = None,
) -> GeneratorPool[GeneratorClient]:
    """Make the pool of generators over a base model, not started; ``autoscale`` may resize it."""
    factory = GeneratorFactory(spawner, config, base)
    first = [factory.spawn(f"generator-{i}") for i in range(config.generators.num)]
    return GeneratorPool(
        first,
        factory,
        publish_to,
        config.generators,
        autoscale,
        say,
        outages=spawner.outages,
        waits_for_shards=config.num_adapters == 1,
    )
