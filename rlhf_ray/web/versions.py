"""The page of `rlhf-ray chat --page`: one question, answered by any version of a run."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.secrecy import printable
from rlhf_ray.web.server import page

LONGEST_QUESTION = 100_000
"""Characters of a question."""
MOST_SEED = 2**32 - 1


class Answers(Protocol):
    """The versions of a run, and what they answer."""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models that are always shown."""
        ...

    @property
    def seed(self) -> int:
        """The seed that the page begins with."""
        ...

    def kept(self) -> Sequence[int]:
        """Return the versions that are kept now, in order."""
        ...

    def answer(self, model: str, question: str, seed: int) -> str:
        """Return a model's answer; raises an RlhfError that says why there is none."""
        ...


class VersionPages:
    """Shows answers beside each other, and those of all versions by a slider."""

    def __init__(self, run: str, answers: Answers) -> None:
        """
        Args:
            run: name of the run.
            answers: of its versions.
        """
        self._run, self._answers = run, answers

    def routes(self) -> list[Route]:
        """Return the routes of the page and of what its script asks for."""
        return [Route("/", self._page), Route("/answer", self._answer, methods=["POST"])]

    async def _page(self, request: Request) -> Response:
        return page(
            request,
            "versions.html.j2",
            run=self._run,
            models=self._answers.models,
            kept=self._answers.kept(),
            seed=self._answers.seed,
        )

    async def _answer(self, request: Request) -> Response:
        try:
            asked = await request.json()
        except (ValueError, RecursionError):
            return JSONResponse({"error": "The request is no JSON"}, 400)
        try:
            answer = await run_in_threadpool(partial(self._answers.answer, *_asked(asked)))
        except (RlhfError, OSError) as error:
            return JSONResponse({"error": printable(str(error))}, 400)
        return JSONResponse({"answer": printable(answer)})


def _asked(values: object) -> tuple[str, str, int]:
    """Return model, question and seed of a request.

    Raises:
        ConfigError: one of them is missing, or of another kind.
    """
    match values:
        case {"model": str(model), "question": str(question), "seed": int(seed)}:
            if not question.strip():
                raise ConfigError("The question is empty; type one")
            if len(question) > LONGEST_QUESTION:
                raise ConfigError(f"The question has more than {LONGEST_QUESTION} characters")
            if not 0 <= seed <= MOST_SEED:
                raise ConfigError(f"The seed {seed} is not between 0 and {MOST_SEED}")
            # Only the run's own models: a path would load whatever stands there.
            if model.partition("@")[0] not in ("ppo", "sft", "dpo"):
                raise ConfigError(f"{model!r} is no model of the run")
            return model, question, seed
        case _:
            raise ConfigError("A request has a model, a question and a seed")
