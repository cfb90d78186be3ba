"""The command chat: a conversation in the terminal with a run's models, side by side."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.reading.chats import Message
from rlhf_ray.errors import DataError
from rlhf_ray.runs.models import RunModel, find_model
from rlhf_ray.serving.text_generation import Generators, prompt_ids

COMMANDS = "Enter sends; /new starts a new conversation; /quit or the end of input quits."


@dataclass
class _Conversation:
    """One model's side of a chat: each has its own answers as context."""

    model: RunModel
    messages: list[Message] = field(default_factory=list[Message])


def run(
    config: Config,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    models: Sequence[str],
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> None:
    """Answer each line as it comes, with the conversation before it as context.

    Several models answer one after the other, each under its name and from its own conversation.

    Raises:
        DataError: no such model, or a message is too long.
    """
    conversations = [_Conversation(find_model(config, name)) for name in models]
    generators = Generators(config, temperature=temperature, max_tokens=max_tokens)
    for each in conversations:
        generators.of(each.model)  # what cannot be loaded is refused before the first line
        write(f"{each.model.name} ({each.model.path})\n")
    write(f"{COMMANDS}\n")
    limit = config.model.max_length - (max_tokens or config.rollout.max_tokens)
    num_lines = 0
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            for each in conversations:
                each.messages = []
        if not text or text == "/new":
            continue
        for each in conversations:
            if len(conversations) > 1:
                write(f"{each.model.name}: ")
            each.messages.append({"role": "user", "content": text})
            generator = generators.of(each.model)
            ids, each.messages = fitting(config, generator.tokenizer, each.messages, limit)
            answer = ""
            for piece in generator.stream(ids, config.run.seed + num_lines):
                answer += piece
                write(piece)
            write("\n")
            each.messages.append({"role": "assistant", "content": answer})
        num_lines += 1


def fitting(
    config: Config, tokenizer: PreTrainedTokenizerBase, messages: list[Message], limit: int
) -> tuple[list[int], list[Message]]:
    """Return the conversation's token ids and turns, the oldest dropped until ``limit`` is kept."""
    while True:
        ids = prompt_ids(config, tokenizer, messages)
        if len(ids) <= limit:
            return ids, messages
        if len(messages) == 1:
            raise DataError(
                f"The message has {len(ids)} tokens, but model.max_length "
                f"{config.model.max_length} leaves {limit} beside the longest answer; shorten it, "
                "lower --max-tokens, or raise model.max_length"
            )
        messages = messages[2:]
