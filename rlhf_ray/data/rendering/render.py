"""From prompts and answers to token ids, in one way for every stage.

A prompt and its answer are tokenised apart and then joined: in PPO the model continues the prompt's
ids, so those ids must also begin every sequence that it was trained on. What is tokenised is cut
out of one rendering of the whole chat, so nothing is written twice; a template that renders a
prompt otherwise once an answer follows is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rlhf_ray.config.template import TemplateConfig
from rlhf_ray.data import template
from rlhf_ray.data.reading.chats import Message, PromptLike
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.tokens import encode, eos_id
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "zxq7probe"
"""A word that no template writes by itself."""


@dataclass(frozen=True)
class TextSegments:
    """The text of one row in the pieces that are tokenised apart.

    Attributes:
        texts: in turn what is given and what is answered, without the end of the last answer.
        end_id: the token that ends the whole.
        is_plain: begins as the tokenizer begins a text; a chat template does that itself.
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
    """How many of them come before the last answer; 0 for a text without a prompt."""
    answer_mask: list[int]
    """[S] 1 on the tokens of every answer, its end included; all 1 for a text without a prompt."""


class Renderer:
    """Renders rows for one tokenizer.

    `full` is all that a model with its own tokenizer needs; the stages, which render many rows,
    collect layouts (`prompt`, `answered`, `text`) and give them to `tokenize` together.

    Args:
        tokenizer: of the model that reads the ids.
        settings: which template, and its variables.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or its chat template is missing where
            ``settings`` ask for it, or leaves out what the user says.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", settings: TemplateConfig | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings or TemplateConfig()
        self._eos_id = eos_id(tokenizer)
        if self._settings.kind == "chat":
            _ = self._chat_end

    def full(self, prompt: PromptLike, answer: str, ended: bool = True) -> TokenizedRow:
        """A prompt and its answer, ended once by the template's end of turn, or by EOS.

        Args:
            prompt: text, or the messages up to the answer.
            answer: text without special tokens.
            ended: False leaves the end away: an answer that was cut at its limit.

        Raises:
            BadRow: the template cannot render these messages.
        """
        return self.tokenize([self.prompt_and_answer(prompt, answer)], ended)[0]

    def messages(self, prompt: PromptLike, question: str | None = None) -> list[Message] | None:
        """What the template is given; None where the prompt is written as it stands.

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
        """What a model continues; arguments as in `messages`.

        Raises:
            BadRow: the template cannot render these messages.
        """
        messages = self.messages(prompt, question)
        if messages is None:
            return self.text(str(prompt))
        text = self._render(messages, generation_prompt=True)
        _require_user_text(messages, text)
        return self._layout((text,))

    def prompt_and_answer(
        self,
        prompt: PromptLike,
        answer: str,
        question: str | None = None,
        every_answer: bool = False,
    ) -> TextSegments:
        """A prompt and its answer.

        Args:
            prompt: text or messages.
            answer: text.
            question: as in `messages`.
            every_answer: set the assistant's earlier turns apart as well, so that
                ``answer_mask`` covers them.

        Raises:
            BadRow: the template cannot render these messages, or not so that what it makes of the
                prompt begins what it makes of the whole.
        """
        messages = self.messages(prompt, question)
        if messages is None:
            return TextSegments((str(prompt), answer), self._eos_id, is_plain=True)
        turns = [*messages, {"role": "assistant", "content": answer}]
        whole = self._render(turns, generation_prompt=False)
        _require_user_text(turns, whole)
        last = len(turns) - 1
        texts: list[str] = []
        cut = 0
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant" or not (every_answer or place == last):
                continue
            start, end, ended = self._span(turns, place, whole, cut)
            end = end if place == last else ended
            texts += (whole[cut:start], whole[start:end])
            cut = end
        return self._layout(tuple(texts))

    def text(self, text: str) -> TextSegments:
        """A text that is learnt as it stands."""
        return TextSegments((text,), self._eos_id, is_plain=True)

    def tokenize(self, layouts: Sequence[TextSegments], ended: bool = True) -> list[TokenizedRow]:
        """Ids of many rows at once; ``ended`` as in `full`, False for prompts."""
        pieces = encode(self.tokenizer, list(chain(*(layout.texts for layout in layouts))))
        bounds = accumulate((len(layout.texts) for layout in layouts), initial=0)
        return [
            self._join(layout, pieces[first:last], ended)
            for layout, (first, last) in zip(layouts, pairwise(bounds), strict=True)
        ]

    def visible_text(self, layout: TextSegments) -> str:
        """The text that the row's tokens stand for, without the start token and its end."""
        return self.strip_bos("".join(layout.texts))

    def strip_bos(self, text: str) -> str:
        """The text as another tokenizer, a judge or a person reads it: no token begins it."""
        return text.removeprefix(str(self.tokenizer.bos_token or ""))

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an answer in a chat; None where this tokenizer renders no chats."""
        kind = self._settings.kind
        if kind == "question_answer" or (kind == "auto" and not self.tokenizer.chat_template):
            return None
        return self._chat_end

    def _join(self, layout: TextSegments, pieces: Sequence[list[int]], ended: bool) -> TokenizedRow:
        start = self._start_ids if layout.is_plain else []
        ids = list(pieces[0]) if pieces[0][: len(start)] == start else [*start, *pieces[0]]
        mask = [int(len(pieces) == 1)] * len(ids)
        num_prompt_tokens = 0
        for index, piece in enumerate(pieces[1:], 1):
            is_answer = index % 2
            if is_answer:
                num_prompt_tokens = len(ids)
            ids += piece
            mask += [is_answer] * len(piece)
        if ended and ids[-1:] != [layout.end_id]:
            ids.append(layout.end_id)
            mask.append(1)
        return TokenizedRow(ids, num_prompt_tokens, mask)

    def _layout(self, texts: tuple[str, ...]) -> TextSegments:
        if self._settings.kind == "question_answer":
            return TextSegments(texts, self._eos_id, is_plain=True)
        return TextSegments(texts, self._chat_end, is_plain=False)

    def _span(
        self, turns: Sequence[Message], place: int, whole: str, earliest: int
    ) -> tuple[int, int, int]:
        """Where one answer starts in the whole text, and where it and its end token end."""
        before = self._render(turns[:place], generation_prompt=True)
        start = len(before)
        if start < earliest or not whole.startswith(before):
            raise BadRow(
                "template_not_prefix",
                "the template renders the prompt otherwise once an answer follows, so a model "
                "would be trained on what it never continues; change the template or "
                "template.kwargs",
            )
        answer = turns[place]["content"].strip()
        find = whole.rfind if place == len(turns) - 1 else whole.find
        end = find(self._end_text, start)
        ended = end + len(self._end_text)
        if end < 0:  # no token ends a turn: it goes as far as the answer's text does
            end = ended = find(answer, start) + len(answer)
        if answer[-40:] not in whole[start:end]:
            raise BadRow("template_drops_answer", "the template leaves out what the assistant says")
        return start, end, ended

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        if self._settings.kind == "question_answer":
            return template.chat(messages, str(self.tokenizer.eos_token))
        _ = self._chat_end  # a template that loses text is refused before its first row
        return self._apply(messages, generation_prompt)

    def _apply(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The chat template's own text."""
        if not self.tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {_name(self.tokenizer)} has no chat template, which rows with "
                "messages need; set template.kind to question_answer, or give its folder a "
                "chat_template.jinja"
            )
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._settings.kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow("template_refuses", f"the chat template refuses it: {error}") from error
        return text

    @cached_property
    def _chat_end(self) -> int:
        """The special token that the chat template writes after an answer, else EOS.

        Raises:
            DataError: the template is missing, cannot render one turn, or leaves out its text.
        """
        question, answer = f"{_PROBE}q", f"{_PROBE}a"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            prompt = self._apply(turns[:1], generation_prompt=True)
            whole = self._apply(turns, generation_prompt=False)
        except BadRow as error:
            raise DataError(f"The tokenizer {_name(self.tokenizer)}: {error.why}") from error
        if question not in prompt or answer not in whole:
            lost = "user" if question not in prompt else "assistant"
            raise DataError(
                f"The chat template of {_name(self.tokenizer)} leaves out what the {lost} says; "
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
    def _start_ids(self) -> list[int]:
        """The beginning-of-text token, where this tokenizer writes one before every text."""
        bos = self.tokenizer.bos_token_id
        written: Any = self.tokenizer(_PROBE)["input_ids"]
        return [bos] if isinstance(bos, int) and written[:1] == [bos] else []


def _require_user_text(messages: Sequence[Message], text: str) -> None:
    for message in messages:
        if message["role"] == "user" and message["content"].strip() not in text:
            raise BadRow("template_drops_prompt", "the template leaves out what the user says")


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
