from pathlib import Path

import pytest
import torch

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.models.text_generation import Sampling, TextGenerator

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


def test_every_stop_token_ends_an_answer(base: Path) -> None:
    greedy = generator(base, temperature=0.0, stop_token_ids=(299,))
    output = greedy._generate(PROMPT, 0)[0].tolist()
    first = output[4]
    stopped = generator(base, temperature=0.0, stop_token_ids=(299, first))
    assert stopped._generate(PROMPT, 0)[0].tolist() == output[:5]


def test_a_failure_reaches_whoever_reads_the_stream(base: Path) -> None:
    with pytest.raises(Exception, match=r".+"):
        list(generator(base).stream([100_000], seed=0))


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_with_one_token_to_choose_from_a_sample_is_the_likeliest(
    base: Path, cut: dict[str, float]
) -> None:
    greedy = generator(base, temperature=0.0, **cut).answer(PROMPT, seed=0)
    assert generator(base, **cut).answer(PROMPT, seed=0) == greedy
