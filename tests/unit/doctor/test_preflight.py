"""Checks of a machine: those that pass, note or fail, and their remedies."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.doctor import preflight
from rlhf_ray.doctor.preflight import FAIL, GB, MB, NOTE, OK, Check, Machine

GOOD = Machine(
    system="Linux",
    arch="x86_64",
    libc="glibc 2.36",
    cpu_flags=frozenset({"sse4_2", "avx2", "avx512f"}),
    cpus=2,
    python=(3, 11),
    has_headers=True,
    memory=16 * GB,
    disk=50 * GB,
    shm=8 * GB,
    compiler="/usr/bin/c++",
    gpus=(),
)
MAC = replace(GOOD, system="macOS", arch="arm64", libc="", cpu_flags=frozenset(), shm=None, cpus=8)


def by_name(machine: Machine, lock: str = "cpu", installed: bool = False) -> dict[str, Check]:
    return {check.name: check for check in preflight.check_machine(machine, lock, installed)}


def verdicts(machine: Machine) -> dict[str, str]:
    """The checks that are not ok."""
    return {name: c.verdict for name, c in by_name(machine).items() if c.verdict != OK}


def test_a_good_machine_passes_every_check() -> None:
    assert verdicts(GOOD) == {}
    assert verdicts(replace(GOOD, python=(3, 12))) == {}


def test_every_check_that_is_not_ok_names_a_remedy() -> None:
    worst = replace(
        GOOD,
        libc="",
        cpu_flags=frozenset(),
        cpus=1,
        python=(3, 13),
        memory=2 * GB,
        disk=1 * GB,
        shm=64 * MB,
        compiler=None,
    )
    checks = by_name(worst)
    assert {name for name, check in checks.items() if check.verdict == OK} == {"packages"}
    assert all(check.remedy for check in checks.values() if check.verdict != OK)


def test_on_macos_the_remedy_is_one_process() -> None:
    assert verdicts(MAC) == {"system": NOTE}
    assert "cluster.mode=inline rollout.engine=transformers" in by_name(MAC)["system"].remedy
    supported, reason = preflight.vllm_cpu_supported(MAC)
    assert not supported
    assert "macOS" in reason


def test_without_avx2_the_remedy_is_no_vllm() -> None:
    old = replace(GOOD, cpu_flags=frozenset({"avx"}))
    assert verdicts(old) == {"CPU": NOTE}
    assert "rollout.engine=transformers" in by_name(old)["CPU"].remedy
    assert preflight.vllm_cpu_supported(old) == (
        False,
        "vLLM's CPU build needs AVX2, which this CPU does not have",
    )
    assert by_name(old, lock="gpu")["CPU"].verdict == OK  # a GPU build does not ask for it


def test_vllm_runs_on_good_x86_and_arm() -> None:
    assert preflight.vllm_cpu_supported(GOOD)[0]
    arm = replace(GOOD, arch="aarch64", cpu_flags=frozenset({"asimd"}))
    assert preflight.vllm_cpu_supported(arm)[0]
    assert not preflight.vllm_cpu_supported(replace(GOOD, arch="riscv64"))[0]


def test_avx512_is_noted_in_the_reading() -> None:
    assert by_name(GOOD)["CPU"].reading == "2 CPUs, AVX2, AVX512"
    assert by_name(replace(GOOD, cpu_flags=frozenset({"avx2"})))["CPU"].reading == "2 CPUs, AVX2"


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"system": "Windows"}, "system"),
        ({"libc": ""}, "system"),
        ({"libc": "glibc 2.27"}, "system"),
        ({"python": (3, 10)}, "Python"),
        ({"python": (3, 13)}, "Python"),
        ({"compiler": None}, "C++ compiler"),
        ({"has_headers": False}, "C++ compiler"),
        ({"memory": 4 * GB - 1}, "memory"),
        ({"shm": 64 * MB}, "/dev/shm"),
        ({"shm": None}, "/dev/shm"),
        ({"disk": 8 * GB - 1}, "disk"),
    ],
)
def test_hard_requirements_fail(change: dict[str, object], failing: str) -> None:
    assert by_name(replace(GOOD, **change))[failing].verdict == FAIL  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        ({"memory": 8 * GB - 1}, "memory"),
        ({"memory": 4 * GB}, "memory"),
        ({"memory": None}, "memory"),
        ({"shm": 2 * GB - 1}, "/dev/shm"),
        ({"shm": 512 * MB}, "/dev/shm"),
        ({"cpus": 1}, "CPU"),
    ],
)
def test_soft_requirements_are_noted(change: dict[str, object], noted: str) -> None:
    assert verdicts(replace(GOOD, **change)) == {noted: NOTE}  # type: ignore[arg-type]


def test_the_limits_themselves_pass() -> None:
    assert verdicts(replace(GOOD, memory=8 * GB, shm=2 * GB, disk=8 * GB, cpus=2)) == {}
    assert verdicts(replace(GOOD, libc="glibc 2.28")) == {}


def test_an_installed_checkout_needs_less_disk_and_no_download() -> None:
    checks = by_name(replace(GOOD, disk=2 * GB), installed=True)
    assert checks["disk"].verdict == OK
    assert checks["packages"].reading == "cpu lock, installed (no NVIDIA GPU)"


def test_download_and_minutes() -> None:
    # 930 MB at 100 Mbit/s take 74.4 s = 1.24 min, and 0.6 min of installing: 1.84.
    reading = by_name(GOOD)["packages"].reading
    assert "930 MB to download, about 2 min" in reading
    # 4,400 MB take 352 s = 5.87 min, and 1.5 min of installing: 7.37.
    card = replace(GOOD, gpus=("NVIDIA A100-SXM4-80GB",))
    reading = by_name(card, lock="gpu")["packages"].reading
    assert reading.startswith("gpu lock (NVIDIA A100-SXM4-80GB): 4.4 GB to download, about 7 min")


def test_lock_follows_the_gpu() -> None:
    assert preflight.choose_lock(GOOD) == "cpu"
    assert preflight.choose_lock(replace(GOOD, gpus=("NVIDIA A100",))) == "gpu"
    assert preflight.choose_lock(replace(MAC, gpus=("NVIDIA A100",))) == "cpu"


def test_table_is_aligned_and_narrow() -> None:
    checks = [Check("system", "Linux"), Check("disk", "1.0 GB free here", FAIL, "free " * 40)]
    lines = preflight.format_table(checks, width=60).splitlines()
    assert lines[0] == "  ok    system  Linux"
    assert lines[1] == "  FAIL  disk    1.0 GB free here"
    assert lines[2].startswith("                -> free free")
    assert lines[3].startswith("                   free")
    assert max(map(len, lines)) <= 60


def test_readings_are_parsed() -> None:
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert preflight.parse_cpu_flags(cpuinfo) == {"fpu", "avx2", "avx512f"}
    assert preflight.parse_cpu_flags("Features\t: fp asimd\n") == {"fp", "asimd"}
    assert preflight.parse_cpu_flags("") == frozenset()
    meminfo = "MemTotal:       24000000 kB\nMemAvailable:   1000 kB\n"
    assert preflight.parse_available(meminfo) == 1_024_000
    assert preflight.parse_available("") is None
    listing = (
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-2)\n"
        "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-3)\n"
    )
    assert preflight.parse_gpus(listing) == ("NVIDIA A100-SXM4-80GB",) * 2
    assert preflight.parse_gpus("No devices found.") == ()


def test_a_container_limit_counts_without_its_page_cache() -> None:
    # 8,000 allowed, 6,000 used, of which 1,500 are page cache that the kernel gives back.
    assert preflight.cgroup_free("8000\n", "6000\n", "anon 1\ninactive_file 1500\n") == 3500
    assert preflight.cgroup_free("8000", "6000", "total_inactive_file 1500\n") == 3500
    assert preflight.cgroup_free("8000", "9000", "") == 0
    assert preflight.cgroup_free("max\n", "6000\n", "") is None
    assert preflight.cgroup_free("", "", "") is None


def test_the_exit_code_says_whether_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "read_machine", lambda root: GOOD)
    assert preflight.main([]) == 0
    monkeypatch.setattr(preflight, "read_machine", lambda root: replace(GOOD, compiler=None))
    assert preflight.main([]) == 2
    assert "apt-get install g++" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "argv", "decision"),
    [
        (GOOD, [], "cpu vllm"),
        (MAC, [], "cpu no-vllm"),
        (replace(GOOD, cpu_flags=frozenset()), [], "cpu no-vllm"),
        (replace(GOOD, gpus=("NVIDIA A100",), cpu_flags=frozenset()), [], "gpu vllm"),
        (replace(GOOD, gpus=("NVIDIA A100",)), ["--lock", "cpu"], "cpu vllm"),
    ],
)
def test_decision_for_the_installation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
    argv: list[str],
    decision: str,
) -> None:
    monkeypatch.setattr(preflight, "read_machine", lambda root: machine)
    assert preflight.main(["--decide", *argv]) == 0
    assert capsys.readouterr().out.strip() == decision


def test_preflight_runs_as_a_plain_file_without_any_package() -> None:
    # -S: no site-packages. As a file, its folder comes first on sys.path.
    command = [sys.executable, "-S", str(Path(preflight.__file__)), "--installed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 2), done.stderr
    assert "C++ compiler" in done.stdout
    assert done.stderr == ""
