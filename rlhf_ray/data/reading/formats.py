"""Row formats of datasets, by TRL's column names and the layouts of other systems.

Rows of every format are converted to the form that `rlhf_ray.data.reading.rows` describes. One row
may give several (a question with its answers), or none.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.data import Format
from rlhf_ray.data import template
from rlhf_ray.data.reading.chats import (
    AnswerLike,
    Message,
    PromptLike,
    answer_of,
    common_messages,
    common_text,
    is_chat,
    is_said,
    parse_messages,
    parse_prompt,
    parse_tools,
    split_last_answer,
)
from rlhf_ray.data.reading.counts import BadRow, SkippedRows
from rlhf_ray.data.reading.hub_layouts import convert_stack_exchange
from rlhf_ray.data.reading.pairing import pairs_by_prompt
from rlhf_ray.data.reading.rows import Row, parse_bool, require_readable, require_text
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
"""Format -> sets of columns, each of which shows it. `auto` tries the formats in this order: the
columns of earlier ones include those of later ones."""

_FORMATS: Mapping[Use, tuple[str, ...]] = {
    "pretrain": tuple(name for name in _COLUMNS if name != "verl"),
    "sft": tuple(name for name in _COLUMNS if name != "verl"),
    "preferences": ("stack_exchange", "preference", "unpaired"),
    "ratings": ("stack_exchange", "unpaired", "prompt_completion"),
    "prompts": tuple(name for name in _COLUMNS if name != "text"),
}


@dataclass(frozen=True)
class ReadOptions:
    """Options of the conversion of a dataset's rows.

    Attributes:
        name: the dataset, for messages.
        use: what the rows are for.
        max_pairs: most pairs of one question; if there are more, they are drawn.
        seed: of that draw.
        prepare: called with each row of the dataset, and returns it with our columns.
    """

    name: str
    use: Use
    max_pairs: int
    seed: int
    prepare: Callable[[Row], Row] = dict

    @property
    def needs_answer(self) -> bool:
        """True if a prompt alone is of no use."""
        return self.use in ("pretrain", "sft", "ratings")


def detect_format(columns: Collection[str], requested: Format, options: ReadOptions) -> str:
    """Return the format of rows with these columns.

    Raises:
        DataError: columns are missing, or rows of the requested format have no such use.
    """
    usable = [name for name in _FORMATS[options.use] if requested in ("auto", name)]
    if not usable:
        raise DataError(
            f"{options.name}: format {requested} cannot be used for {options.use}; set format to "
            f"one of {', '.join(_FORMATS[options.use])}"
        )
    names = set(columns)
    if "messages" in names and "completion" not in names and options.needs_answer:
        names.discard("prompt")  # of the chat, whose last answer is to be learnt
    for name, choices in _COLUMNS.items():
        if name in usable and any(names.issuperset(choice) for choice in choices):
            return name
    expected = "; ".join(
        f"{name} ({' or '.join(', '.join(choice) for choice in _COLUMNS[name])})" for name in usable
    )
    raise DataError(
        f"{options.name}: the columns {', '.join(columns)} match no format that {options.use} can "
        f"use: {expected}. Map your columns to these names with the dataset's key columns, for "
        "example columns: {prompt: <name in your file>}"
    )


def convert(
    rows: Iterable[Row], row_format: str, options: ReadOptions
) -> Iterator[Row | SkippedRows]:
    """Convert rows of one format; rows that cannot be used come out as `SkippedRows`."""
    if row_format == "unpaired" and options.use == "preferences":
        answers = _convert_each(rows, _labelled, options)
        yield from pairs_by_prompt(answers, options.max_pairs, options.seed)
    else:
        yield from _convert_each(rows, _CONVERTERS[row_format], options)


Converter = Callable[[Row, ReadOptions], Iterable[Row | SkippedRows]]


def _convert_each(
    rows: Iterable[Row], converter: Converter, options: ReadOptions
) -> Iterator[Row | SkippedRows]:
    for row in rows:
        try:
            row = options.prepare(row)
            require_readable(row)
            yield from converter(row, options)
        except BadRow as bad:
            yield SkippedRows(bad.reason, is_bad=True, explanation=bad.explanation)


def _text(row: Row, options: ReadOptions) -> Iterator[Row]:
    yield {**row, "text": require_text(row, "text")}


def _messages(row: Row, options: ReadOptions) -> Iterator[Row]:
    prompt, answer = split_last_answer(parse_messages(row.get("messages")))
    yield _row(row, prompt, _answer(answer, options))


def _completed(row: Row, options: ReadOptions) -> Iterator[Row]:
    prompt, answer = _prompt(row), row.get("completion")
    if is_chat(answer):
        before, answer = split_last_answer(parse_messages(answer))
        is_turn = before or isinstance(answer, Mapping)
        prompt = [*_as_messages(prompt), *before] if is_turn else prompt
    yield _row(_without(row, "completion"), prompt, _answer(answer, options))


def _labelled(row: Row, options: ReadOptions) -> Iterator[Row]:
    label = parse_bool(row.get("label"))
    if label is None:
        raise BadRow("no_label", "the label must be true or false")
    for converted in _completed({**row, "label": label}, options):
        if "completion" not in converted and options.use != "prompts":
            raise BadRow("no_answer", "the row has a prompt but no answer")
        yield converted


def _unpaired(row: Row, options: ReadOptions) -> Iterator[Row | SkippedRows]:
    for converted in _labelled(row, options):
        if converted["label"] or options.use in ("ratings", "prompts"):
            yield converted
        else:
            yield SkippedRows("label_false", is_bad=False)


def _preference(row: Row, options: ReadOptions) -> Iterator[Row]:
    explicit = _preference_prompt(row)
    sides = row.get("chosen"), row.get("rejected")
    if all(map(is_chat, sides)):
        prompt, chosen, rejected = _chat_pair(explicit, *map(parse_messages, sides))
    else:
        prompt = explicit
        chosen, rejected = require_text(row, "chosen"), require_text(row, "rejected")
        if prompt is None:
            prompt = common_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRow("no_prompt", "no column prompt, and chosen and rejected begin differently")
    rest = _without(row, "chosen", "rejected")
    if options.needs_answer:
        yield _row(rest, prompt, chosen)
    else:
        yield {**_row(rest, prompt, None), "chosen": chosen, "rejected": rejected}


def _preference_prompt(row: Row) -> PromptLike | None:
    """Return the prompt beside two answers; a chat beside them is one up to its last answer."""
    if row.get("prompt") or row.get("question"):
        return _prompt(row)
    both_chats = is_chat(row.get("chosen")) and is_chat(row.get("rejected"))
    if not row.get("messages") or (both_chats and len(parse_messages(row["chosen"])) > 1):
        return None
    return split_last_answer(parse_messages(row["messages"]))[0]


def _chat_pair(
    explicit: PromptLike | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], AnswerLike, AnswerLike]:
    """Return the prompt and both answers of two chats; what both begin with is the prompt."""
    shared = common_messages(chosen, rejected)
    if len(shared) == min(len(chosen), len(rejected)):
        raise BadRow("equal" if chosen == rejected else "no_answer")
    before = _as_messages(explicit) if explicit is not None else []
    # Some datasets repeat the prompt at the start of both chats, others do not.
    prompt = shared if shared[: len(before)] == before else [*before, *shared]
    answers = [messages[len(shared) :] for messages in (chosen, rejected)]
    if any(len(turns) != 1 or turns[0]["role"] != "assistant" for turns in answers):
        raise BadRow("several_turns", "chosen and rejected must differ in the last answer alone")
    return prompt, answer_of(answers[0][0]), answer_of(answers[1][0])


def _stack_exchange(row: Row, options: ReadOptions) -> Iterator[Row | SkippedRows]:
    yield from convert_stack_exchange(row, options.use, options.max_pairs, options.seed)


_CONVERTERS: Mapping[str, Converter] = {
    "text": _text,
    "messages": _messages,
    "prompt_completion": _completed,
    "preference": _preference,
    "unpaired": _unpaired,
    "stack_exchange": _stack_exchange,
    "verl": _completed,
}


def _prompt(row: Row) -> PromptLike:
    """Return the prompt; a bare question gets the plain layout."""
    if row.get("prompt") is None and "question" in row:
        return template.prompt(require_text(row, "question"))
    return parse_prompt(row.get("prompt"))


def _with_system(row: Row, prompt: PromptLike) -> list[Message]:
    """Return a prompt as a chat, after the row's system text where it does not begin with one."""
    has_layout = isinstance(prompt, str) and row.get("prompt") is None and "question" in row
    messages = _as_messages(require_text(row, "question") if has_layout else prompt)
    if not _has_system(row) or messages[0]["role"] == "system":
        return messages
    return [*parse_messages([{"role": "system", "content": row["system"]}]), *messages]


