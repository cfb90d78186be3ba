from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import encode
from rlhf_ray.errors import DataError

EOS, PAD = 256, 257
Tokenizer = PreTrainedTokenizerFast


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def template(kind: str, **kwargs: Any) -> TemplateConfig:
    return TemplateConfig.model_validate({"kind": kind, "kwargs": kwargs})


def prompt_ids(renderer: Renderer, *prompt: Any) -> list[int]:
    return renderer.tokenize([renderer.prompt(*prompt)], ended=False)[0].token_ids


def learnt(renderer: Renderer, token_ids: list[int], mask: list[int]) -> str:
    return str(renderer.tokenizer.decode([t for t, m in zip(token_ids, mask, strict=True) if m]))


class TestPlainText:
    def test_prompt_and_answer_are_tokenised_apart(self, tokenizer: Tokenizer) -> None:
        renderer = Renderer(tokenizer)
        prompt, answer = encode(tokenizer, ["Q: ", "Aa"])
        full = renderer.full("Q: ", "Aa")
        assert full.token_ids == [*prompt, *answer, EOS]
        assert (full.num_prompt_tokens, full.answer_mask) == (3, [0, 0, 0, 1, 1, 1])
        assert prompt_ids(renderer, "Q: ") == prompt
        # Joined text would merge the space with the A: the prompt would be no prefix.
        (joined,) = encode(tokenizer, ["Q: Aa"])
        assert joined[: len(prompt)] != prompt

    def test_an_answer_that_was_cut_or_brings_its_end(self, tokenizer: Tokenizer) -> None:
        renderer = Renderer(tokenizer)
        cut = renderer.full("q", "ab", ended=False)
        assert cut.token_ids == encode(tokenizer, ["qab"])[0]
        assert renderer.full("q", "ab<eos>") == renderer.full("q", "ab")

    def test_a_text_begins_as_its_tokenizer_begins_one(self, llama3: Tokenizer) -> None:
        renderer = Renderer(llama3)
        begin = llama3.bos_token_id
        q, a = encode(llama3, ["q", "a"])
        assert prompt_ids(renderer, "q") == [begin, *q]
        assert renderer.full("q", "a").token_ids == [begin, *q, *a, EOS]
        assert renderer.full("<|begin|>q", "a") == renderer.full("q", "a")
        (text,) = renderer.tokenize([renderer.text("q")])
        assert text.token_ids == [begin, *q, EOS]
        assert text.answer_mask == [1, 1, 1]

    def test_what_is_written_has_no_start_token(self, llama3: Tokenizer) -> None:
        renderer = Renderer(llama3)
        assert renderer.visible_text(renderer.prompt("q")) == "q"
        assert renderer.visible_text(renderer.prompt("<|begin|>q<|begin|>")) == "q<|begin|>"
        header = "<|start_header_id|>user<|end_header_id|>"
        assert renderer.visible_text(renderer.prompt([user("q")])).startswith(header)

    def test_the_question_answer_layout(self, tokenizer: Tokenizer) -> None:
        renderer = Renderer(tokenizer, template("question_answer"))
        text = "Question: Why?\n\nAnswer: "
        assert renderer.visible_text(renderer.prompt("Why?")) == text
        # A prompt that has the layout already comes with its bare question.
        assert renderer.visible_text(renderer.prompt(text, "Why?")) == text
        assert renderer.full("Why?", "So.") == Renderer(tokenizer).full(text, "So.")
        chat = [user("Why?"), assistant("So."), user("How?")]
        whole = renderer.tokenize([renderer.prompt_and_answer(chat, "Thus.", every_answer=True)])[0]
        assert tokenizer.decode(whole.token_ids) == (
            f"{text}So.<eos>Question: How?\n\nAnswer: Thus.<eos>"
        )
        assert learnt(renderer, whole.token_ids, whole.answer_mask) == "So.<eos>Thus.<eos>"


