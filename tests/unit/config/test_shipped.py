"""Configs that ship, by name."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import dump, load, shipped
from rlhf_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_a_name_stands_for_a_file() -> None:
    assert load("@quickstart") == load(ROOT / "configs" / "quickstart.yaml")


def test_a_file_extends_a_shipped_config(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: '@quickstart'\nrun: {seed: 7}\n")
    assert load(tmp_path / "mine.yaml").run.seed == 7
    assert load(tmp_path / "mine.yaml").ppo == load("@quickstart").ppo


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean @quickstart"):
        load("@quickstrat")


@pytest.mark.parametrize("name", shipped.names())
def test_a_copy_says_the_same_wherever_it_lies(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", name, "--out", str(tmp_path / "copy.yaml")])
    assert done.exit_code == 0, done.output
    assert dump(load(tmp_path / "copy.yaml")) == dump(load(f"@{name}"))


def test_init_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init"]).exit_code == 0
    (tmp_path / "quickstart.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists; name another file with --out"):
        CliRunner().invoke(app, ["init"], catch_exceptions=False)
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
