"""Generators whose processes start and end one by one."""

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
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stopping import stop_token_ids
from rlhf_ray.placement.layout import demands


class GeneratorFactory:
    """Generators over a base model; `cluster.generator_pool.Factory`."""

    def __init__(self, spawner: RoleSpawner, config: Config, base: str) -> None:
        self._spawner = spawner
        self._demand = next(d for d in demands(config) if d.role == "generator")
        stop = stop_token_ids(base, config.template)
        self._args = (
            partial(generation_engine, config, base, stop),
            partial(load_tokenizer, base),
        )

    def spawn(self, name: str) -> GeneratorClient:
        """One that is not started."""
        return GeneratorClient(self._spawner.spawn_one(Generator, name, *self._args))

    async def start(self, name: str) -> GeneratorClient:
        """One that is, in a place of its own."""
        await self._spawner.place_one(self._demand, int(name.rpartition("-")[2]))
        generator = self.spawn(name)
        try:
            await generator.worker.call("start")
        except BaseException:  # also where it is not wanted any more
            await self.end(generator)
            raise
        return generator

    async def end(self, generator: GeneratorClient) -> None:
        """End its process."""
        await self._spawner.end_one(generator.worker)

    def make_room(self, num: int) -> None:
        """Ask Ray for room for ``num`` generators besides everybody else."""
        self._spawner.make_room(num)


def spawn_generators(
    spawner: RoleSpawner,
    config: Config,
    base: str,
    tell: Callable[[str], None],
    autoscale: AutoscaleConfig | None = None,
) -> GeneratorPool[GeneratorClient]:
    """Generators over a base model, not started; their number changes as ``autoscale`` says."""
    factory = GeneratorFactory(spawner, config, base)
    first = [factory.spawn(f"generator-{i}") for i in range(config.generators.num)]
    return GeneratorPool(first, factory, publish_to, config.generators, autoscale, tell)
