"""Render prompts and answers to token ids, in the same way for every stage.

A prompt and its answer are tokenized apart and then joined: in PPO the model continues the prompt's
ids, so those ids must also begin every sequence that it was trained on (tokenized together, the
last character of a prompt may merge with the first of its answer). Prompt and answer are cut out of
one rendering of the whole chat, so the template writes nothing twice; a template that renders a
prompt differently once an answer follows is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data import template
from rlhf_ray.data.reading.chats import Message, PromptLike
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.tokens import encode, eos_id
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "zxq7probe"
"""A word that no template contains, to find out what a template does with a text."""


@dataclass(frozen=True)
class TextSegments:
    """The text of one row in the segments that are tokenized apart.

    Attributes:
        texts: by turns what is given and what is answered, without the end of the last answer.
        end_id: the token that ends the row.
        is_plain: True if the tokenizer's start token is added; a chat template writes its own.
    """

    texts: tuple[str, ...]
    end_id: int
    is_plain: bool


@dataclass(frozen=True)
class TokenizedRow:
    """One row as token ids."""

    token_ids: list[int]
    """[S] ids."""
    num_prompt_tokens: int
    """Number of ids before the last answer; 0 for a text without a prompt."""
    answer_mask: list[int]
    """[S] 1 on the tokens of every answer, end tokens included; all 1 without a prompt."""


class Renderer:
    """Renders rows for one tokenizer.

    `full` renders and tokenizes one row. The stages, which have many, collect the segments of
    `prompt`, `prompt_and_answer` or `text` and pass them to `tokenize` together, which is faster.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or its chat template is missing where
            ``settings`` ask for it, or drops the user's text.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", settings: TemplateConfig | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings or TemplateConfig()
        self._eos_id = eos_id(tokenizer)
        if self._settings.kind == "chat":
            _ = self._chat_end  # raises if the template cannot be used

    def full(self, prompt: PromptLike, answer: str, ended: bool = True) -> TokenizedRow:
        """Render a prompt and its answer, ended once, by the template's end of turn or by EOS.

        Args:
            prompt: text, or the messages up to the answer.
            answer: text without special tokens.
            ended: False leaves the end token out, for an answer that was cut at its limit.

        Raises:
            BadRow: the template cannot render these messages.
        """
        return self.tokenize([self.prompt_and_answer(prompt, answer)], ended)[0]

    def messages(self, prompt: PromptLike, question: str | None = None) -> list[Message] | None:
        """Return the messages that the template gets; None where the prompt is used as it is.

        Args:
            prompt: text or messages.
            question: the bare question in a prompt that already has a layout.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self._settings.kind == "auto":
            return None
        return [{"role": "user", "content": question or prompt}]

    def prompt(self, prompt: PromptLike, question: str | None = None) -> TextSegments:
        """Render what a model continues; arguments as in `messages`.

        Raises:
            BadRow: the template cannot render these messages.
        """
        messages = self.messages(prompt, question)
        if messages is None:
            return self.text(str(prompt))
        text = self._render(messages, generation_prompt=True)
        _require_user_text(messages, text)
        return self._segments((text,))

    def prompt_and_answer(
        self,
        prompt: PromptLike,
        answer: str,
        question: str | None = None,
        every_answer: bool = False,
    ) -> TextSegments:
        """Render a prompt and its answer.

        Args:
            prompt: text or messages.
            answer: text.
            question: as in `messages`.
            every_answer: separate the assistant's earlier turns too, so that ``answer_mask``
                covers them.

        Raises:
            BadRow: the template cannot render these messages, or its rendering of the prompt is
                no prefix of its rendering of the whole.
        """
        messages = self.messages(prompt, question)
        if messages is None:
            return TextSegments((str(prompt), answer), self._eos_id, is_plain=True)
        chat = [*messages, {"role": "assistant", "content": answer}]
        whole = self._render(chat, generation_prompt=False)
        _require_user_text(chat, whole)
        last = len(chat) - 1
        texts: list[str] = []
        cut = 0
        for index, message in enumerate(chat):
            if message["role"] != "assistant" or not (every_answer or index == last):
                continue
            start, end, ended = self._span(chat, index, whole, cut)
            # The end token of the last answer is added by `tokenize`, if at all.
            end = end if index == last else ended
            texts += (whole[cut:start], whole[start:end])
            cut = end
        return self._segments(tuple(texts))

    def text(self, text: str) -> TextSegments:
        """Take a text as it is."""
        return TextSegments((text,), self._eos_id, is_plain=True)

    def tokenize(self, rows: Sequence[TextSegments], ended: bool = True) -> list[TokenizedRow]:
        """Tokenize many rows at once; ``ended`` as in `full`, False for prompts."""
        pieces = encode(self.tokenizer, list(chain(*(row.texts for row in rows))))
        bounds = accumulate((len(row.texts) for row in rows), initial=0)
        return [
            self._join(row, pieces[first:last], ended)
            for row, (first, last) in zip(rows, pairwise(bounds), strict=True)
        ]

    def visible_text(self, row: TextSegments) -> str:
        """Return the text of the row's tokens, without the start token and the last end token."""
        return self.strip_bos("".join(row.texts))

    def strip_bos(self, text: str) -> str:
        """Remove the start token, which another tokenizer, a judge or a person must not see."""
        return text.removeprefix(str(self.tokenizer.bos_token or ""))

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an answer in a chat; None if this tokenizer renders no chats."""
        kind = self._settings.kind
        if kind == "question_answer" or (kind == "auto" and not self.tokenizer.chat_template):
            return None
        return self._chat_end

    def _join(self, row: TextSegments, pieces: Sequence[list[int]], ended: bool) -> TokenizedRow:
        start = self._bos_ids if row.is_plain else []
        ids = list(pieces[0]) if pieces[0][: len(start)] == start else [*start, *pieces[0]]
        mask = [int(len(pieces) == 1)] * len(ids)
        num_prompt_tokens = 0
        for index, piece in enumerate(pieces[1:], 1):
            is_answer = index % 2
            if is_answer:
                num_prompt_tokens = len(ids)
            ids += piece
            mask += [is_answer] * len(piece)
        if ended and ids[-1:] != [row.end_id]:
            ids.append(row.end_id)
            mask.append(1)
        return TokenizedRow(ids, num_prompt_tokens, mask)

    def _segments(self, texts: tuple[str, ...]) -> TextSegments:
        if self._settings.kind == "question_answer":
            return TextSegments(texts, self._eos_id, is_plain=True)
        return TextSegments(texts, self._chat_end, is_plain=False)

    def _span(
        self, chat: Sequence[Message], index: int, whole: str, earliest: int
    ) -> tuple[int, int, int]:
        """Return where one answer starts in the whole text, ends, and its end token ends."""
        before = self._render(chat[:index], generation_prompt=True)
        start = len(before)
        if start < earliest or not whole.startswith(before):
            raise BadRow(
                "template_not_prefix",
                "the chat template renders the prompt differently once an answer follows, so a "
                "model would be trained on prompts that it never gets; change the template or "
                "template.kwargs",
            )
        answer = chat[index]["content"].strip()
        find = whole.rfind if index == len(chat) - 1 else whole.find
        end = find(self._end_text, start)
        ended = end + len(self._end_text)
        if end < 0:  # no token ends a turn, so it ends with the answer's text
            end = ended = find(answer, start) + len(answer)
        # Only the end is compared: templates may drop the start, such as earlier reasoning.
        if answer[-40:] not in whole[start:end]:
            raise BadRow("template_drops_answer", "the chat template drops the assistant's text")
        return start, end, ended

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        if self._settings.kind == "question_answer":
            return template.chat(messages, str(self.tokenizer.eos_token))
        _ = self._chat_end  # raises if the template drops text, before the first row
        return self._apply(messages, generation_prompt)

    def _apply(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """Return the text of the chat template."""
        if not self.tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {_name(self.tokenizer)} has no chat template, which rows with "
                "messages need; set template.kind to question_answer, or give its folder a "
                "chat_template.jinja"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._settings.kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow("template_refuses", f"the chat template refuses it: {error}") from error
        return str(text)

    @cached_property
    def _chat_end(self) -> int:
        """The special token that the chat template writes after an answer, else EOS.

        Raises:
            DataError: the template is missing, cannot render one turn, or drops its text.
        """
        question, answer = f"{_PROBE}q", f"{_PROBE}a"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            prompt = self._apply(chat[:1], generation_prompt=True)
            whole = self._apply(chat, generation_prompt=False)
        except BadRow as error:
            raise DataError(
                f"The tokenizer {_name(self.tokenizer)}: {error.explanation}"
            ) from error
        if question not in prompt or answer not in whole:
            lost = "user" if question not in prompt else "assistant"
            raise DataError(
                f"The chat template of {_name(self.tokenizer)} drops the {lost}'s text; "
                "correct it, or set template.kind to question_answer"
            )
        (rest,) = encode(self.tokenizer, [whole[whole.rindex(answer) + len(answer) :]])
        special = set(self.tokenizer.added_tokens_decoder) | set(self.tokenizer.all_special_ids)
        end = next((token_id for token_id in rest if token_id in special), self._eos_id)
        if end == self.tokenizer.pad_token_id:
            raise DataError(
                f"The chat template of {_name(self.tokenizer)} ends a turn with the pad token "
                f"{self.tokenizer.pad_token!r}, so a model could not learn to stop; set another "
                "pad_token in tokenizer_config.json"
            )
        return end

    @cached_property
    def _end_text(self) -> str:
        is_chat = self._settings.kind != "question_answer"
        return str(self.tokenizer.decode([self._chat_end if is_chat else self._eos_id]))

    @cached_property
    def _bos_ids(self) -> list[int]:
        """The beginning-of-text token, if this tokenizer puts one before every text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if isinstance(bos, int) and self.tokenizer.encode(_PROBE)[:1] == [bos] else []


def _require_user_text(messages: Sequence[Message], text: str) -> None:
    for message in messages:
        if message["role"] == "user" and message["content"].strip() not in text:
            raise BadRow("template_drops_prompt", "the chat template drops the user's text")


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
