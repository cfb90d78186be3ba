import itertools
import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.serving.text_generation import Sampling, TextGenerator

PROMPT = [5, 6, 7, 8]


def generator(base: Path, **sampling: object) -> TextGenerator:
    values = {"temperature": 1.0, "max_tokens": 6, "stop_token_ids": (1,)}
    return TextGenerator(str(base), ModelConfig(), Sampling(**(values | sampling)))  # type: ignore[arg-type]


def test_at_temperature_zero_each_token_is_the_likeliest(base: Path) -> None:
    found = generator(base, temperature=0.0, stop_token_ids=(299,))
    model, ids = load_causal_lm(str(base), ModelConfig()), list(PROMPT)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = found.tokenizer.decode(ids[4:], skip_special_tokens=True)
    assert found.answer(PROMPT, seed=0) == found.answer(PROMPT, seed=1) == expected


def test_the_seed_decides_a_sample(base: Path) -> None:
    found = generator(base, max_tokens=12)
    first = found.answer(PROMPT, seed=0)
    assert found.answer(PROMPT, seed=0) == first
    assert any(found.answer(PROMPT, seed=seed) != first for seed in range(1, 4))


def test_pieces_of_a_stream_are_the_answer(base: Path) -> None:
    found = generator(base, max_tokens=12)
    pieces = list(found.stream(PROMPT, seed=3))
    assert "".join(pieces) == found.answer(PROMPT, seed=3)


def test_a_piece_comes_before_the_answer_is_done(base: Path) -> None:
    found = generator(base, max_tokens=60, stop_token_ids=(299,))
    passes, go_on = itertools.count(1), threading.Event()
    waited: list[bool] = []

    def wait_near_the_end(*_: object) -> None:
        if next(passes) == 50:
            waited.append(go_on.wait(5))

    found._model.register_forward_pre_hook(wait_near_the_end)
    pieces = found.stream(PROMPT, seed=1)
    first = next(piece for piece in pieces if piece)
    go_on.set()
    rest = "".join(pieces)
    assert waited == [True]  # the piece was there while ten tokens were still to be drawn
    assert first + rest == found.answer(PROMPT, seed=1)


def test_every_stop_token_ends_an_answer(base: Path) -> None:
    greedy = generator(base, temperature=0.0, stop_token_ids=(299,))
    output = greedy._generate(PROMPT, 0)[0].tolist()
    first = output[4]
    stopped = generator(base, temperature=0.0, stop_token_ids=(299, first))
    assert stopped._generate(PROMPT, 0)[0].tolist() == output[:5]


def test_no_answer_is_shorter_than_min_tokens(base: Path) -> None:
    ends = tuple(range(0, 300, 2))
    found = generator(base, stop_token_ids=ends, min_tokens=4, max_tokens=12)
    answers = [found._generate(PROMPT, seed)[0].tolist()[4:] for seed in range(8)]
    assert all(token % 2 for answer in answers for token in answer[:4])
    assert all((len(answer) > 4 and answer[-1] % 2 == 0) or len(answer) == 12 for answer in answers)
    short = generator(base, stop_token_ids=ends, min_tokens=4, max_tokens=2)
    assert len(short._generate(PROMPT, 0)[0]) == 6


def test_a_stop_string_ends_an_answer_and_stays_in_it(base: Path) -> None:
    whole = generator(base, max_tokens=12, stop_token_ids=(299,))
    found = generator(base, max_tokens=12, stop_token_ids=(299,), stop=("s", "o"), min_tokens=2)
    ended = 0
    for seed in range(3):
        tokens, uncut = (g._generate(PROMPT, seed)[0].tolist()[4:] for g in (found, whole))
        assert uncut[: len(tokens)] == tokens
        spelt = [found.tokenizer.decode(tokens[2:end]) for end in (len(tokens) - 1, len(tokens))]
        assert not set("so") & set(spelt[0])
        assert set("so") & set(spelt[1]) or len(tokens) == 12
        ended += bool(set("so") & set(spelt[1]))
        assert "".join(found.stream(PROMPT, seed)) == found.answer(PROMPT, seed)
    assert ended


def test_the_generation_config_of_the_folder_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    own = {"do_sample": True, "repetition_penalty": 3.0, "min_p": 0.1}
    GenerationConfig(**own).save_pretrained(folder)
    found, plain = (generator(path, max_tokens=12) for path in (folder, base))
    for seed in range(4):
        assert found._generate(PROMPT, seed).tolist() == plain._generate(PROMPT, seed).tolist()


def test_a_failure_is_raised_where_the_stream_is_read(base: Path) -> None:
    with pytest.raises(Exception, match=r".+"):
        list(generator(base).stream([100_000], seed=0))


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_top_k_1_and_a_tiny_top_p_give_the_likeliest_token(
    base: Path, cut: dict[str, float]
) -> None:
    greedy = generator(base, temperature=0.0, **cut).answer(PROMPT, seed=0)
    assert generator(base, **cut).answer(PROMPT, seed=0) == greedy
