"""What the stages read: a Stack Exchange dump to prepare, or the user's own data sets."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from rlhf_ray.config.section import Section, changeable, fixed, refuse_owned


class PrepareConfig(Section):
    """From a dump's Posts.xml to four disjoint sets."""

    posts: str | None = fixed(
        None,
        description="Posts.xml of a Stack Exchange dump, or the .7z that holds it; none: a "
        "synthetic site is written.",
    )
    site: str | None = fixed(
        None,
        description="Site of the dump, such as ai.stackexchange.com, for the questions' links; "
        "none: as the .7z or the dump's folder is named.",
    )
    num_questions: int = fixed(
        4000, unit="questions", ge=20, description="Questions of the synthetic site."
    )
    max_pairs: int = fixed(
        10, unit="pairs", ge=1, description="Most answer pairs sampled for one question."
    )
    finetune: float = fixed(
        0.3, unit="share", gt=0, lt=1, description="Share of the questions for pretrain and SFT."
    )
    reward: float = fixed(
        0.45, unit="share", gt=0, lt=1, description="Share for the reward model's pairs."
    )
    rl: float = fixed(
        0.15, unit="share", gt=0, lt=1, description="Share whose questions are PPO's prompts."
    )
    evaluation: float = fixed(
        0.1, unit="share", gt=0, lt=1, description="Share held out of all training."
    )

    @model_validator(mode="after")
    def _shares(self) -> "PrepareConfig":
        total = self.finetune + self.reward + self.rl + self.evaluation
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"shares finetune + reward + rl + evaluation must add up to 1, got {total:g}"
            )
        return self


Format = Literal[
    "auto",
    "text",
    "messages",
    "prompt_completion",
    "preference",
    "unpaired",
    "stack_exchange",
    "verl",
]


class RowFilter(Section):
    """Rows that a data set keeps: a comparison, or a function of the user's own."""

    column: str | None = fixed(
        None, description="Column whose value is compared; `prompt` of a chat is its text."
    )
    length: bool = fixed(
        False, description="Compare the value's length (characters, or items of a list)."
    )
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not_in", "contains"] = fixed(
        "==", description="How; in and not_in take a list of values."
    )
    value: Any = fixed(None, description="With what.")
    function: str | None = fixed(
        None, description="module:name or file.py:name of f(row) -> bool, instead of a comparison."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_function(cls, given: Any) -> Any:
        return {"function": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_of_both(self) -> "RowFilter":
        if (self.column is None) == (self.function is None):
            raise ValueError("a filter is either {column, op, value} or a function module:name")
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"a function is named module:name, got {self.function!r}")
        if self.op in ("in", "not_in") and not isinstance(self.value, list):
            raise ValueError(f"{self.op} compares with a list of values, got {self.value!r}")
        return self


class DataSource(Section):
    """A data set of the user's own."""

    path: str = fixed(
        ...,
        description="File (parquet, csv, json or jsonl, the last three also as .gz), folder of "
        "such files, folder saved by `datasets`, or the name of a data set on the hub.",
    )
    name: str | None = fixed(None, description="Configuration of a data set on the hub.")
    split: str = fixed(
        "train",
        description="Split of a data set on the hub, of a saved folder, or of a folder whose files "
        "are named after splits.",
    )
    format: Format = fixed(
        "auto", description="What a row is; auto: told by the names of its columns."
    )
    columns: dict[str, str] = fixed({}, description="Our column name -> the name in the file.")
    weight: float | None = fixed(
        None,
        unit="–",
        gt=0,
        description="Share of a mixture, in proportion to the other weights; none: all its rows.",
    )
    limit: int | None = fixed(
        None,
        unit="rows",
        ge=1,
        description="Read at most this many rows (of those the filters keep).",
    )
    licence: str | None = fixed(
        None, description="Licence of the rows, for the cards of exported models."
    )
    filter: list[RowFilter] = fixed(
        [], description="All of them must hold: {column, op, value}, or module:name."
    )

    @field_validator("filter", mode="before")
    @classmethod
    def _one_filter(cls, given: Any) -> Any:
        return given if isinstance(given, list) else [given]


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, (dict, DataSource)) else given


Sources = Annotated[
    list[DataSource],
    BeforeValidator(_as_list, json_schema_input_type=DataSource | list[DataSource]),
]
"""One source, or several mixed; a single one may be written without the list."""


class DataConfig(Section):
    """Data sets that replace what prepare writes, by use; each one source or a list of them."""

    pretrain: Sources | None = fixed(None, description="Texts, or prompts with answers.")
    sft: Sources | None = fixed(None, description="Prompts with answers, chats, or texts.")
    preferences: Sources | None = fixed(
        None, description="Pairs of answers, or answers with labels or scores."
    )
    prompts: Sources | None = fixed(None, description="PPO's prompts.")
    eval: Sources | None = fixed(None, description="Prompts that are held out.")

    @field_validator("pretrain", "sft", "preferences", "prompts", "eval")
    @classmethod
    def _weights(cls, sources: list[DataSource] | None) -> list[DataSource] | None:
        if sources is None:
            return None
        if not sources:
            raise ValueError("names no data set; leave the key out to use what prepare writes")
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("give every data set of a mixture a weight, or none of them")
        return sources

    overlong: Literal["drop", "truncate", "error"] = fixed(
        "drop", description="What to do with a prompt or text over its limit."
    )
    max_bad_share: float = changeable(
        0.2,
        unit="share",
        ge=0,
        le=1,
        description="Share of bad rows (over-long, empty) above which a stage stops.",
    )


class TemplateConfig(Section):
    """The layout that every stage renders with."""

    kind: Literal["auto", "chat", "question_answer"] = fixed(
        "auto",
        description="chat: the tokenizer's chat template; question_answer: `Question: ... Answer: "
        "...`; auto: chat for rows with messages, and plain prompts as they are written.",
    )
    kwargs: dict[str, Any] = fixed(
        {}, description="Further variables of the chat template, such as {enable_thinking: false}."
    )

    @field_validator("kwargs")
    @classmethod
    def _own_keys(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = ["add_generation_prompt", "continue_final_message", "tokenize", "messages"]
        owned = dict.fromkeys(names, "the renderer")
        return refuse_owned("template.kwargs", kwargs, owned)
