import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.models.stopping import stop_token_ids

CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def copy(base: Path, folder: Path, eos: int | list[int], chat: bool) -> str:
    """The base with other ends in its generation config, and a chat template."""
    path = Path(shutil.copytree(base, folder / "model"))
    GenerationConfig(eos_token_id=eos).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return str(path)


def test_all_that_the_generation_config_lists_but_never_the_pad(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = copy(base, tmp_path, eos=[7, pad, 9], chat=False)
    assert stop_token_ids(model) == tuple(sorted({eos, 7, 9}))
    assert stop_token_ids(str(base)) == (eos,)


def test_the_end_of_turn_of_the_chat_template(base: Path, tmp_path: Path) -> None:
    model = copy(base, tmp_path, eos=7, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    eos = tokenizer.eos_token_id
    assert stop_token_ids(model) == tuple(sorted({eos, 7, end}))
    without = TemplateConfig(kind="question_answer")
    assert stop_token_ids(model, without) == tuple(sorted({eos, 7}))
