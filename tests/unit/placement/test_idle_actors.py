"""Actors that wait between two stages."""

from functools import partial

from rlhf_ray.config import resolve
from rlhf_ray.placement.idle_actors import IdleActors

VALUES = {"ppo": {"iterations": 3}}


def made(**keys: object) -> tuple[type, tuple[object, ...]]:
    """A class and its arguments, as each stage builds them anew."""
    return str, (partial(print, resolve(VALUES | keys), "base"), (1, 2))


def test_an_actor_is_taken_once_by_what_was_made_alike() -> None:
    idle = IdleActors()
    idle.add("generator-0", made(), "actor")
    assert idle.take("generator-1", made())[0] is None
    assert idle.take("generator-0", made()) == ("actor", True)
    assert idle.take("generator-0", made())[0] is None


def test_an_actor_of_another_config_is_given_out_to_be_ended() -> None:
    idle = IdleActors()
    idle.add("generator-0", made(), "actor")
    assert idle.take("generator-0", made(rollout={"temperature": 0.5})) == ("actor", False)
    idle.add("reward-0", made(), "actor")
    idle.clear()
    assert idle.take("reward-0", made())[0] is None
