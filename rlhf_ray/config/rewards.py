"""Where PPO's rewards come from: a list of sources, added up by weight."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.section import (
    Section,
    changeable,
    fixed,
    has_user_info,
    refuse_owned,
    refuse_secrets,
)


class SourceConfig(Section):
    """What every source has: how its raw score becomes its part of the reward.

    part = weight x clip((raw - baseline) / deviation), where the deviation is 1 unless scaled.
    """

    name: str = fixed(
        "", pattern=r"^[\w.-]+$", description="Its name in metrics; default: its type."
    )
    weight: float = fixed(1.0, unit="–", description="Its factor in the sum; negative: a penalty.")
    baseline: float = fixed(0.0, unit="score", description="Subtracted from the raw score.")
    scale: Literal["none", "running"] = fixed(
        "none", description="running: divide by the deviation of all raw scores of the run so far."
    )
    clip: float | None = fixed(
        None, unit="deviations", gt=0, description="Limit of |score| after scaling; none: no limit."
    )
    on_bad_score: Literal["error", "skip"] = fixed(
        "error", description="A score that is NaN or infinite: end the run, or count it as missing."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_by_type(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" not in values:
            return {**values, "name": values.get("type", "model")}
        return values


class ModelSourceConfig(SourceConfig):
    """A reward model: a sequence-classification model with one label."""

    type: Literal["model"] = fixed("model", description="Kind of source.")
    path: str | None = fixed(
        None,
        description="Folder or hub name; none: the run's (reward.path, or the stage reward's).",
    )


class ClassifierSourceConfig(SourceConfig):
    """A text-classification model: the logit of one label."""

    type: Literal["classifier"] = fixed(..., description="Kind of source.")
    path: str = fixed(..., description="Folder or hub name of a text-classification model.")
    label: str = fixed(
        "POSITIVE", description="Label whose logit is the score, in any case of letters."
    )
    reads: Literal["conversation", "response"] = fixed(
        "conversation", description="Its input: prompt and response, or the response alone."
    )
    batch_size: int = changeable(16, unit="texts", ge=1, description="Texts of one forward pass.")


class RougeSourceConfig(SourceConfig):
    """Overlap with a reference text: ROUGE's F1, in [0, 1]."""

    type: Literal["rouge"] = fixed(..., description="Kind of source.")
    variant: Literal["rouge1", "rouge2", "rougeL"] = fixed(
        "rougeL", description="Words, pairs of words, or the longest common subsequence."
    )
    column: str = fixed(
        "reference",
        description="Column of the prompts with the reference text, or a list of them (the best "
        "counts).",
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
        "label", description="Column that the openrlhf signature gets as labels."
    )


class EndpointConfig(Section):
    """An HTTP service, how long to wait for it and how often to ask again."""

    url: str = changeable(..., pattern=r"^https?://", description="Its address.")
    api_key_env: str | None = changeable(
        None,
        description="Environment variable with a key, sent as a bearer token; export it: in "
        "cluster.env the key would be written to run.dir.",
    )
    concurrency: int = changeable(
        16, unit="requests", ge=1, description="Requests under way at a time."
    )
    timeout_s: float = changeable(
        60.0, unit="seconds", gt=0, description="Deadline of one request, seconds."
    )
    retries: int = changeable(
        3,
        unit="attempts",
        ge=0,
        description="Further attempts after time-outs, lost connections, 429 and 5xx.",
    )
    retry_wait_s: float = changeable(
        1.0,
        unit="seconds",
        gt=0,
        le=30,
        description="Wait before the first of them, seconds; doubles up to 30.",
    )

    @field_validator("url")
    @classmethod
    def _without_login(cls, url: str) -> str:
        if has_user_info(url):
            raise ValueError(
                "holds a login, and the config is written to run.dir; name an environment variable "
                "with the key in api_key_env instead"
            )
        return url

    @property
    def longest_request_s(self) -> float:
        """What one request may take in all, in seconds: attempts and the waits between them."""
        waits = (min(self.retry_wait_s * 2**attempt, 30.0) for attempt in range(self.retries))
        return (self.retries + 1) * self.timeout_s + sum(waits)


class ChatEndpointConfig(EndpointConfig):
    """An OpenAI-compatible chat endpoint with a model that judges."""

    url: str = changeable(
        ..., pattern=r"^https?://", description="Base URL, for example http://localhost:8000/v1."
    )
    api_key_env: str | None = changeable(
        "OPENAI_API_KEY",
        description="Environment variable with the API key; without a value no key is sent. "
        "Export it: in cluster.env the key would be written to run.dir.",
    )
    model: str = fixed(..., min_length=1, description="Name of the model there.")
    system: str | None = fixed(None, description="System message; none: left out.")
    temperature: float | None = fixed(
        0.0, unit="–", ge=0, description="Sampling temperature of the judge; none: not sent."
    )
    max_tokens: int | None = fixed(
        512, unit="tokens", ge=1, description="Longest answer of the judge, tokens; none: not sent."
    )
    request: dict[str, Any] = fixed({}, description="Further fields of each request's body.")

    @field_validator("request")
    @classmethod
    def _own_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        owned = {key: key for key in ("model", "temperature", "max_tokens")}
        refuse_owned("request", given, owned | {"messages": "template", "stream": "nothing"})
        remedy = "name an environment variable with the key in api_key_env"
        return refuse_secrets("request", given, remedy)


