"""What the stages read: a Stack Exchange dump to prepare, or the user's own data sets."""

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.section import Section, changeable


class PrepareConfig(Section):
    """From a dump's Posts.xml to four disjoint sets."""

    posts: str | None = Field(
        default=None,
        description="Posts.xml of a Stack Exchange dump; none: a synthetic site is written.",
    )
    num_questions: int = Field(default=4000, ge=20, description="Questions of the synthetic site.")
    max_pairs: int = Field(
        default=10, ge=1, description="Most answer pairs sampled for one question."
    )
    finetune: float = Field(
        default=0.3, gt=0, lt=1, description="Share of the questions for pretrain and SFT."
    )
    reward: float = Field(
        default=0.45, gt=0, lt=1, description="Share for the reward model's pairs."
    )
    rl: float = Field(
        default=0.15, gt=0, lt=1, description="Share whose questions are PPO's prompts."
    )
    evaluation: float = Field(
        default=0.1, gt=0, lt=1, description="Share held out of all training."
    )

    @model_validator(mode="after")
    def _shares(self) -> "PrepareConfig":
        total = self.finetune + self.reward + self.rl + self.evaluation
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"shares finetune + reward + rl + evaluation must add up to 1, got {total:g}"
            )
        return self


class DataSource(Section):
    """A data set of the user's own."""

    path: str = Field(description="File (jsonl, json, parquet, csv) or saved `datasets` folder.")
    columns: dict[str, str] = Field(
        default={}, description="Our column name -> the name in the file."
    )
    limit: int | None = Field(default=None, ge=1, description="Read at most this many rows.")


class DataConfig(Section):
    """Data sets that replace what prepare writes, by use."""

    pretrain: DataSource | None = Field(
        default=None, description="Rows with `text`, or `prompt` and `completion`."
    )
    sft: DataSource | None = Field(
        default=None, description="Rows with `prompt` and `completion`, or `text`."
    )
    preferences: DataSource | None = Field(
        default=None, description="Rows with `prompt`, `chosen` and `rejected`."
    )
    prompts: DataSource | None = Field(
        default=None, description="Rows with `prompt`: PPO's prompts."
    )
    eval: DataSource | None = Field(default=None, description="Rows with `prompt`, held out.")
    overlong: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="What to do with a prompt or text over its limit."
    )
    max_bad_share: float = changeable(
        0.2,
        ge=0,
        le=1,
        description="Share of bad rows (over-long, empty) above which a stage stops.",
    )
