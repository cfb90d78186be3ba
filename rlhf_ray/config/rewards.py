"""The sources of PPO's reward, a weighted sum, and the language models that judge answers."""

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rlhf_ray.config.cluster import ClusterConfig
from rlhf_ray.config.section import (
    PassThrough,
    Section,
    adjustable,
    changeable,
    duplicates,
    fixed,
    has_user_info,
    is_mapping,
    refuse_owned,
    refuse_secrets,
    require_host,
)
from rlhf_ray.secrecy import holds_secret


def _require_one_group(pattern: str) -> str:
    """Return a pattern that is a regular expression with one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(
            f"{pattern!r} has {groups} groups; it needs exactly one, around the answer"
        )
    return pattern


OneGroup = Annotated[str, AfterValidator(_require_one_group)]


class SourceConfig(Section):
    """Keys of every source: how its raw score becomes its part of the reward.

    part = weight x clip((raw - baseline) / deviation), where the deviation is 1 unless scaled.
    """

    name: str = fixed("", pattern=r"^[\w.-]+$", description="Name in metrics; default: the type.")
    weight: float = adjustable(
        1.0, unit="–", description="Factor in the sum; negative for a penalty."
    )
    baseline: float = fixed(0.0, unit="score", description="Subtracted from the raw score.")
    scale: Literal["none", "running"] = adjustable(
        "none",
        description="running: divide by the standard deviation of the run's raw scores so far.",
    )
    clip: float | None = adjustable(
        None, unit="deviations", gt=0, description="Largest |score| after scaling; none: no limit."
    )
    on_bad_score: Literal["error", "skip"] = adjustable(
        "error",
        description="Response to a score that is NaN or infinite, and to a response that a reward "
        "server refuses: end the run, or count it as missing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named_by_type(cls, values: object) -> object:
        if is_mapping(values) and "name" not in values:
            return {**values, "name": values.get("type", "model")}
        return values


class ModelSourceConfig(SourceConfig):
    """A reward model: a sequence-classification model with one label."""

    type: Literal["model"] = fixed("model", description="Kind of source.")
    path: str | None = fixed(
        None,
        description="Folder or hub name; none: the run's reward model (reward.path or the "
        "stage's).",
    )


class ClassifierSourceConfig(SourceConfig):
    """A text-classification model; the score is the logit of one label."""

    type: Literal["classifier"] = fixed(..., description="Kind of source.")
    path: str = fixed(..., description="Folder or hub name of a text-classification model.")
    label: str = fixed(
        "POSITIVE", description="Label whose logit is the score; upper and lower case are equal."
    )
    reads: Literal["conversation", "response"] = fixed(
        "conversation", description="Input: prompt and response, or only the response."
    )
    batch_size: int = changeable(16, unit="texts", ge=1, description="Texts of a forward pass.")


class RougeSourceConfig(SourceConfig):
    """Overlap with a reference text: ROUGE's F1, in [0, 1]."""

    type: Literal["rouge"] = fixed(..., description="Kind of source.")
    variant: Literal["rouge1", "rouge2", "rougeL"] = fixed(
        "rougeL", description="Words, word pairs, or the longest common subsequence."
    )
    column: str = fixed(
        "reference",
        description="Column of the prompts with the reference text, or with a list of them, of "
        "which the best match counts.",
    )


class FunctionSourceConfig(SourceConfig):
    """A Python function of yours."""

    type: Literal["function"] = fixed(..., description="Kind of source.")
    function: str = fixed(
        ..., pattern=r"^.+:\w+$", description="module:name, or path/to/file.py:name; sync or async."
    )
    signature: Literal["trl", "verl", "openrlhf"] = fixed(
        "trl",
        description="trl: f(prompts, completions, **columns); verl: compute_score(data_source, "
        "solution_str, ground_truth, extra_info); openrlhf: reward_func(queries, prompts, labels).",
    )
    label_column: str = fixed(
        "label", description="Column passed as labels with signature openrlhf."
    )
    timeout_s: float = changeable(
        60.0,
        unit="seconds",
        gt=0,
        description="Deadline of a call. A call for several responses that misses it is repeated "
        "for each alone; the score of a response that misses it alone is missing.",
    )
    in_process: bool = changeable(
        False,
        description="Call the function in a thread of the scorer, without deadline, instead of in "
        "a process of its own: for debuggers, and functions that share memory.",
    )


