"""The configs that ship with the package, by name: ``@quickstart``, ``@stackllama/ppo``."""

import difflib
import re
from importlib import metadata
from pathlib import Path

from rlhf_ray.errors import ConfigError

_ONE_OF_THEM = "configs/quickstart.yaml"


def located(name: str) -> Path:
    """Return the path of the shipped config that ``@name`` stands for."""
    name = name.removeprefix("@")
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5) or names()
        raise ConfigError(
            f"There is no shipped config @{name}; did you mean @{' or @'.join(near)}?"
        )
    return folder() / f"{name}.yaml"


def names() -> list[str]:
    """Return the names of all shipped configs."""
    root = folder()
    files = [file.relative_to(root).with_suffix("") for file in root.rglob("*.yaml")]
    return sorted(file.as_posix() for file in files if file.parts[0] != "ci")


def copy(name: str) -> str:
    """Return a shipped config's text for a file in any folder: its parent is named by ``@``."""
    file = located(name)

    def parent(match: re.Match[str]) -> str:
        path = (file.parent / match[1].strip("\"'")).resolve().relative_to(folder().resolve())
        return f'extends: "@{path.with_suffix("").as_posix()}"'

    return re.sub(r"^extends: *(\S+)$", parent, file.read_text("utf-8"), flags=re.MULTILINE)


def folder() -> Path:
    """Return the folder of the shipped configs, in the checkout or the installed wheel.

    Raises:
        ConfigError: the installation is not whole.
    """
    checkout = Path(__file__).parents[2]
    if (checkout / _ONE_OF_THEM).is_file():
        return checkout / "configs"
    for file in metadata.files("rlhf-ray") or ():
        if file.as_posix().endswith(f"share/rlhf_ray/{_ONE_OF_THEM}"):
            return Path(str(file.locate())).resolve().parent
    raise ConfigError("The shipped configs are not installed; install rlhf-ray again")
