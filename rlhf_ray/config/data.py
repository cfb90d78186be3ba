"""Sections of the data: a Stack Exchange dump or the user's datasets, and how rows become text."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from rlhf_ray.config.section import (
    MOST_PROCESSES,
    PassThrough,
    Section,
    adjustable,
    changeable,
    fixed,
    is_list,
    is_mapping,
    refuse_owned,
)

PACKED = (".7z", ".zst", ".gz", ".bz2", ".xz")
"""Suffixes of dumps that are unpacked while they are read."""
EXPANSION = 5
"""Bytes of XML for one of an archive: Stack Overflow's posts, 20 GB and 100 GB."""
PART_BYTES = 32 * 2**20
"""Bytes of XML that prepare works on at a time."""
MOST_PARTS = 1000
"""Parts of dumps for which these bytes are enough; those of larger dumps are larger."""


def part_bytes(num_bytes: float) -> int:
    """Return the bytes of XML of a part of dumps that have ``num_bytes``."""
    return max(PART_BYTES, math.ceil(num_bytes / MOST_PARTS))


class PrepareConfig(Section):
    """Turns a dump's Posts.xml into four disjoint sets."""

    posts: str | list[str] | None = fixed(
        None,
        description="Posts.xml of a Stack Exchange dump, plain or as .7z, .zst, .gz, .bz2 or .xz, "
        "or a list of several sites' ones; a path or an address such as s3://...; none: generate a "
        "synthetic site.",
    )
    posts_gb: float | None = changeable(
        None,
        unit="GB",
        gt=0,
        description="Size of the dump's XML, used only by the command plan; none: that of `posts`.",
    )
    site: str | None = fixed(
        None,
        description="Site of the dump, such as ai.stackexchange.com, for links to questions; "
        "none: the name of the .7z or of the dump's folder.",
    )
    limit: int | None = fixed(
        None,
        unit="questions",
        ge=1,
        description="Most questions taken: a sample drawn by run.seed of those selected.",
    )
    min_score: int | None = fixed(
        None, unit="votes", description="Leaves out questions with fewer votes."
    )
    tags: list[str] = fixed([], description="Takes only questions with one of these tags.")
    since: str | None = fixed(
        None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="Takes only questions asked on this day or later, such as '2015-01-31' (YAML "
        "needs the quotes).",
    )
    scratch: str | None = changeable(
        None,
        min_length=1,
        description="Folder for the grouped posts while the stage runs, a third of the XML's "
        "bytes; all nodes of a cluster must see it. None: in run.scratch, on a cluster in run.dir.",
    )
    num_workers: int | None = changeable(
        None,
        unit="processes",
        ge=1,
        le=MOST_PROCESSES,
        description="Most processes at a time for dumps of more than 32 MB; none: one a CPU.",
    )
    num_questions: int = fixed(
        4000, unit="questions", ge=20, description="Questions of the synthetic site."
    )
    max_pairs: int = fixed(
        10, unit="pairs", ge=1, description="Most answer pairs sampled for a question."
    )
    finetune: float = fixed(
        0.3, unit="share", gt=0, lt=1, description="Questions for pretrain and SFT."
    )
    reward: float = fixed(
        0.45, unit="share", gt=0, lt=1, description="Questions for the reward model's pairs."
    )
    rl: float = fixed(
        0.15, unit="share", gt=0, lt=1, description="Questions that are PPO's prompts."
    )
    evaluation: float = fixed(
        0.1, unit="share", gt=0, lt=1, description="Questions held out of all training."
    )

    @property
    def dumps(self) -> list[str]:
        """The dumps of `posts`; empty: a synthetic site."""
        return [self.posts] if isinstance(self.posts, str) else self.posts or []

    @field_validator("posts")
    @classmethod
    def _some_posts(cls, posts: str | list[str] | None) -> str | list[str] | None:
        if posts == []:
            raise ValueError("is an empty list; name at least one dump, or leave the key out")
        return posts

    @model_validator(mode="after")
    def _one_site(self) -> "PrepareConfig":
        if self.site is not None and len(self.dumps) > 1:
            raise ValueError(
                "prepare.site names one site, and prepare.posts has several dumps; leave it out "
                "and name the dumps' folders or archives after their sites"
            )
        return self

    @model_validator(mode="after")
    def _shares(self) -> "PrepareConfig":
        total = self.finetune + self.reward + self.rl + self.evaluation
        if abs(total - 1) > 1e-6:
            raise ValueError(
                "prepare.finetune + prepare.reward + prepare.rl + prepare.evaluation are shares "
                f"and must add up to 1, got {total:g}"
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
    """Filter of a dataset's rows: a comparison, or a function of yours."""

    column: str | None = fixed(
        None, description="Column to compare; `prompt` of a chat is its text."
    )
    length: bool = fixed(
        False, description="Compare the value's length (characters, or items of a list)."
    )
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not_in", "contains"] = fixed(
        "==", description="Comparison; in and not_in take a list."
    )
    value: object = fixed(None, description="Value to compare with.")
    function: str | None = fixed(
        None, description="module:name or file.py:name of f(row) -> bool; replaces the comparison."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_function(cls, given: object) -> object:
        return {"function": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_of_both(self) -> "RowFilter":
        if (self.column is None) == (self.function is None):
            raise ValueError(
                "a filter is either {column, op, value} or a function module:name; give one of them"
            )
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"{self.function!r} must have the form module:name or file.py:name")
        if self.op in ("in", "not_in") and not isinstance(self.value, list):
            raise ValueError(f"op {self.op} needs a list as its value, got {self.value!r}")
        return self


class DataSource(Section):
    """One of your datasets: where it is, or its rows."""

    path: str | None = fixed(
        None,
        description="File (parquet; csv, json or jsonl, also as .gz), folder of such files, "
        "folder saved by `datasets`, or the name of a dataset on the hub.",
    )
    rows: list[dict[str, Any] | str] | None = fixed(
        None,
        description="The rows themselves, in place of `path`: columns and their values, or texts, "
        "which are prompts in `data.prompts` and `data.eval`.",
    )
    name: str | None = fixed(None, description="Configuration of a dataset on the hub.")
    data_dir: str | None = fixed(None, description="Folder within a dataset on the hub.")
    split: str = fixed(
        "train",
        description="Split of a dataset on the hub, of a saved folder, or of a folder whose files "
        "are named after splits.",
    )
    format: Format = fixed("auto", description="Row format; auto: detected from the columns.")
    columns: dict[str, str] = fixed({}, description="Our column name -> the column in the file.")
    function: str | None = fixed(
        None,
        description="module:name or file.py:name of f(row) -> row or text, called with each row of "
        "the file; what it returns takes the row's place.",
    )
    weight: float | None = fixed(
        None,
        unit="–",
        gt=0,
        description="Weight in a mixture, relative to the others; none: use all rows.",
    )
    limit: int | None = fixed(
        None, unit="rows", ge=1, description="Most rows to read, after the filters."
    )
    licence: str | None = fixed(
        None, description="Licence of the rows, for the cards of exported models."
    )
    filter: list[RowFilter] = fixed(
        [], description="Filters that all must hold: {column, op, value}, or module:name."
    )

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.path or f"the list of {len(self.rows or ())} in the config"

    @model_validator(mode="after")
    def _path_or_rows(self) -> "DataSource":
        if (self.path is None) == (self.rows is None):
            raise ValueError("a dataset has either path or rows; set one, and the other to null")
        if self.rows == []:
            raise ValueError("rows is an empty list; give at least one row, or a path")
        if self.rows is not None and (self.name or self.data_dir):
            raise ValueError("name and data_dir are about a path; leave them out beside rows")
        return self

    @field_validator("filter", mode="before")
    @classmethod
    def _one_filter(cls, given: object) -> object:
        return given if is_list(given) else [given]

    @field_validator("function")
    @classmethod
    def _is_a_function(cls, given: str | None) -> str | None:
        if given is not None and ":" not in given:
            raise ValueError(f"{given!r} must have the form module:name or file.py:name")
        return given


def _as_list(given: object) -> object:
    return [given] if is_mapping(given) or isinstance(given, DataSource) else given


Sources = Annotated[
    list[DataSource],
    BeforeValidator(_as_list, json_schema_input_type=DataSource | list[DataSource]),
]
"""One source, or several mixed; a single one may be written without the list."""


class DataConfig(Section):
    """Your datasets, in place of what prepare writes; each key takes a source or a list of them."""

    pretrain: Sources | None = fixed(None, description="Texts, or prompts with answers.")
    sft: Sources | None = fixed(None, description="Prompts with answers, chats, or texts.")
    preferences: Sources | None = fixed(
        None, description="Pairs of answers, or answers with labels or scores."
    )
    prompts: Sources | None = fixed(None, description="PPO's prompts.")
    eval: Sources | None = fixed(None, description="Held-out prompts.")

    @field_validator("pretrain", "sft", "preferences", "prompts", "eval")
    @classmethod
    def _weights(cls, sources: list[DataSource] | None) -> list[DataSource] | None:
        if sources is None:
            return None
        if not sources:
            raise ValueError("is an empty list; leave the key out to use what prepare writes")
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("gives a weight to some sources only; give all of them one, or none")
        return sources

    overlong: Literal["drop", "truncate", "error"] = adjustable(
        "drop", description="What to do with a prompt or text over its length limit."
    )
    max_bad_share: float = changeable(
        0.2,
        unit="share",
        ge=0,
        le=1,
        description="Most bad rows (empty, over-long texts or pairs) before a stage stops.",
    )


class TemplateConfig(Section):
    """Layout of a prompt and its answer as one text, in every stage."""

    kind: Literal["auto", "chat", "question_answer"] = fixed(
        "auto",
        description="chat: the tokenizer's chat template; question_answer: `Question: ... Answer: "
        "...`; auto: chat for rows with messages, else prompts as they are.",
    )
    instruction: str = fixed(
        "",
        description="Appended, after a space, to each plain prompt that kind chat makes a user's "
        "message; chats are left as they are.",
    )
    kwargs: PassThrough = fixed(
        {}, description="More variables for the chat template, such as {enable_thinking: false}."
    )

    @field_validator("kwargs")
    @classmethod
    def _own_keys(cls, kwargs: PassThrough) -> PassThrough:
        names = ["add_generation_prompt", "continue_final_message", "tokenize", "messages"]
        owned = dict.fromkeys(names, "the renderer")
        return refuse_owned("template.kwargs", kwargs, owned)

    @model_validator(mode="after")
    def _instruction_is_used(self) -> "TemplateConfig":
        if self.instruction and self.kind != "chat":
            raise ValueError(
                f"template.instruction has no effect with template.kind {self.kind}; set "
                "template.kind=chat, or write the instruction into the prompts"
            )
        return self