class EndpointConfig(Section):
    """An HTTP service, its timeouts and retries."""

    url: str = changeable(..., pattern=r"^https?://", description="URL of the service.")
    api_key_env: str | None = changeable(
        None,
        description="Environment variable with a key, sent as a bearer token. Export it: "
        "cluster.env is written to run.dir.",
    )
    concurrency: int = changeable(16, unit="requests", ge=1, description="Most requests in flight.")
    timeout_s: float = changeable(60.0, unit="seconds", gt=0, description="Deadline of a request.")
    retries: int = changeable(
        3,
        unit="attempts",
        ge=0,
        description="More attempts after timeouts, lost connections, 429, 5xx, and answers that "
        "report an error or hold nothing.",
    )
    retry_wait_s: float = changeable(
        1.0,
        unit="seconds",
        gt=0,
        le=30,
        description="Wait before the first retry; doubles with each, up to 30. Longer where the "
        "service asks for it (Retry-After), up to 300.",
    )

    @field_validator("url")
    @classmethod
    def _without_login(cls, url: str) -> str:
        if has_user_info(url) or holds_secret(url):
            raise ValueError(
                "holds a login or key, and the config is written to run.dir; put the key in an "
                "environment variable and name that in api_key_env"
            )
        return require_host(url)

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, name: str | None) -> str | None:
        if name and not (re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) or name in os.environ):
            raise ValueError(
                "must be the name of an environment variable, in capitals, not the key itself: "
                "export MY_KEY=..., and set api_key_env: MY_KEY"
            )
        return name

    @property
    def longest_request_s(self) -> float:
        """Longest time of a request in seconds, all attempts and the waits between them."""
        waits = (min(self.retry_wait_s * 2**attempt, 30.0) for attempt in range(self.retries))
        return (self.retries + 1) * self.timeout_s + sum(waits)


class ChatEndpointConfig(EndpointConfig):
    """An OpenAI-compatible chat endpoint with a model that judges."""

    url: str = changeable(
        ..., pattern=r"^https?://", description="Base URL, for example http://localhost:8000/v1."
    )
    api_key_env: str | None = changeable(
        "OPENAI_API_KEY",
        description="Environment variable with the API key; if it is empty, no key is sent. "
        "Export it: cluster.env is written to run.dir.",
    )
    model: str = fixed(..., min_length=1, description="Name of the model at the endpoint.")
    system: str | None = fixed(None, description="System message; none: no system message.")
    temperature: float | None = fixed(
        0.0, unit="–", ge=0, description="Sampling temperature of the judge; none: not sent."
    )
    max_tokens: int | None = fixed(
        512, unit="tokens", ge=1, description="Longest answer of the judge; none: not sent."
    )
    request: PassThrough = fixed({}, description="More fields for the body of each request.")

    @field_validator("request")
    @classmethod
    def _own_keys(cls, given: PassThrough) -> PassThrough:
        owned = {key: key for key in ("model", "temperature", "max_tokens")}
        refuse_owned("request", given, owned | {"messages": "template", "stream": "nothing"})
        remedy = "name an environment variable with the key in api_key_env"
        return refuse_secrets("request", given, remedy)


