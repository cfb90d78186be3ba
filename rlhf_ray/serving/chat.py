"""The command chat: a conversation in the terminal with one of a run's models."""

from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.reading.chats import Message
from rlhf_ray.errors import DataError
from rlhf_ray.runs.models import find_model
from rlhf_ray.serving.text_generation import load_generator, prompt_ids

COMMANDS = "Enter sends; /new starts a new conversation; /quit or the end of input quits."


def run(
    config: Config,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    model: str,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> None:
    """Answer each line as it comes, with the conversation before it as context.

    Raises:
        DataError: no such model, or a message is too long.
    """
    chosen = find_model(config, model)
    generator = load_generator(config, chosen, temperature=temperature, max_tokens=max_tokens)
    limit = config.model.max_length - (max_tokens or config.rollout.max_tokens)
    write(f"{chosen.name} ({chosen.path}). {COMMANDS}\n")
    messages: list[Message] = []
    num_answers = 0
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            messages = []
        if not text or text == "/new":
            continue
        messages.append({"role": "user", "content": text})
        ids, messages = _fit(config, generator.tokenizer, messages, limit)
        answer = ""
        for piece in generator.stream(ids, config.run.seed + num_answers):
            answer += piece
            write(piece)
        write("\n")
        num_answers += 1
        messages.append({"role": "assistant", "content": answer})


def _fit(
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
