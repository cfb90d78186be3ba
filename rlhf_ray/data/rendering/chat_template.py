"""A tokenizer's chat template, with the names that it has for roles, reasoning and arguments."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.reading.chats import REASONING, Message
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.bounded import problem_of
from rlhf_ray.data.rendering.tokens import encode
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_bounded: set[str] = set()
"""Templates that were found to end."""

PROBE = "zxq7probe"
"""A word that no template contains, to find out what a template does with a text."""


class ChatTemplate:
    """A renderer of chats by a tokenizer's template.

    Args:
        tokenizer: whose template; it may have none, which `render` reports.
        variables: further ones for the template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = variables

    def render(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Message] = ()
    ) -> str:
        """Return the text of a chat.

        Args:
            messages: of any roles.
            generation_prompt: end with the beginning of an answer.
            tools: that the chat may call.

        Raises:
            DataError: the tokenizer has no template.
            BadRow: the template raises, whatever it raises: it is code of the model's author.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {name_of(self._tokenizer)} has no chat template, which rows with "
                "messages need; set template.kind to question_answer, or give its folder a "
                "chat_template.jinja"
            )
        self._require_bounded()
        ready = [self._in_its_names(message) for message in messages]
        try:
            return self._apply(ready, generation_prompt, tools)
        except Exception as error:
            if any("tool_calls" in message for message in ready):
                # Some templates take arguments as the JSON text that they write.
                return self._apply_again(ready, generation_prompt, tools)
            raise _refusal(error) from error

    def end_id(self, eos_id: int) -> int:
        """Return the special token that the template writes after an answer, else EOS.

        Raises:
            DataError: the template is missing, cannot render one turn, or drops its text.
        """
        question, answer = f"{PROBE}q", f"{PROBE}a"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            prompt = self.render(chat[:1], generation_prompt=True)
            whole = self.render(chat, generation_prompt=False)
        except BadRow as error:
            raise DataError(
                f"The tokenizer {name_of(self._tokenizer)}: {error.explanation}"
            ) from error
        if question not in prompt or answer not in whole:
            lost = "user" if question not in prompt else "assistant"
            raise DataError(
                f"The chat template of {name_of(self._tokenizer)} drops the {lost}'s text; "
                "correct it, or set template.kind to question_answer"
            )
        (rest,) = encode(self._tokenizer, [whole[whole.rindex(answer) + len(answer) :]])
        special = set(self._tokenizer.added_tokens_decoder) | set(self._tokenizer.all_special_ids)
        end = next((token_id for token_id in rest if token_id in special), eos_id)
        if end == self._tokenizer.pad_token_id:
            raise DataError(
                f"The chat template of {name_of(self._tokenizer)} ends a turn with the pad token "
                f"{self._tokenizer.pad_token!r}, so a model could not learn to stop; set another "
                "pad_token in tokenizer_config.json"
            )
        return end

    def require_role(self, role: str) -> None:
        """Check that the template tells this role from others.

        Raises:
            BadRow: it neither names the role nor writes the names of all.
        """
        named = self._names(role) or (role == "developer" and self._names("system"))
        if role not in ("user", "assistant") and not named and not self._writes_roles:
            raise BadRow("template_lacks_role", f"the chat template knows no role {role!r}")

    def _require_bounded(self) -> None:
        """Refuse a template that loops or explodes; each is looked at once in a process.

        Raises:
            DataError: naming what it takes.
        """
        if self._text in _bounded:
            return
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for messages, prompt in ((chat[:1], True), (chat, False)):
            if problem := problem_of(partial(self._apply, messages, prompt, ())):
                raise DataError(
                    f"The chat template of {name_of(self._tokenizer)} {problem}, for a chat of "
                    f"{len(messages)} messages; correct it, or set template.kind to question_answer"
                )
        _bounded.add(self._text)

    def _apply_again(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Message]
    ) -> str:
        texts = [_with_arguments(message, json.dumps) for message in messages]
        try:
            return self._apply(texts, generation_prompt, tools)
        except Exception as error:
            raise _refusal(error) from error

    def _apply(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Message]
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **self._variables,
        )
        return str(text)

    def _in_its_names(self, message: Message) -> Message:
        """Return a message with the names that the template has for its parts."""
        ours = REASONING[0]
        theirs = next((name for name in REASONING if self._names(name)), ours)
        renamed = {theirs if name == ours else name: value for name, value in message.items()}
        if message["role"] == "developer" and not self._names("developer"):
            renamed["role"] = "system"
        return renamed

    def _names(self, word: str) -> bool:
        return _is_named(word, self._text)

    @cached_property
    def _text(self) -> str:
        given: object = self._tokenizer.chat_template
        return "\n".join(map(str, given.values())) if isinstance(given, dict) else str(given)

    @cached_property
    def _writes_roles(self) -> bool:
        self._require_bounded()
        role = f"{PROBE}role"
        chat = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
        try:
            return role in self._apply(chat, False, ())
        except Exception:  # it refuses the role
            return False


@cache
def _is_named(word: str, template: str) -> bool:
    """Cached: a search takes longer than a rendering, and every message asks for several."""
    return re.search(rf"(\.|['\"]){re.escape(word)}\b", template) is not None


def _refusal(error: Exception) -> BadRow:
    said = str(error) or type(error).__name__
    return BadRow("template_refuses", f"the chat template refuses it: {said}")


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    converted = [each | {"arguments": convert(each["arguments"])} for each in functions]
    pairs = zip(message["tool_calls"], converted, strict=True)
    return {**message, "tool_calls": [{**call, "function": each} for call, each in pairs]}


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a tokenizer's folder or hub name, for messages."""
    return tokenizer.name_or_path or type(tokenizer).__name__
