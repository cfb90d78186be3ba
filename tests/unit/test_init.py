"""The config that ``rlhf-ray init`` writes, from answers on a terminal or from options."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from transformers import AutoConfig
from typer.testing import CliRunner

from rlhf_ray.cli import answers as answers_module
from rlhf_ray.cli import app, starting
from rlhf_ray.config import Config, load
from rlhf_ray.errors import ConfigError, DataError, PlacementError

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
PROMPT = {"prompt": "Why?"}
KNOWN = "Qwen/Qwen3-8B"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a model that planning can size, a dataset of each kind, no GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answers_module, "gpus_here", lambda: "none")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    AutoConfig.for_model("qwen2", **shape, **heads).save_pretrained(tmp_path / "model")
    rows = {"pairs": PAIR, "chats": CHAT, "prompts": PROMPT, "odd": {"body": "So."}}
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    Path("empty.jsonl").touch()
    Path("mine.py").write_text("def score(completions, **columns): return [1.0] * 8\n")
    return tmp_path


def init(*options: str, typed: Sequence[str] = ()) -> Result:
    lines = "".join(f"{line}\n" for line in typed)
    return CliRunner().invoke(app, ["init", *options], input=lines, catch_exceptions=False)


def written(*options: str) -> Config:
    done = init(*options, "--out", "out.yaml")
    assert done.exit_code == 0, done.output
    return load("out.yaml")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "is_terminal", lambda: True)


@pytest.mark.usefixtures("terminal")
def test_enter_at_every_question_gives_the_quick_start() -> None:
    done = init(typed=["", "", "", ""])
    assert done.exit_code == 0, done.output
    assert load("tiny.yaml").ppo == load("@quickstart").ppo
    assert load("tiny.yaml").run.stages == load("@quickstart").run.stages
    assert "rlhf-ray run tiny.yaml" in done.output


@pytest.mark.usefixtures("terminal")
def test_a_bad_answer_is_asked_again_with_one_sentence() -> None:
    Path("taken.yaml").write_text("mine")
    typed = ["nobody/knows", "model", "gone.jsonl", "odd.jsonl", "prompts.jsonl", "some/pairs"]
    typed += ["pears", "demonstrations", "", "gone.py:f", "mine.py", "mine.py:score", "1xA1"]
    done = init(typed=[*typed, "none", "taken.yaml", "own.yaml"])
    assert done.exit_code == 0, done.output
    complaints = ["no model folder here", "gone.jsonl does not exist", "match no format"]
    complaints += ["'pears' is none of", "gone.py does not exist", "mine.py names no function"]
    complaints += ["'A1' is not", "taken.yaml exists"]
    positions = [done.output.find(says) for says in complaints]
    assert -1 not in positions, done.output
    assert positions == sorted(positions)
    config = load("own.yaml")
    assert config.run.stages == ["sft", "ppo", "evaluate", "report"]
    assert config.data.sft is not None
    assert config.data.sft[0].path == "some/pairs"
    assert Path("taken.yaml").read_text() == "mine"


@pytest.mark.usefixtures("terminal")
def test_gpus_that_are_too_small_are_asked_for_again(folder: Path) -> None:
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    AutoConfig.for_model("llama", **large, **heads).save_pretrained(folder / "large")
    typed = ["large", "pairs.jsonl", "", "1xT4-16GB", "", "8xB200-192GB"]
    done = init(typed=typed)
    assert done.exit_code == 0, done.output
    assert "does not fit on 1xT4-16GB" in done.output
    assert "which fits on 8xB200-192GB" in done.output


@pytest.mark.parametrize(
    ("data", "stages"),
    [
        (("pairs.jsonl",), "sft reward ppo evaluate report"),
        (("chats.jsonl",), "sft report"),
        (("chats.jsonl", "pairs.jsonl", "prompts.jsonl"), "sft reward ppo evaluate report"),
        (("synthetic",), "prepare sft reward ppo evaluate report"),
        (("some/name=preferences",), "sft reward ppo evaluate report"),
    ],
)
def test_the_data_chooses_sections_and_stages(data: tuple[str, ...], stages: str) -> None:
    options = [part for path in data for part in ("--data", path)]
    config = written("--model", "model", *options, "--gpus", "none")
    assert config.run.stages == stages.split()
    assert (config.data.sft is None) == (data == ("synthetic",))
    sections = yaml.safe_load(Path("out.yaml").read_text())
    assert ("critic" in sections) == ("ppo" in stages.split())


def test_each_dataset_is_used_for_what_it_is_best_at(folder: Path) -> None:
    files = ("pairs", "chats", "prompts")
    options = [part for name in files for part in ("--data", f"{name}.jsonl")]
    data = written("--model", "model", *options).data
    used = (data.preferences, data.sft, data.prompts)
    paths = [source.path for sources in used for source in sources or ()]
    assert paths == [str(folder / f"{name}.jsonl") for name in files]


@pytest.mark.parametrize("reward", ["mine.py:score", "some/reward-model"])
def test_a_reward_stands_in_for_preferences(folder: Path, reward: str) -> None:
    options = ("--model", "model", "--data", "prompts.jsonl", "--reward", reward)
    config = written(*options)
    assert config.run.stages == ["ppo", "evaluate", "report"]
    is_model = reward == "some/reward-model"
    assert config.reward.path == (reward if is_model else None)
    named = [getattr(source, "function", None) for source in config.rewards]
    assert named == [None if is_model else f"{folder / 'mine.py'}:score"]


def test_the_tiny_model_pretrains_on_the_data() -> None:
    config = written("--model", "tiny", "--data", "pairs.jsonl")
    assert config.run.stages[0] == "pretrain"
    assert config.data.pretrain == config.data.sft


def test_a_preset_is_extended_and_laid_out_for_other_gpus() -> None:
    config = written("--model", KNOWN, "--data", "pairs.jsonl", "--gpus", "2x8xA100-80GB")
    preset = load("@models/qwen3_8b")
    assert (config.ppo.learning_rate, config.template) == (
        preset.ppo.learning_rate,
        preset.template,
    )
    text = Path("out.yaml").read_text()
    assert "# layout by plan --optimize" in text
    assert yaml.safe_load(text)["extends"] == "@models/qwen3_8b"
    fit = CliRunner().invoke(app, ["plan", "out.yaml", "--cluster", "2x8xA100-80GB"])
    assert fit.exit_code == 0, fit.output


def test_a_model_with_a_chat_template_gets_chats() -> None:
    Path("model/chat_template.jinja").write_text("{{ messages }}")
    assert written("--model", "model", "--data", "pairs.jsonl").template.kind == "chat"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (("--model", "tiny"), ConfigError, "--data is missing"),
        (("--data", "pairs.jsonl"), ConfigError, "--model is missing"),
        (("--model", "no/body", "--data", "pairs.jsonl"), DataError, "downloaded first"),
        (("--model", "model", "--data", "no/name"), ConfigError, "no/name=preferences"),
        (("--model", "model", "--data", "prompts.jsonl"), ConfigError, "give --reward"),
        (("--model", "model", "--data", "empty.jsonl"), DataError, "has no rows"),
        (("quickstart", "--gpus", "none"), ConfigError, "copied as it is"),
        (
            ("--model", KNOWN, "--data", "pairs.jsonl", "--gpus", "1xT4-16GB"),
            PlacementError,
            "does not fit on 1xT4-16GB",
        ),
    ],
)
def test_without_a_terminal_what_is_wrong_is_refused(
    options: tuple[str, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        init(*options, "--out", "out.yaml")
    assert not Path("out.yaml").exists()


def test_a_file_is_overwritten_only_with_force() -> None:
    options = ("--model", "tiny", "--data", "synthetic", "--out", "mine.yaml")
    Path("mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.yaml exists"):
        init(*options)
    assert Path("mine.yaml").read_text() == "mine"
    assert init(*options, "--force").exit_code == 0
    assert load("mine.yaml").run.name == "mine"