def _has_system(row: Row) -> bool:
    system = row.get("system")
    return is_said(system) and not isinstance(system, int | float)  # a number is no text


def _as_messages(prompt: PromptLike) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _answer(value: object, options: ReadOptions) -> AnswerLike | None:
    """Return the answer; None where there is none and none is needed."""
    if isinstance(value, Mapping) or (isinstance(value, str) and value.strip()):
        return value
    if options.needs_answer:
        raise BadRow("no_answer", "the row has a prompt but no answer")
    return None


def _row(rest: Row, prompt: PromptLike, completion: AnswerLike | None) -> Row:
    """Return a row with its prompt as text or as messages, and with no other prompt.

    It is a chat where the row has a system text, or tools, in columns of their own.
    """
    if not prompt:
        raise BadRow("no_prompt", "the row has an answer but no prompt")
    tools = rest.get("tools")
    if _has_system(rest) or (is_said(tools) and parse_tools(tools)):
        prompt = _with_system(rest, prompt)
    answer = {} if completion is None else {"completion": completion}
    rest = _without(rest, "prompt", "messages")
    return {**rest, "prompt" if isinstance(prompt, str) else "messages": prompt, **answer}


def _without(row: Row, *columns: str) -> Row:
    return {name: value for name, value in row.items() if name not in columns}