class JudgeSourceConfig(SourceConfig, ChatEndpointConfig):
    """A language model that rates each response with a number."""

    type: Literal["judge"] = fixed(..., description="Kind of source.")
    template: str = adjustable(
        "Rate how well the response answers the prompt, from {lowest} (useless) to "
        "{highest} (perfect). End with one line of the form `Rating: NUMBER`.\n\n"
        "<prompt>\n{prompt}\n</prompt>\n\n<response>\n{response}\n</response>",
        description="Message to the judge; {prompt}, {response}, {lowest} and {highest} are "
        "filled in, as is {NAME} for a column NAME of the prompts.",
    )
    pattern: OneGroup = adjustable(
        r"(?i)rating(?:\W*\d[\d.]*\s*(?:-|–|to)\s*-?\d[\d.]*\W*?[:=)\]])?+"
        r"\W*?(-?\d+(?:\.\d+)?)",
        description="Regular expression with one group: the number; its last match counts.",
    )
    lowest: float = fixed(1.0, unit="score", description="Lowest valid rating.")
    highest: float = fixed(10.0, unit="score", description="Highest valid rating.")
    on_bad_answer: Literal["skip", "error", "score"] = adjustable(
        "skip",
        description="Response to an answer without a rating in range: count the score as missing, "
        "end the run, or use bad_answer_score.",
    )
    bad_answer_score: float | None = adjustable(
        None, unit="score", description="Raw score of a bad answer, with on_bad_answer score."
    )

    @field_validator("template")
    @classmethod
    def _shows_the_response(cls, template: str) -> str:
        if "{response}" not in template:
            raise ValueError(
                "lacks {response}, without which the judge cannot see the response; add it"
            )
        return template

    @model_validator(mode="after")
    def _bad_answers(self) -> "JudgeSourceConfig":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest:g} must be less than highest {self.highest:g}")
        if (self.on_bad_answer == "score") != (self.bad_answer_score is not None):
            raise ValueError(
                "on_bad_answer score and bad_answer_score need each other; set both or neither"
            )
        return self


class PairJudgeConfig(ChatEndpointConfig):
    """A language model that says which of two answers is better."""

    template: str = fixed(
        "Which response answers the prompt better? Weigh them in a few sentences, then end "
        "with one line: `Better: A` or `Better: B`.\n\n<prompt>\n{prompt}\n</prompt>\n\n"
        "<response A>\n{a}\n</response A>\n\n<response B>\n{b}\n</response B>",
        description="Message to the judge; {prompt}, {a} and {b} are filled in, as is {NAME} for "
        "a column NAME of the pairs.",
    )
    pattern: OneGroup = fixed(
        r"(?i)better\W*\b([AB])\b",
        description="Regular expression with one group: A or B; its last match counts.",
    )
    both_orders: bool = fixed(
        True,
        description="Ask twice, with the answers swapped, and drop a pair whose verdict depends "
        "on the order, because judges are biased towards a position.",
    )
    on_bad_answer: Literal["skip", "error"] = fixed(
        "skip", description="Response to an answer without A or B: count the pair as bad, or stop."
    )

    @field_validator("template")
    @classmethod
    def _shows_both(cls, template: str) -> str:
        missing = [name for name in ("{a}", "{b}") if name not in template]
        if missing:
            raise ValueError(
                f"lacks {', '.join(missing)}, so the judge cannot see both answers; add it"
            )
        return template


class RemoteSourceConfig(SourceConfig, EndpointConfig):
    """A reward server that speaks OpenRLHF's protocol."""

    type: Literal["remote"] = fixed(..., description="Kind of source.")
    batch_size: int = changeable(32, unit="texts", ge=1, description="Responses in a request.")
    label_column: str = fixed("label", description="Column to send as labels.")


RewardSourceConfig = Annotated[
    ModelSourceConfig
    | ClassifierSourceConfig
    | RougeSourceConfig
    | FunctionSourceConfig
    | JudgeSourceConfig
    | RemoteSourceConfig,
    Field(discriminator="type"),
]


def refuse_equal_names(sources: list[RewardSourceConfig]) -> list[RewardSourceConfig]:
    """Return sources that all have different names, which metrics need."""
    if repeated := duplicates([source.name for source in sources]):
        raise ValueError(f"has several sources named {repeated}; give each a different name")
    return sources


def refuse_slow(name: str, endpoint: EndpointConfig, cluster: ClusterConfig) -> None:
    """Refuse an endpoint whose retries outlast what a source has of a call to its scorer.

    Else a service that is down would show as a late role, not as its own error.
    """
    longest_s, part_s = endpoint.longest_request_s, cluster.source_timeout_s
    if longest_s >= part_s:
        raise ValueError(
            f"{name}: a request may take {longest_s:g} s (timeout_s {endpoint.timeout_s:g}, "
            f"retries {endpoint.retries}, retry_wait_s {endpoint.retry_wait_s:g}), but a source "
            f"may stand still for {part_s:g} s, because cluster.call_timeout_s is "
            f"{cluster.call_timeout_s:g} s; lower the former or raise the latter"
        )