class JudgeSourceConfig(SourceConfig, ChatEndpointConfig):
    """A language model that rates each response by a number."""

    type: Literal["judge"] = fixed(..., description="Kind of source.")
    template: str = fixed(
        "Rate how well the response answers the prompt, from {lowest} (useless) to "
        "{highest} (perfect). End with one line of the form `Rating: NUMBER`.\n\n"
        "<prompt>\n{prompt}\n</prompt>\n\n<response>\n{response}\n</response>",
        description="What the judge is asked; {prompt}, {response}, {lowest} and {highest} are "
        "filled in, as is {NAME} for a column NAME of the prompts.",
    )
    pattern: str = fixed(
        r"(?i)rating(?:\W*\d[\d.]*\s*(?:-|–|to)\s*-?\d[\d.]*\W*?[:=)\]])?+"
        r"\W*?(-?\d+(?:\.\d+)?)",
        description="Regular expression with one group: the number; its last match counts.",
    )
    lowest: float = fixed(1.0, unit="score", description="Lowest number that is an answer.")
    highest: float = fixed(10.0, unit="score", description="Highest number that is an answer.")
    on_bad_answer: Literal["skip", "error", "score"] = fixed(
        "skip",
        description="An answer without a number in range: count the score as missing, end the run, "
        "or take bad_answer_score.",
    )
    bad_answer_score: float | None = fixed(
        None, unit="score", description="Raw score of a bad answer, where on_bad_answer is score."
    )

    @field_validator("template")
    @classmethod
    def _shows_the_response(cls, template: str) -> str:
        if "{response}" not in template:
            raise ValueError("lacks {response}: the judge would not see what it rates")
        return template

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        return require_one_group(pattern)

    @model_validator(mode="after")
    def _bad_answers(self) -> "JudgeSourceConfig":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest:g} must be below highest {self.highest:g}")
        if (self.on_bad_answer == "score") != (self.bad_answer_score is not None):
            raise ValueError(
                "bad_answer_score is for on_bad_answer score and needed there; set both or neither"
            )
        return self


class PairJudgeConfig(ChatEndpointConfig):
    """A language model that says which of two answers is better: labels for a stage on pairs."""

    template: str = fixed(
        "Which response answers the prompt better? Weigh them in a few sentences, then end "
        "with one line: `Better: A` or `Better: B`.\n\n<prompt>\n{prompt}\n</prompt>\n\n"
        "<response A>\n{a}\n</response A>\n\n<response B>\n{b}\n</response B>",
        description="What the judge is asked; {prompt}, {a} and {b} are filled in.",
    )
    pattern: str = fixed(
        r"(?i)better\W*\b([AB])\b",
        description="Regular expression with one group: A or B; its last match counts.",
    )
    both_orders: bool = fixed(
        True,
        description="Ask twice, with the answers swapped, and drop a pair whose verdict follows "
        "the order: judges prefer a place.",
    )
    on_bad_answer: Literal["skip", "error"] = fixed(
        "skip", description="An answer without A or B: count the pair as bad, or stop."
    )

    @field_validator("template")
    @classmethod
    def _shows_both(cls, template: str) -> str:
        missing = [name for name in ("{a}", "{b}") if name not in template]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}: the judge would not see both answers")
        return template

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        return require_one_group(pattern)


class RemoteSourceConfig(SourceConfig, EndpointConfig):
    """A reward server that speaks OpenRLHF's protocol."""

    type: Literal["remote"] = fixed(..., description="Kind of source.")
    batch_size: int = changeable(32, unit="texts", ge=1, description="Responses of one request.")
    label_column: str = fixed("label", description="Column that is sent as labels.")


RewardSourceConfig = Annotated[
    ModelSourceConfig
    | ClassifierSourceConfig
    | RougeSourceConfig
    | FunctionSourceConfig
    | JudgeSourceConfig
    | RemoteSourceConfig,
    Field(discriminator="type"),
]


def require_one_group(pattern: str) -> str:
    """The pattern, if it is a regular expression with one group.

    Raises:
        ValueError: it is not.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; it needs one, around the answer")
    return pattern


def refuse_equal_names(sources: list[RewardSourceConfig]) -> list[RewardSourceConfig]:
    """The sources, if metrics can tell them apart.

    Raises:
        ValueError: two have the same name.
    """
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two sources are called {', '.join(twice)}; give each a name of its own")
    return sources


def refuse_slow(name: str, endpoint: EndpointConfig, call_timeout_s: float) -> None:
    """A service that stays down must be named by its own error, not by its role's deadline.

    Raises:
        ValueError: one request may take longer than that deadline.
    """
    if endpoint.longest_request_s >= call_timeout_s:
        raise ValueError(
            f"{name} may take {endpoint.longest_request_s:g} s for a request (timeout_s "
            f"{endpoint.timeout_s:g}, retries {endpoint.retries}, retry_wait_s "
            f"{endpoint.retry_wait_s:g}), and cluster.call_timeout_s is {call_timeout_s:g}; lower "
            "these or raise that"
        )
