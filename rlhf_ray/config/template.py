"""How a prompt and its answer become one text."""

from typing import Any, Literal

from pydantic import field_validator

from rlhf_ray.config.section import Section, fixed, refuse_owned


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
