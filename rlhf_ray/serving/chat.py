"""The command chat: a conversation with one of a run's models, in the terminal."""

from collections.abc import Callable, Iterable

from rlhf_ray.config import Config
from rlhf_ray.data.reading.chats import Message
from rlhf_ray.errors import DataError
from rlhf_ray.runs.models import find_model
from rlhf_ray.serving.text_generation import load_generator, prompt_ids

COMMANDS = "Enter says it; /new starts anew; /quit or the end of input ends."


def run(
    config: Config,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    model: str,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> None:
    """Answer each line as it comes, with all that was said before it.

    Args:
        config: the run's.
        lines: what the person says; ends when they do.
        write: shows a piece of text, without adding a line end.
        model: as in `find_model`.
        temperature: None: ``rollout.temperature``.
        max_tokens: longest answer; None: ``rollout.max_tokens``.

    Raises:
        DataError: no such model.
    """
    chosen = find_model(config, model)
    generator = load_generator(config, chosen, temperature=temperature, max_tokens=max_tokens)
    limit = config.model.max_length - (max_tokens or config.rollout.max_tokens)
    write(f"{chosen.name} ({chosen.path}). {COMMANDS}\n")
    said: list[Message] = []
    num_answers = 0
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            said = []
        if not text or text == "/new":
            continue
        said.append({"role": "user", "content": text})
        ids, said = _that_fits(config, generator.tokenizer, said, limit)
        answer = ""
        for piece in generator.stream(ids, config.run.seed + num_answers):
            answer += piece
            write(piece)
        write("\n")
        num_answers += 1
        said.append({"role": "assistant", "content": answer})


def _that_fits(
    config: Config, tokenizer: object, said: list[Message], limit: int
) -> tuple[list[int], list[Message]]:
    """The conversation's token ids, its oldest turns left out until ``limit`` is kept.

    Raises:
        DataError: the last line alone is too long.
    """
    while True:
        ids = prompt_ids(config, tokenizer, said)
        if len(ids) <= limit:
            return ids, said
        if len(said) == 1:
            raise DataError(
                f"What was said has {len(ids)} tokens; with the longest answer, model.max_length "
                f"{config.model.max_length} leaves {limit}. Say less, or raise it"
            )
        said = said[2:]