class TestChat:
    SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"

    def test_chatml(self, chatml: Tokenizer) -> None:
        renderer = Renderer(chatml)
        prompt = f"{self.SYSTEM}<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        assert renderer.visible_text(renderer.prompt([user("Why?")])) == prompt
        full = renderer.full([user("Why?")], "So.")
        # Ends in the end of turn, once; the line break that the template writes after it is no
        # answer's.
        assert chatml.decode(full.token_ids) == f"{prompt}So.<|im_end|>"
        assert full.token_ids[: full.num_prompt_tokens] == prompt_ids(renderer, [user("Why?")])
        assert learnt(renderer, full.token_ids, full.answer_mask) == "So.<|im_end|>"
        assert renderer.full([user("Why?")], "So.", ended=False).token_ids == full.token_ids[:-1]

    def test_an_instruction_ends_plain_prompts_and_no_chats(self, chatml: Tokenizer) -> None:
        settings = TemplateConfig(kind="chat", instruction="Be sure.")
        renderer = Renderer(chatml, settings)
        assert renderer.messages("Question: Why?", "Why?") == [user("Why? Be sure.")]
        assert renderer.full("Why?", "So.") == Renderer(chatml).full([user("Why? Be sure.")], "So.")
        assert renderer.messages([user("Why?")]) == [user("Why?")]

    def test_an_instruction_without_a_chat_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"template\.instruction has no effect"):
            TemplateConfig(instruction="Be sure.")

    def test_llama3_begins_once(self, llama3: Tokenizer) -> None:
        renderer = Renderer(llama3)
        full = renderer.full([user(" Why? ")], "So.")
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        assert llama3.decode(full.token_ids) == (
            f"<|begin|>{header.format('user')}Why?<|eot_id|>{header.format('assistant')}So.<|eot_id|>"
        )
        assert full.token_ids.count(llama3.bos_token_id) == 1
        assert renderer.end_of_turn_id == llama3.convert_tokens_to_ids("<|eot_id|>")

    @pytest.mark.parametrize("name", ["chatml", "llama3"])
    def test_the_prompt_is_a_prefix_whatever_the_texts(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        renderer = Renderer(request.getfixturevalue(name))
        texts = ["A", " A ", "\nA", "a\n\n", "{{ x }}", "é", "Question: A"]
        for question in texts:
            for answer in texts:
                full = renderer.full([user(question)], answer)
                known = prompt_ids(renderer, [user(question)])
                assert full.token_ids[: len(known)] == known
                assert full.num_prompt_tokens == len(known)
                assert full.token_ids.count(renderer.end_of_turn_id) == (
                    3 if name == "chatml" else 2
                )

    def test_every_answer_of_a_chat(self, chatml: Tokenizer) -> None:
        renderer = Renderer(chatml)
        chat = [user("a"), assistant("one"), user("b"), assistant("one"), user("c")]
        layout = renderer.prompt_and_answer(chat, "three", every_answer=True)
        (every,) = renderer.tokenize([layout])
        assert learnt(renderer, every.token_ids, every.answer_mask) == (
            "one<|im_end|>one<|im_end|>three<|im_end|>"
        )
        (last,) = renderer.tokenize([renderer.prompt_and_answer(chat, "three")])
        assert last.token_ids == every.token_ids
        assert learnt(renderer, last.token_ids, last.answer_mask) == "three<|im_end|>"

    def test_plain_prompts_become_a_turn_where_chat_is_asked_for(self, chatml: Tokenizer) -> None:
        renderer = Renderer(chatml, template("chat"))
        wanted = Renderer(chatml).full([user("Why?")], "So.")
        assert renderer.full("Why?", "So.") == wanted
        layout = renderer.prompt_and_answer("Question: Why?\n\nAnswer: ", "So.", question="Why?")
        assert renderer.tokenize([layout]) == [wanted]
        assert Renderer(chatml).messages("Why?") is None

    def test_variables_reach_the_template(self, chatml: Tokenizer) -> None:
        chatml.chat_template += "{% if thinks is false %}{{ '<think></think>' }}{% endif %}"
        renderer = Renderer(chatml, template("auto", thinks=False))
        assert renderer.visible_text(renderer.prompt([user("a")])).endswith("<think></think>")

    def test_a_template_without_an_end_of_turn_ends_in_eos(self, tokenizer: Tokenizer) -> None:
        plain = Tokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
        plain.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
        renderer = Renderer(plain)
        layout = renderer.prompt_and_answer(
            [user("a"), assistant("b"), user("c")], "b", every_answer=True
        )
        (full,) = renderer.tokenize([layout])
        assert plain.decode(full.token_ids) == "user: a\nassistant: b\nuser: c\nassistant: b<eos>"
        assert learnt(renderer, full.token_ids, full.answer_mask) == "bb<eos>"
        assert renderer.end_of_turn_id == EOS


class TestRefusals:
    def test_no_template(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(DataError, match=r"no chat template.*template\.kind to question_answer"):
            Renderer(tokenizer).prompt([user("a")])
        with pytest.raises(DataError, match="no chat template"):
            Renderer(tokenizer, template("chat"))
        assert Renderer(tokenizer).end_of_turn_id is None

    def test_no_eos(self, tokenizer: Tokenizer) -> None:
        without = Tokenizer(tokenizer_object=tokenizer.backend_tokenizer)
        with pytest.raises(DataError, match="no end-of-sequence token"):
            Renderer(without)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{{ 'hello' }}", "drops the user's text"),
            ("{{ messages[0]['content'] }}", "drops the assistant's text"),
            ("{{ raise_exception('no turns') }}", "refuses it: no turns"),
        ],
    )
    def test_templates_that_lose_text(self, chatml: Tokenizer, text: str, message: str) -> None:
        chatml.chat_template = text
        with pytest.raises(DataError, match=message):
            Renderer(chatml, template("chat"))
        with pytest.raises(DataError, match=message):
            Renderer(chatml).tokenize([Renderer(chatml).prompt([user("hello")])])

    def test_a_template_that_ends_turns_with_the_pad(self, chatml: Tokenizer) -> None:
        chatml.pad_token = "<|im_end|>"
        with pytest.raises(DataError, match="ends a turn with the pad token"):
            Renderer(chatml, template("chat"))

    def test_a_prompt_that_is_no_prefix(self, chatml: Tokenizer) -> None:
        renderer = Renderer(chatml)
        chatml.chat_template = CHANGES_WITH_THE_NUMBER_OF_TURNS
        with pytest.raises(BadRow) as caught:
            renderer.prompt_and_answer([user("a")], "b")
        assert caught.value.reason == "template_not_prefix"

    def test_a_turn_that_is_dropped(self, chatml: Tokenizer) -> None:
        renderer = Renderer(chatml)
        chatml.chat_template = chatml.chat_template.replace("in messages", "in messages[-2:]")
        with pytest.raises(BadRow) as caught:
            renderer.prompt([user("first"), assistant("b"), user("c")])
        assert caught.value.reason == "template_drops_prompt"

    def test_arguments_that_the_renderer_sets_itself(self) -> None:
        with pytest.raises(ValueError, match="'add_generation_prompt' \\(set by the renderer\\)"):
            template("chat", add_generation_prompt=False)


CHANGES_WITH_THE_NUMBER_OF_TURNS = (
    "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
)
