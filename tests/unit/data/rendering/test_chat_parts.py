"""A row that a chat template shows in part is a bad row, and the part is named."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.datasets.prompts import load_prompts
from rlhf_ray.data.datasets.ratings import load_ratings
from rlhf_ray.data.datasets.texts import load_documents
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.render import Renderer

Tokenizer = PreTrainedTokenizerFast
Chat = list[dict[str, Any]]

USER = {"role": "user", "content": "Weather in Bern?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "n": 3}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks up the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4 degrees"}
THOUGHT = {"role": "assistant", "content": "Cold.", "reasoning_content": "4 is cold."}

AGENT = """
{%- if tools %}{{ '<|im_start|>tools' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and message.reasoning_content %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Shows tools, calls, reasoning and every role."""

NAMED_ROLES = """
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<u>' + message.content + '<|im_end|>' }}
{%- elif message.role == 'assistant' %}{{ '<a>' + message.content + '<|im_end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"""
"""Ignores every role but two."""

OR_ELSE = NAMED_ROLES.replace("{%- elif message.role == 'assistant' %}", "{% else %}")
"""Takes every role but one for the assistant."""

STRIPS = "message.content.split('</think>')[-1]"
CUTS_REASONING = AGENT.replace("{{- message.content }}", f"{{{{- {STRIPS} }}}}")
"""Drops what an answer's text holds before </think>, as R1's does."""


LATE_REASONING = AGENT.replace(
    "{{- message.content }}", f"{{{{- message.content if loop.last else {STRIPS} }}}}"
).replace("message.reasoning_content %}", "message.reasoning_content and loop.last %}")
"""Shows the reasoning of the last answer alone, as Qwen3's does."""


LAST_TURN = AGENT.replace(" in messages", " in messages[-1:]")


def renderer(chatml: Tokenizer, text: str = AGENT, kind: str = "auto") -> Renderer:
    chatml.chat_template = text
    return Renderer(chatml, TemplateConfig.model_validate({"kind": kind}))


def spelt(made: Renderer, prompt: Chat, answer: Any, **named: Any) -> tuple[str, str]:
    """Return the given text and the text with a loss."""
    (row,) = made.tokenize([made.prompt_and_answer(prompt, answer, **named)])
    pairs = list(zip(row.token_ids, row.answer_mask, strict=True))
    given, learnt = ([token for token, learnt in pairs if learnt == side] for side in (0, 1))
    return str(made.tokenizer.decode(given)), str(made.tokenizer.decode(learnt))


class TestSupported:
    def test_tools_calls_and_reasoning_reach_the_tokens(self, chatml: Tokenizer) -> None:
        made = renderer(chatml)
        given, learnt = spelt(made, [USER, CALLING, RESULT], THOUGHT, tools=[TOOL])
        assert "Looks up the weather." in given
        assert '<call>weather {"city": "Bern", "n": 3}</call><|im_end|>' in given
        assert "<|im_start|>tool\n4 degrees<|im_end|>" in given
        assert learnt == "<think>\n4 is cold.\n</think>\n\nCold.<|im_end|>"
        given, learnt = spelt(made, [USER], CALLING, tools=[TOOL])
        assert learnt == '<call>weather {"city": "Bern", "n": 3}</call><|im_end|>'

    def test_every_answer_is_learnt_calls_too(self, chatml: Tokenizer) -> None:
        _, learnt = spelt(
            renderer(chatml), [USER, CALLING, RESULT], THOUGHT, tools=[TOOL], every_answer=True
        )
        assert learnt.startswith("<call>weather")
        assert learnt.endswith("<|im_end|><think>\n4 is cold.\n</think>\n\nCold.<|im_end|>")

    def test_an_answer_without_weight_is_given_and_not_learnt(self, chatml: Tokenizer) -> None:
        made = renderer(chatml)
        unlearnt = {"role": "assistant", "content": "Wrong.", "learnt": False}
        earlier = [USER, {"role": "assistant", "content": "Yes."}, USER, unlearnt, USER]
        given, learnt = spelt(made, earlier, "Right.", every_answer=True)
        assert "Wrong.<|im_end|>" in given
        assert "learnt" not in given
        assert learnt == "Yes.<|im_end|>Right.<|im_end|>"
        with pytest.raises(BadRow, match="not_learnt"):
            spelt(made, [USER], unlearnt)

    def test_a_template_may_take_arguments_as_json(self, chatml: Tokenizer) -> None:
        made = renderer(chatml, AGENT.replace("arguments | tojson", "arguments"))
        _, learnt = spelt(made, [USER], CALLING)
        assert learnt == '<call>weather {"city": "Bern", "n": 3}</call><|im_end|>'

    def test_a_template_may_have_its_own_name_for_reasoning(self, chatml: Tokenizer) -> None:
        made = renderer(chatml, AGENT.replace("reasoning_content", "thinking"))
        assert spelt(made, [USER], THOUGHT)[1].startswith("<think>\n4 is cold.")

    def test_a_developer_is_the_system_unless_the_template_knows_one(
        self, chatml: Tokenizer
    ) -> None:
        chat = [{"role": "developer", "content": "Be brief."}, USER]
        made = renderer(chatml, str(chatml.chat_template))  # its own system text gives way
        assert spelt(made, chat, "So.")[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
        knows = AGENT.replace(
            "{%- if tools", "{% if messages[0].role == 'developer' %}{% endif %}{%- if tools"
        )
        given, _ = spelt(renderer(chatml, knows), chat, "So.")
        assert given.startswith("\n<|im_start|>developer\nBe brief.")

    def test_white_space_may_change(self, chatml: Tokenizer) -> None:
        made = renderer(chatml, AGENT.replace("message.content }}", "message.content | trim }}"))
        assert spelt(made, [USER], "  So.\n\n")[1] == "So.<|im_end|>"

    @pytest.mark.parametrize("spelt_as", [json.dumps, str])
    def test_tools_may_be_told_in_a_text_of_the_chat(
        self, chatml: Tokenizer, spelt_as: Any
    ) -> None:
        made = renderer(chatml, NAMED_ROLES.replace("'user'", "'user' or message.role == 'system'"))
        system = {"role": "system", "content": f"Tools: {spelt_as([TOOL])}"}
        assert "Looks up" in spelt(made, [system, USER], "So.", tools=[TOOL])[0]
        named = {"role": "system", "content": "Ask weather for a city. Looks up the weather."}
        with pytest.raises(BadRow, match="template_drops_tools"):
            spelt(made, [named, USER], "So.", tools=[TOOL])


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("text", "prompt", "answer", "reason"),
    [
        (NAMED_ROLES, [SYSTEM, USER], "So.", "template_lacks_role"),
        (NAMED_ROLES, [USER, RESULT], "So.", "template_lacks_role"),
        (OR_ELSE, [SYSTEM, USER], "So.", "template_lacks_role"),
        (OR_ELSE, [{"role": "critic", "content": "No."}, USER], "So.", "template_lacks_role"),
        # It names the role and skips it all the same, also where another part says the same.
        (NAMED_ROLES + "{# 'system' #}", [SYSTEM, USER], "So.", "template_drops_system"),
        (
            NAMED_ROLES + "{# 'system' #}",
            [{"role": "system", "content": "Bern"}, USER],
            "So.",
            "template_drops_system",
        ),
        (NAMED_ROLES, [USER], THOUGHT, "template_drops_reasoning_content"),
        (NAMED_ROLES, [USER], CALLING, "template_drops_tool_calls"),
        (CUTS_REASONING, [USER], "<think>Hm.</think>So.", "template_drops_answer"),
        (
            CUTS_REASONING,
            [USER, {"role": "assistant", "content": "<think>Hm.</think>So."}, USER],
            "So.",
            "template_drops_answer",
        ),
        (LATE_REASONING, [USER, THOUGHT, USER], THOUGHT, "template_drops_reasoning_content"),
        (
            LATE_REASONING,
            [USER, {"role": "assistant", "content": "<think>Ah.</think>So."}, USER],
            "<think>Hm.</think>So.",
            "template_drops_answer",
        ),
        (AGENT, [{**USER, "images": ["a.png"]}], "So.", "template_drops_images"),
        (AGENT, [{**USER, "weight": 0}], "So.", "template_drops_weight"),
        (LAST_TURN, [USER, THOUGHT, USER], "So.", "template_drops_prompt"),
    ],
)
def test_a_part_that_is_dropped_is_named(
    chatml: Tokenizer, text: str, prompt: Chat, answer: Any, reason: str
) -> None:
    made = renderer(chatml, text)
    with pytest.raises(BadRow) as caught:
        made.prompt_and_answer(prompt, answer)
    assert caught.value.reason == reason
    with pytest.raises(BadRow, match=reason):
        made.prompt_and_answer(prompt, answer)  # what was found out once holds for every row


@pytest.mark.parametrize("answer", [THOUGHT, "<think>\n4 is cold.\n</think>\n\nCold."])
def test_reasoning_is_learnt_in_a_later_turn_where_earlier_ones_have_none(
    chatml: Tokenizer, answer: Any
) -> None:
    earlier = [USER, {"role": "assistant", "content": "Mild."}, USER]
    given, learnt = spelt(renderer(chatml, LATE_REASONING), earlier, answer)
    assert "Mild." in given
    assert learnt == "<think>\n4 is cold.\n</think>\n\nCold.<|im_end|>"


def test_tools_that_the_template_ignores(chatml: Tokenizer) -> None:
    with pytest.raises(BadRow) as caught:
        renderer(chatml, NAMED_ROLES).prompt([USER], tools=[TOOL])
    assert caught.value.reason == "template_drops_tools"


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        ([USER], THOUGHT, "template_drops_reasoning_content"),
        ([USER, CALLING, RESULT], "So.", "template_lacks_role"),
    ],
)
def test_the_plain_layout_shows_texts_alone(
    chatml: Tokenizer, prompt: Chat, answer: Any, reason: str
) -> None:
    made = renderer(chatml, kind="question_answer")
    with pytest.raises(BadRow) as caught:
        made.prompt_and_answer(prompt, answer)
    assert caught.value.reason == reason
    assert spelt(made, [SYSTEM, USER], "So.")[0].startswith("Be brief.\n\nQuestion: Weather")


def test_every_loader_counts_what_is_dropped(chatml: Tokenizer) -> None:
    made = renderer(chatml, NAMED_ROLES)
    row = {"messages": [USER], "tools": [TOOL], "completion": "So.", "chosen": "a", "rejected": "b"}
    row |= {"score": 1}
    good = row | {"tools": None}
    counts = {"kept": 1, "template_drops_tools": 1}
    rows = [row, good]
    assert load_documents(rows, made, 0.5)[1] == counts
    assert load_pairs(rows, made, 99, max_bad_share=0.5)[1] == counts
    assert load_ratings(rows, made, "score", 99, max_bad_share=0.5)[1] == counts
    assert load_prompts(rows, made, 99, max_bad_share=0.5)[1] == counts
    plain = {"prompt": "q", "completion": "a", "tools": [TOOL]}
    assert load_documents([plain, good], made, 0.5)[1] == {"kept": 1, "tools": 1}
