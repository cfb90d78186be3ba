"""What a row of a data set means: TRL's column names, and the layouts of other systems.

Whatever the format, a row comes out as `rlhf_ray.data.reading.rows` describes it. One row may give
several (a question with its answers), or none.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.config.data import Format
from rlhf_ray.data import template
from rlhf_ray.data.reading import hub_layouts
from rlhf_ray.data.reading.chats import (
    Message,
    PromptLike,
    common_messages,
    common_text,
    is_chat,
    parse_messages,
    parse_prompt,
    split_last_answer,
)
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.pairing import pairs_by_prompt
from rlhf_ray.data.reading.rows import Row, parse_bool, require_text
from rlhf_ray.errors import DataError

Use = Literal["pretrain", "sft", "preferences", "ratings", "prompts"]
"""What the rows are for."""

_COLUMNS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "verl": (("data_source", "prompt", "reward_model"),),
    "stack_exchange": (("question", "response_j", "response_k"), ("question", "answers")),
    "preference": (("chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"), ("question", "completion", "label")),
    "prompt_completion": (
        ("prompt", "completion"),
        ("question", "completion"),
        ("prompt",),
        ("question",),
    ),
    "messages": (("messages",),),
    "text": (("text",),),
}
"""Format -> the sets of columns that it is told by, in the order in which `auto` tries them."""

_READABLE: Mapping[Use, tuple[str, ...]] = {
    "pretrain": tuple(name for name in _COLUMNS if name != "verl"),
    "sft": tuple(name for name in _COLUMNS if name != "verl"),
    "preferences": ("stack_exchange", "preference", "unpaired"),
    "ratings": ("stack_exchange", "unpaired", "prompt_completion"),
    "prompts": tuple(name for name in _COLUMNS if name != "text"),
}


@dataclass(frozen=True)
class Reading:
    """What is read, and how.

    Attributes:
        name: the data set, for messages.
        use: what the rows are for.
        max_pairs: most pairs of one question.
        seed: of the draw among more pairs.
    """

    name: str
    use: Use
    max_pairs: int
    seed: int

    @property
    def needs_answer(self) -> bool:
        """Whether a prompt alone is of no use."""
        return self.use in ("pretrain", "sft", "ratings")


def tell(columns: Collection[str], asked: Format, reading: Reading) -> str:
    """The format of rows with these columns.

    Args:
        columns: names in the first row, after renaming.
        asked: what the config says.
        reading: what the rows are for.

    Raises:
        DataError: columns are missing, or the format is of no use here.
    """
    there = set(columns)
    fitting = [
        name
        for name, choices in _COLUMNS.items()
        if asked in ("auto", name) and any(there.issuperset(choice) for choice in choices)
    ]
    usable = [name for name in fitting if name in _READABLE[reading.use]]
    if usable:
        return usable[0]
    wanted = [name for name in _READABLE[reading.use] if asked in ("auto", name)]
    if not wanted:
        raise DataError(
            f"{reading.name}: format {asked} is of no use for {reading.use}; give one of "
            f"{', '.join(_READABLE[reading.use])}"
        )
    known = "; ".join(
        f"{name} ({' or '.join(', '.join(choice) for choice in _COLUMNS[name])})" for name in wanted
    )
    raise DataError(
        f"{reading.name} lacks the columns of every format that {reading.use} can use: {known}. "
        f"Found {', '.join(columns)}. Name them in the data set's columns, for example columns: "
        "{prompt: <its name>}"
    )


def convert(rows: Iterable[Row], form: str, reading: Reading) -> Iterator[Row]:
    """Rows of one format as ours; a row that cannot be used comes out as ``{"_bad": reason}``.

    Args:
        rows: as read, columns renamed.
        form: from `tell`.
        reading: what they are for.
    """
    if form == "unpaired" and reading.use == "preferences":
        yield from pairs_by_prompt(_each(rows, _labelled, reading), reading.max_pairs, reading.seed)
    else:
        yield from _each(rows, _CONVERTERS[form], reading)


def _each(
    rows: Iterable[Row], converter: Callable[[Row, Reading], Iterable[Row]], reading: Reading
) -> Iterator[Row]:
    for row in rows:
        try:
            yield from converter(row, reading)
        except BadRow as bad:
            yield {"_bad": bad.reason, "_why": bad.why}


def _text(row: Row, reading: Reading) -> Iterator[Row]:
    yield {**row, "text": require_text(row, "text")}


def _messages(row: Row, reading: Reading) -> Iterator[Row]:
    turns, answer = split_last_answer(parse_messages(row["messages"]))
    yield _row(_without(row, "messages"), turns, _answer(answer, reading))


def _completed(row: Row, reading: Reading) -> Iterator[Row]:
    prompt, answer = _prompt(row), row.get("completion")
    if is_chat(answer):
        before, answer = split_last_answer(parse_messages(answer))
        prompt = [*_turns(prompt), *before] if before else prompt
    yield _row(_without(row, "prompt", "completion"), prompt, _answer(answer, reading))


def _labelled(row: Row, reading: Reading) -> Iterator[Row]:
    label = parse_bool(row["label"])
    if label is None:
        raise BadRow("no_label", "the label is neither true nor false")
    for found in _completed({**row, "label": label}, reading):
        if "completion" not in found and reading.use != "prompts":
            raise BadRow("no_answer", "a prompt without an answer")
        yield found


def _unpaired(row: Row, reading: Reading) -> Iterator[Row]:
    for found in _labelled(row, reading):
        is_example = found["label"] or reading.use in ("ratings", "prompts")
        yield found if is_example else {"_unused": "label_false"}


def _preference(row: Row, reading: Reading) -> Iterator[Row]:
    chosen, rejected = row["chosen"], row["rejected"]
    explicit = _prompt(row) if row.get("prompt") or row.get("question") else None
    if is_chat(chosen) and is_chat(rejected):
        prompt, chosen, rejected = _chat_pair(
            explicit, parse_messages(chosen), parse_messages(rejected)
        )
    else:
        chosen, rejected = require_text(row, "chosen"), require_text(row, "rejected")
        prompt = explicit
        if prompt is None:
            prompt = common_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRow("no_prompt", "no column prompt, and chosen and rejected begin differently")
    rest = _without(row, "prompt", "chosen", "rejected")
    if reading.needs_answer:
        yield _row(rest, prompt, chosen)
    else:
        yield {**_row(rest, prompt, None), "chosen": chosen, "rejected": rejected}


def _chat_pair(
    explicit: PromptLike | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], str, str]:
    """Prompt and both answers of two chats; what they begin with in common is the prompt."""
    shared = common_messages(chosen, rejected)
    if len(shared) == min(len(chosen), len(rejected)):
        raise BadRow("equal" if chosen == rejected else "no_answer")
    given = _turns(explicit) if explicit is not None else []
    prompt = shared if shared[: len(given)] == given else [*given, *shared]
    answers = [turns[len(shared) :] for turns in (chosen, rejected)]
    if any(len(turns) != 1 or turns[0]["role"] != "assistant" for turns in answers):
        raise BadRow("several_turns", "chosen and rejected must differ in the last answer alone")
    return prompt, answers[0][0]["content"], answers[1][0]["content"]


def _stack_exchange(row: Row, reading: Reading) -> Iterator[Row]:
    yield from hub_layouts.rows(row, reading.use, reading.max_pairs, reading.seed)


_CONVERTERS: Mapping[str, Callable[[Row, Reading], Iterable[Row]]] = {
    "text": _text,
    "messages": _messages,
    "prompt_completion": _completed,
    "preference": _preference,
    "unpaired": _unpaired,
    "stack_exchange": _stack_exchange,
    "verl": _completed,
}


def _prompt(row: Row) -> PromptLike:
    """The prompt's cell; a bare question gets the plain layout."""
    if row.get("prompt") is None and "question" in row:
        return template.prompt(require_text(row, "question"))
    return parse_prompt(row.get("prompt"))


def _turns(prompt: PromptLike) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _answer(value: Any, reading: Reading) -> str | None:
    """The answer's text; None where there is none and none is needed."""
    if isinstance(value, str) and value.strip():
        return value
    if reading.needs_answer:
        raise BadRow("no_answer", "a prompt without an answer")
    return None


def _row(rest: Row, prompt: PromptLike, completion: str | None) -> dict[str, Any]:
    """A row with its prompt as text or as messages."""
    if not prompt:
        raise BadRow("no_prompt", "an answer without a prompt")
    answer = {} if completion is None else {"completion": completion}
    return {**rest, "prompt" if isinstance(prompt, str) else "messages": prompt, **answer}


def _without(row: Row, *columns: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in columns}
