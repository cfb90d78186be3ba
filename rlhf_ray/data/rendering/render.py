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

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data import template
from rlhf_ray.data.reading.chats import LEARNT, AnswerLike, Message, PromptLike
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.chat_template import PROBE, ChatTemplate
from rlhf_ray.data.rendering.shown_parts import require_shown, untold, with_markers
from rlhf_ray.data.rendering.tokens import encode, eos_id, without_prefix

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextSegments:
    """The text of one row in the segments that are tokenized apart.

    Attributes:
        texts: prompt and answer parts in turn, without the end of the last answer.
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
        self._template = ChatTemplate(tokenizer, self._settings.kwargs)
        self._probed: dict[object, BadRow | None] = {}
        self._eos_id = eos_id(tokenizer)
        if self._settings.kind == "chat":
            _ = self._chat_end  # raises if the template cannot be used

    def full(
        self,
        prompt: PromptLike,
        answer: AnswerLike,
        ended: bool = True,
        tools: Sequence[Message] = (),
    ) -> TokenizedRow:
        """Render a prompt and its answer, ended once, by the template's end of turn or by EOS.

        Args:
            prompt: text, or the messages up to the answer.
            answer: text without special tokens.
            ended: False leaves the end token out, for an answer that was cut at its limit.
            tools: that the chat may call.

        Raises:
            BadRow: the template cannot render these messages, or not all of them.
        """
        return self.tokenize([self.prompt_and_answer(prompt, answer, tools=tools)], ended)[0]

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
        instruction = self._settings.instruction
        ending = f" {instruction}" if instruction else ""
        return [{"role": "user", "content": f"{question or prompt}{ending}"}]

    def prompt(
        self, prompt: PromptLike, question: str | None = None, tools: Sequence[Message] = ()
    ) -> TextSegments:
        """Render what a model continues; arguments as in `prompt_and_answer`.

        Raises:
            BadRow: the template cannot render these messages, or not all of them.
        """
        messages = self.messages(prompt, question)
        if messages is None:
            return self.text(str(prompt))
        return self._segments((self._render_whole(messages, True, tools),))

    def prompt_and_answer(
        self,
        prompt: PromptLike,
        answer: AnswerLike,
        question: str | None = None,
        every_answer: bool = False,
        tools: Sequence[Message] = (),
    ) -> TextSegments:
        """Render a prompt and its answer.

        Args:
            prompt: text or messages.
            answer: text, or a message where it is more than text.
            question: as in `messages`.
            every_answer: separate the assistant's earlier turns too, so that ``answer_mask``
                covers them, but for those that are not to be learnt.
            tools: that the chat may call.

        Raises:
            BadRow: the template cannot render these messages, or not all of them, or its rendering
                of the prompt is no prefix of its rendering of the whole.
        """
        messages = self.messages(prompt, question)
        if messages is None:
            return TextSegments((str(prompt), str(answer)), self._eos_id, is_plain=True)
        last_turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        if LEARNT in last_turn:
            raise BadRow("not_learnt", "the answer has weight 0, so there is nothing to learn")
        chat = [*messages, last_turn]
        whole = self._render_whole(chat, False, tools)
        last = len(chat) - 1
        texts: list[str] = []
        cut = 0
        for index, message in enumerate(chat):
            is_learnt = index == last or (every_answer and LEARNT not in message)
            if message["role"] != "assistant" or not is_learnt:
                continue
            start, end, ended = self._span(chat, index, whole, cut, tools)
            # The end token of the last answer is added by `tokenize`, if at all.
            end = end if index == last else ended
            texts += (whole[cut:start], whole[start:end])
            cut = end
        return self._segments(tuple(texts))

    def continued(
        self, prompt: PromptLike, answer: str, tools: Sequence[Message] = ()
    ) -> TextSegments:
        """Put an answer behind its rendered prompt, as it is: a template may refuse or change it.

        Raises:
            BadRow: the template cannot render the prompt.
        """
        given = self.prompt(prompt, tools=tools)
        return TextSegments((*given.texts, answer), given.end_id, given.is_plain)

    def text(self, text: str) -> TextSegments:
        """Take a text as it is."""
        return TextSegments((text,), self._eos_id, is_plain=True)

    def tokenize(self, rows: Sequence[TextSegments], ended: bool = True) -> list[TokenizedRow]:
        """Tokenize many rows at once; ``ended`` as in `full`, False for prompts."""
        begun = encode(self.tokenizer, [row.texts[0] for row in rows])
        rest = self._continue(list(chain(*(row.texts[1:] for row in rows))))
        bounds = accumulate((len(row.texts) - 1 for row in rows), initial=0)
        return [
            self._join(row, [start, *rest[first:last]], ended)
            for row, start, (first, last) in zip(rows, begun, pairwise(bounds), strict=True)
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

    def _continue(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts that stand behind others."""
        # Prompts alone need no second tokenizer, which takes a second to build.
        if not texts or self._plain_tokenizer is None:
            return encode(self.tokenizer, texts)
        encoded = self._plain_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

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
        self,
        chat: Sequence[Message],
        index: int,
        whole: str,
        earliest: int,
        tools: Sequence[Message],
    ) -> tuple[int, int, int]:
        """Return where one answer starts in the whole text, ends, and its end token ends."""
        before = self._render(chat[:index], True, tools)
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
        require_shown(chat[index : index + 1], (), whole[start:end])
        return start, end, ended

    def _render(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Message]
    ) -> str:
        if self._settings.kind == "question_answer":
            return template.chat(messages, str(self.tokenizer.eos_token))
        _ = self._chat_end  # raises if the template drops text, before the first row
        return self._template.render(messages, generation_prompt, tools)

    def _render_whole(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Message]
    ) -> str:
        """Return the rendering of a chat that shows all parts of it.

        A text may also be in the rendering because another part says the same. So a chat of the
        same roles and parts, each with a word of its own, is rendered once as well.

        Raises:
            BadRow: a part is missing, or the template does not know a role.
        """
        text = self._render(messages, generation_prompt, tools)
        unseen = untold(tools, messages)
        for role in {message["role"] for message in messages}:
            self._require_role(role)
        require_shown(messages, unseen, text)
        parts = [(message["role"], *sorted(filter(message.get, message))) for message in messages]
        shape = (*parts, bool(tools), bool(unseen), generation_prompt)
        if shape not in self._probed:
            self._probed[shape] = self._probe(messages, generation_prompt, tools, unseen)
        if lost := self._probed[shape]:
            raise BadRow(lost.reason, lost.explanation)
        return text

    def _probe(
        self,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: Sequence[Message],
        unseen: Sequence[Message],
    ) -> BadRow | None:
        """Return what the template drops of a chat with these parts; ``unseen``: see `untold`."""
        marked = with_markers(messages)
        try:
            text = self._render(marked, generation_prompt, tools)
        except BadRow:  # it takes some texts only, so the rows' own must do
            return None
        try:
            require_shown(marked, unseen, text)
        except BadRow as lost:
            return lost
        return None

    def _require_role(self, role: str) -> None:
        if self._settings.kind != "question_answer":
            self._template.require_role(role)
        elif role not in template.ROLES:
            reason = f"the layout of template.kind question_answer has no role {role!r}"
            raise BadRow("template_lacks_role", reason)

    @cached_property
    def _chat_end(self) -> int:
        return self._template.end_id(self._eos_id)

    @cached_property
    def _end_text(self) -> str:
        is_chat = self._settings.kind != "question_answer"
        return str(self.tokenizer.decode([self._chat_end if is_chat else self._eos_id]))

    @cached_property
    def _plain_tokenizer(self) -> "Tokenizer | None":
        return without_prefix(self.tokenizer)

    @cached_property
    def _bos_ids(self) -> list[int]:
        """The beginning-of-text token, if this tokenizer puts one before every text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if isinstance(bos, int) and self.tokenizer.encode(PROBE)[:1] == [bos] else []
