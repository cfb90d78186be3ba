"""A config that is too large, too deep or not made of plain values is one message."""

from pathlib import Path

import pytest

from rlhf_ray.config import load, resolve
from rlhf_ray.errors import ConfigError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
FILES = {
    "an anchor that contains itself": ("ppo: &a\n  x: *a\n", "contains itself"),
    "a list that contains itself": ("a: &a [*a]\n", "contains itself"),
    "an alias bomb": (BOMB, "more than 100000 values"),
    "deep nesting": ("[" * 100_000, "nested too deeply"),
    "nesting that can be read": ("a: " + "[" * 60 + "]" * 60, "more than 40 levels"),
    "an integer of 5000 digits": ("run: {seed: " + "1" * 5000 + "}", "cannot read"),
    "an integer of 4000 digits": ("run: {seed: " + "1" * 4000 + "}", "more than 63 bits"),
    "a date that is none": ("run: {name: 2024-13-45}", "cannot read"),
    "a date": ("run: {name: 2024-01-01}", "a date"),
    "a tagged scalar": ("run: {seed: !!int x}", "cannot read"),
    "a tagged boolean": ("run: {seed: !!bool x}", "cannot read"),
    "a tagged time": ("run: {seed: !!timestamp x}", "cannot read"),
    "bytes": ("run: {name: !!binary aGk=}", "a bytes"),
    "a set": ("run: {name: !!set {a, b}}", "a set"),
    "Python code": ("run: {name: !!python/object/apply:os.system [ls]}", "not valid YAML"),
    "NUL": ('run: {name: "a\\0b"}', "the character NUL"),
    "a lone surrogate": ('run: {name: "\\ud800"}', "half a character"),
    "a mapping as a key": ("? {a: b}\n: c\n", "not valid YAML"),
    "a key twice": ("ppo: {iterations: 1}\nppo: {batch_size: 8}\n", "ppo stands here twice"),
    "an octal number": ("run: {seed: 010}", "010 would be read in base 8"),
    "a number in base 60": ("run: {seed: 1:30}", "1:30 would be read in base 60"),
    "a fraction in base 60": ("ppo: {kl_coef: 1:30.5}", "read in base 60"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "a tab": ("run:\n\tname: x\n", "not valid YAML"),
    "numbers as keys": ("1: 2\n", "1: "),
    "null as a key": ("null: 2\n", "None"),
    "NUL in extends": ('extends: "a\\0b"\n', "NUL"),
    "an over-long extends": ("extends: " + "a" * 5000 + "\n", "cannot be read"),
    "a list in extends": ("extends: [a.yaml]\n", "must be the name of one file"),
    "an empty extends": ('extends: ""\n', "does not exist"),
    "a folder in extends": ("extends: .\n", "does not exist"),
}


@pytest.mark.parametrize("name", FILES)
def test_an_odd_file_is_refused_with_one_message(tmp_path: Path, name: str) -> None:
    text, says = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert says in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", [name for name in FILES if "extends" not in name])
def test_an_odd_parent_is_refused_alike(tmp_path: Path, name: str) -> None:
    (tmp_path / "parent.yaml").write_text(FILES[name][0])
    (tmp_path / "config.yaml").write_text("extends: parent.yaml\nppo: {iterations: 1}\n")
    with pytest.raises(ConfigError):
        load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "a=&a [*a]",
        "run.seed=" + "1" * 5000,
        "a=" + "[" * 100_000,
        "run.name=2024-13-45",
        "a" + ".a" * 5000 + "=1",
        "run.seed=!!int x",
        "run.name=!!binary aGk=",
    ],
)
def test_an_odd_override_is_refused_alike(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert len(str(error.value)) < 1000 + len(override.partition("=")[0])


def test_a_mapping_of_python_that_contains_itself_is_refused() -> None:
    values: dict[str, object] = {}
    values["ppo"] = values
    with pytest.raises(ConfigError, match="contains itself"):
        resolve(values)


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize(
    "key",
    [
        "ppo.learning_rate",
        "ppo.kl_coef",
        "rollout.temperature",
        "lora.alpha",
        "lora.dropout",
        "rewards",
        "sft.learning_rate",
        "critic.learning_rate",
        "cluster.start_timeout_s",
        "rollout.engine_args.x",
        "model.kwargs.x",
        "rollout.top_p",
        "ppo.kl_target",
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_its_key(key: str, number: str) -> None:
    override = f"{key}={number}" if key != "rewards" else f"rewards=[{{weight: {number}}}]"
    with pytest.raises(ConfigError, match=key.removesuffix(".x")):
        load(None, [override])


@pytest.mark.parametrize("seed", [-1, 2**32, 10**26])
def test_a_seed_that_libraries_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"run\.seed|63 bits"):
        load(None, [f"run.seed={seed}"])
    assert load(None, ["run.seed=4294967295"]).run.seed == 2**32 - 1


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///v1",
        "http://:80/v1",
        "http://[::1/v1",
        "http://h:99999",
        "http://h:x",
        "http://h h/v1",
        "http://?x=1",
    ],
)
def test_an_address_without_a_host_is_refused(url: str) -> None:
    judge = f"{{type: judge, model: m, url: '{url}'}}"
    for override in (f"rewards=[{judge}]", f"trackers.mlflow={{tracking_uri: '{url}'}}"):
        with pytest.raises(ConfigError, match=r"url|tracking_uri"):
            load(None, [override])


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "../x", "a\\b", "a\x1b[31mb", "a\nb", "a\x07", "\u202ea", "a" * 101]
)
def test_a_run_has_a_name_that_is_the_name_of_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        resolve({"run": {"name": name}})
    assert load(None, ["run.name=Lauf 7 (ä)"]).run.dir == "runs/Lauf 7 (ä)"


@pytest.mark.parametrize("key", ["run.dir", "model.path", "prepare.posts", "data.sft.path"])
def test_a_path_that_no_file_system_takes_is_refused(key: str) -> None:
    for path in ("/tmp/" + "a" * 300, "a/" * 3000):
        with pytest.raises(ConfigError, match=r"(dir|path|posts): is no path: ") as error:
            load(None, [f"{key}={path}"])
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "override",
    [
        "generators.num=1000000000",
        "policy.num_ranks=1000000000",
        "evaluate.bootstrap=99999999999",
        "cluster.env={'': a}",
        "cluster.env={'A=B': a}",
        "run.name=' '",
        "run.dir=' '",
    ],
)
def test_what_would_fail_or_hang_later_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load(None, [override])


def test_an_override_of_one_section_leaves_another_that_shared_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lora: &l {r: 2}\ndpo: {lora: *l}\n")
    config = load(path, ["lora.r=4"])
    assert (config.lora.r, config.dpo.lora.r) == (4, 2)
