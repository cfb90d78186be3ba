import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config import Config, load, resolve
from rlhf_ray.config.identity import differences
from rlhf_ray.config.rewards import ModelSourceConfig
from rlhf_ray.errors import ConfigError

JUDGE = {"type": "judge", "url": "http://localhost:8000/v1", "model": "m"}


def test_the_default_is_the_runs_reward_model() -> None:
    config = Config()
    assert config.rewards == [ModelSourceConfig()]
    assert config.rewards[0].name == "model"
    assert config.needs_reward_model


@pytest.mark.parametrize(
    ("sources", "needed"),
    [
        ([{"type": "rouge"}], False),
        ([{"type": "model", "path": "x"}], False),
        ([{"type": "rouge"}, {"type": "model"}], True),
    ],
)
def test_whether_the_reward_model_is_needed(sources: list[Any], needed: bool) -> None:
    assert resolve({"rewards": sources}).needs_reward_model == needed
    # A critic that starts from the reward model needs it, whatever gives the rewards.
    critic = {"critic": {"init": "reward"}}
    assert resolve({"rewards": sources} | critic).needs_reward_model


def test_a_source_is_called_by_its_type_or_its_name() -> None:
    config = resolve({"rewards": [{"type": "rouge"}, {"type": "rouge", "name": "r1"}, JUDGE]})
    assert [source.name for source in config.rewards] == ["rouge", "r1", "judge"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, r"rewards\.0: Unable to extract tag using discriminator 'type'"),
        ({"type": "juge"}, r"rewards\.0: Input tag 'juge' .* 'judge', 'remote'"),
        (
            {"type": "rouge", "colum": "x"},
            r"rewards\.0\.rouge\.colum: unknown key .* rewards\.colu",
        ),
        ({"type": "rouge", "name": "a b"}, r"rewards\.0\.rouge\.name: .* got 'a b'"),
        ({"type": "rouge", "clip": 0.0}, r"rewards\.0\.rouge\.clip: .*greater than 0"),
        ({"type": "function", "function": "f"}, r"function\.function: .* got 'f'"),
        (JUDGE | {"url": "localhost:8000"}, r"judge\.url: .* got 'localhost:8000'"),
        (
            JUDGE | {"template": "Rate {prompt}"},
            r"template: lacks \{response\}, without which",
        ),
        (
            JUDGE | {"pattern": "(a)(b)"},
            r"pattern: '\(a\)\(b\)' has 2 groups; it needs exactly",
        ),
        (JUDGE | {"pattern": "("}, r"pattern: '\(' is not a regular expression"),
        (JUDGE | {"lowest": 10.0}, r"lowest 10 must be less than highest 10"),
        (
            JUDGE | {"on_bad_answer": "score"},
            r"score and bad_answer_score need each other",
        ),
        (
            JUDGE | {"bad_answer_score": 1.0},
            r"score and bad_answer_score need each other",
        ),
        (JUDGE | {"request": {"messages": []}}, r"'messages' \(set by template\)"),
        # 2 attempts of 300 s and a wait of 1 s between them
        (
            JUDGE | {"timeout_s": 300.0, "retries": 1},
            r"judge: a request may take 601 s .* cluster\.call_timeout_s is 600 s; lower",
        ),
        # less than the deadline of a call, but more than what a source has of it
        (
            JUDGE | {"timeout_s": 275.0, "retries": 1},
            r"judge: a request may take 551 s .* still for 540 s, .*call_timeout_s is 600 s; lower",
        ),
    ],
)
def test_what_is_refused(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve({"rewards": [source]})


def test_equal_names_and_no_source_are_refused() -> None:
    with pytest.raises(ConfigError, match="several sources named judge; give each a"):
        resolve({"rewards": [JUDGE, JUDGE]})
    with pytest.raises(ConfigError, match="rewards: List should have at least 1 item"):
        resolve({"rewards": []})


def test_sources_by_override() -> None:
    config = load(None, ["rewards=[{type: rouge, weight: 2}, {type: model}]"])
    assert [(source.type, source.weight) for source in config.rewards] == [
        ("rouge", 2.0),
        ("model", 1.0),
    ]


@pytest.mark.parametrize(
    ("change", "same_run"),
    [({"url": "http://other/v1", "retries": 1}, True), ({"model": "n"}, False)],
)
def test_a_judge_may_move_but_not_change(change: dict[str, Any], same_run: bool) -> None:
    saved = resolve({"rewards": [JUDGE]}).model_dump(mode="json")
    now = resolve({"rewards": [JUDGE | change]})
    assert (differences(saved, now, ["ppo"]) == []) == same_run


DOCS = Path(__file__).parents[3] / "docs" / "rewards.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)


def test_the_docs_show_every_type_in_a_config_that_is_valid() -> None:
    configs = [resolve(yaml.safe_load(snippet)) for snippet in snippets("yaml")]
    shown = {source.type for config in configs for source in config.rewards}
    assert shown == {"model", "classifier", "rouge", "function", "judge", "remote"}


def test_the_functions_in_the_docs_are_those_of_its_configs() -> None:
    code: dict[str, Any] = {"__name__": "my_rewards"}
    for snippet in snippets("python"):
        exec(snippet, code)
    sources = [
        s for snippet in snippets("yaml") for s in yaml.safe_load(snippet).get("rewards", ())
    ]
    for name in [s["function"].partition(":")[2] for s in sources if s["type"] == "function"]:
        assert callable(code[name])
    assert code["exact"](["p", "p"], ["It is 4. ", "5"], ["4.", None]) == [1.0, None]
    assert code["compute_score"]("gsm8k", "so 42", "42") == 1.0
    assert code["reward_func"](["why? so", "why? no"], ["why? "] * 2, ["so", "so"]) == [1.0, 0.0]
    assert code["brief"](["x" * 50]) == [-0.5]
