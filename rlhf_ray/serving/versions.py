"""Answers of a run's versions to one question, for the page of `rlhf-ray chat --page`."""

from collections.abc import Sequence
from threading import Lock

from rlhf_ray.config import Config
from rlhf_ray.data.reading.chats import Message
from rlhf_ray.driver.checkpoint import kept_versions
from rlhf_ray.errors import DataError
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import find_model
from rlhf_ray.serving.chat import fitting
from rlhf_ray.serving.text_generation import Generators


class Versions:
    """The versions that a run keeps; they answer one at a time, from one base."""

    def __init__(
        self,
        config: Config,
        models: Sequence[str],
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """
        Args:
            config: the run's.
            models: names as in `find_model`, which are always shown.
            temperature: of sampling; None: rollout.temperature.
            max_tokens: longest answer; None: rollout.max_tokens.

        Raises:
            DataError: a model is missing, or cannot be loaded.
        """
        self.models = list(models)
        self.seed = config.run.seed
        self._config = config
        self._limit = config.model.max_length - (max_tokens or config.rollout.max_tokens)
        self._generators = Generators(config, temperature=temperature, max_tokens=max_tokens)
        self._one_at_a_time = Lock()
        # What cannot be loaded is refused before the page is there.
        for model in models or ["ppo"]:
            self._generators.of(find_model(config, model))

    def kept(self) -> list[int]:
        """Return the versions that are kept now, in order; a run that goes on makes more.

        Raises:
            DataError: the run's folder is gone.
        """
        run = RunFolder(self._config).path
        if not run.is_dir():
            raise DataError(f"{run} was moved or deleted; give its folder to rlhf-ray chat again")
        return kept_versions(run / "checkpoints")

    def answer(self, model: str, question: str, seed: int) -> str:
        """Return a model's answer; the same seed and model give the same one.

        Raises:
            DataError: the version or the run is gone, or the question is too long.
        """
        self.kept()
        with self._one_at_a_time:
            generator = self._generators.of(find_model(self._config, model))
            messages: list[Message] = [{"role": "user", "content": question}]
            ids, _ = fitting(self._config, generator.tokenizer, messages, self._limit)
            return generator.answer(ids, seed)
