"""Check that this machine has what an installation and the quick start need.

Standard library only, and parseable by old Pythons, whose users need the message most.
`read_machine` takes the readings; everything else is a pure function of them. The scripts run this
as a plain file before anything is installed; `rlhf-ray doctor` imports it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

GB = 10**9
MB = 10**6

OK, NOTE, FAIL = "ok", "note", "FAIL"

MEMORY_NEEDED = 8 * GB  # the quick start's limit
MEMORY_LEAST = 4 * GB  # less is too little even for one process
SHM_NEEDED = 2 * GB
SHM_LEAST = 512 * MB  # for the object store and vLLM
DISK_TO_RUN = 1 * GB
LINK_MBIT_S = 100  # the download speed for which minutes are given

ONE_PROCESS = "cluster.mode=inline rollout.engine=transformers"


@dataclass(frozen=True)
class Lock:
    """The size of one of the two sets of pinned packages, on Linux x86-64 with Python 3.11."""

    download: int
    """Total bytes of the wheels."""
    disk: int
    """Bytes to have free at the checkout: the environment, the package cache and working space."""
    install_minutes: float
    """Minutes on two cores, without the download."""


LOCKS = {
    # Measured: 930 MB of wheels, an environment of 3.5 GB.
    "cpu": Lock(download=930 * MB, disk=8 * GB, install_minutes=0.6),
    # All wheels but torch's own measured (3.7 GB); disk and minutes estimated from the size.
    "gpu": Lock(download=4400 * MB, disk=20 * GB, install_minutes=1.5),
}


@dataclass(frozen=True)
class Machine:
    """Readings of one machine; sizes in bytes, None if they cannot be read."""

    system: str
    """`Linux`, `macOS` or `Windows`."""
    arch: str
    """As `uname -m` says: `x86_64`, `aarch64`, `arm64`."""
    libc: str
    """Such as `glibc 2.36`; empty for another C library."""
    cpu_flags: frozenset[str]
    cpus: int
    """Number of CPUs that this process may use."""
    python: tuple[int, int]
    has_headers: bool
    """Whether Python.h is installed, without which extensions cannot be compiled."""
    memory: int | None
    """Available to this process within its container's limit."""
    disk: int
    """Free bytes at the checkout."""
    shm: int | None
    """Size of /dev/shm."""
    compiler: str | None
    """Path of the C++ compiler that PyTorch will call."""
    gpus: tuple[str, ...]
    """Names of NVIDIA GPUs."""


@dataclass(frozen=True)
class Check:
    """A row of the table: a reading, its verdict (`ok`, `note`, `FAIL`) and what to do."""

    name: str
    reading: str
    verdict: str = OK
    remedy: str = ""


def vllm_cpu_supported(machine: Machine | None = None) -> tuple[bool, str]:
    """Return whether vLLM's CPU build runs on `machine` (default: this one), and the reason."""
    machine = machine or read_machine(Path.cwd())
    if machine.system != "Linux":
        return False, f"vLLM's CPU build is for Linux, this is {machine.system}"
    if machine.arch not in ("x86_64", "aarch64"):
        return False, f"vLLM's CPU build is for x86_64 and aarch64, this is {machine.arch}"
    if machine.arch == "x86_64" and "avx2" not in machine.cpu_flags:
        return False, "vLLM's CPU build needs AVX2, which this CPU does not have"
    return True, "vLLM's CPU build runs here"


def choose_lock(machine: Machine) -> str:
    """Return the lock for `machine`: `gpu` on Linux with an NVIDIA GPU, else `cpu`."""
    return "gpu" if machine.gpus and machine.system == "Linux" else "cpu"


def check_machine(machine: Machine, lock: str, installed: bool = False) -> list[Check]:
    """Return all checks in the order in which they are printed.

    `installed`: the packages are installed already, so less disk and no download is needed.
    """
    return [
        check_system(machine),
        check_cpu(machine, lock),
        check_python(machine),
        check_compiler(machine),
        check_memory(machine),
        check_shm(machine),
        check_disk(machine, lock, installed),
        check_packages(machine, lock, installed),
    ]


def check_system(machine: Machine) -> Check:
    """Check for Linux with glibc 2.28 (the wheels are manylinux_2_28); macOS runs one process."""
    reading = f"{machine.system} {machine.arch}"
    if machine.system == "macOS":
        remedy = f"vLLM does not run on macOS: run the quick start with {ONE_PROCESS}"
        return Check("system", reading, NOTE, remedy)
    if machine.system != "Linux":
        return Check("system", reading, FAIL, "use Linux; on Windows: WSL 2 with Ubuntu")
    match = re.fullmatch(r"glibc (\d+)\.(\d+)", machine.libc)
    if match is None or (int(match[1]), int(match[2])) < (2, 28):
        libc = machine.libc or "no glibc"
        remedy = "the packages need glibc 2.28: Debian 10, Ubuntu 20.04, RHEL 8 or newer"
        return Check("system", f"{reading}, {libc}", FAIL, remedy)
    return Check("system", f"{reading}, {machine.libc}")


def check_cpu(machine: Machine, lock: str) -> Check:
    """Check CPUs and vector instructions; only vLLM's CPU build needs AVX2."""
    cores = f"{machine.cpus} CPU" + ("s" if machine.cpus != 1 else "")
    vectors = [name for name in ("avx2", "avx512f") if name in machine.cpu_flags]
    reading = ", ".join([cores, *(name.rstrip("f").upper() for name in vectors)])
    supported, reason = vllm_cpu_supported(machine)
    if lock == "cpu" and machine.system == "Linux" and not supported:
        remedy = f"{reason}: run the quick start with {ONE_PROCESS}"
        return Check("CPU", reading, NOTE, remedy)
    if machine.cpus < 2:
        return Check("CPU", reading, NOTE, "works, but the documented times are for 2 CPUs")
    return Check("CPU", reading)


def check_python(machine: Machine) -> Check:
    """Check for Python 3.11 or 3.12, for which the locks are resolved."""
    reading = "{}.{}".format(*machine.python)
    if machine.python in ((3, 11), (3, 12)):
        return Check("Python", reading)
    remedy = "install Python 3.11 or 3.12 (system package, pyenv, uv or conda), or set PYTHON"
    return Check("Python", reading, FAIL, remedy)


def check_compiler(machine: Machine) -> Check:
    """Check for a C++ compiler and Python.h: PyTorch and Triton compile at the first use."""
    verdict = FAIL if machine.system == "Linux" else NOTE
    if machine.compiler is None:
        remedy = "apt-get install g++, dnf install gcc-c++ or xcode-select --install; without root:"
        remedy += " conda install cxx-compiler; or export CXX=/path/to/compiler"
        return Check("C++ compiler", "not found", verdict, remedy)
    if not machine.has_headers:
        version = "{}.{}".format(*machine.python)
        remedy = f"apt-get install python{version}-dev, or a Python of pyenv, uv or conda"
        return Check("C++ compiler", f"{machine.compiler}, no Python.h", verdict, remedy)
    return Check("C++ compiler", machine.compiler)


def check_memory(machine: Machine) -> Check:
    """Check for the memory of the quick start; below `MEMORY_LEAST` nothing runs well."""
    if machine.memory is None:
        return Check("memory", "unknown", NOTE, f"check that {_size(MEMORY_NEEDED)} are available")
    reading = f"{_size(machine.memory)} available"
    if machine.memory >= MEMORY_NEEDED:
        return Check("memory", reading)
    remedy = f"free or add memory: the quick start needs {_size(MEMORY_NEEDED)}"
    if machine.memory >= MEMORY_LEAST:
        return Check("memory", reading, NOTE, f"{remedy}; {ONE_PROCESS} takes less")
    return Check("memory", reading, FAIL, remedy)


def check_shm(machine: Machine) -> Check:
    """Check /dev/shm, where Ray and vLLM share memory between processes on Linux."""
    reading = "none" if machine.shm is None else _size(machine.shm)
    size = machine.shm or 0
    if size >= SHM_NEEDED or machine.system != "Linux":
        return Check("/dev/shm", reading)
    remedy = f"it needs {_size(SHM_NEEDED)}: docker run --shm-size=2g, or mount -o remount,size=2g"
    return Check("/dev/shm", reading, NOTE if size >= SHM_LEAST else FAIL, remedy)


def check_disk(machine: Machine, lock: str, installed: bool) -> Check:
    """Check the free space at the checkout for the environment and a run."""
    needed = DISK_TO_RUN if installed else LOCKS[lock].disk
    reading = f"{_size(machine.disk)} free here"
    if machine.disk >= needed:
        return Check("disk", reading)
    remedy = f"free {_size(needed)} in total, or set VENV to a folder on a larger disk"
    return Check("disk", reading, FAIL, remedy)


def check_packages(machine: Machine, lock: str, installed: bool) -> Check:
    """Report the lock, its download size and about how long that takes; never fails."""
    device = machine.gpus[0] if machine.gpus else "no NVIDIA GPU"
    if installed:
        return Check("packages", f"{lock} lock, installed ({device})")
    size = LOCKS[lock].download
    minutes = LOCKS[lock].install_minutes + size * 8 / (LINK_MBIT_S * 10**6) / 60
    reading = f"{lock} lock ({device}): {_size(size)} to download,"
    return Check("packages", f"{reading} about {minutes:.0f} min at {LINK_MBIT_S} Mbit/s")


def format_table(checks: list[Check], width: int = 96) -> str:
    """Format the checks as aligned text with remedies below their row, `width` columns wide."""
    name_width = max(len(check.name) for check in checks)
    indent = " " * (2 + len(FAIL) + 2 + name_width + 2)
    lines: list[str] = []
    for check in checks:
        head = f"  {check.verdict:<{len(FAIL)}}  {check.name:<{name_width}}  "
        lines += textwrap.wrap(
            check.reading, width, initial_indent=head, subsequent_indent=indent
        ) or [head]
        if check.remedy:
            lines += textwrap.wrap(
                check.remedy, width, initial_indent=indent + "-> ", subsequent_indent=indent + "   "
            )
    return "\n".join(lines)


def read_machine(root: Path) -> Machine:
    """Take all readings; `root` is the folder of the environment and the runs."""
    libc = " ".join(platform.libc_ver())
    shm = Path("/dev/shm")
    return Machine(
        system=platform.system().replace("Darwin", "macOS"),
        arch=platform.machine(),
        libc=libc if libc.startswith("glibc ") else "",
        cpu_flags=parse_cpu_flags(_read_text("/proc/cpuinfo")),
        cpus=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        python=(sys.version_info[0], sys.version_info[1]),
        has_headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
        memory=_read_memory(),
        disk=shutil.disk_usage(root).free,
        shm=shutil.disk_usage(shm).total if shm.is_dir() else None,
        compiler=shutil.which((os.environ.get("CXX") or "c++").split()[0]),
        gpus=_read_gpus(),
    )


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the first CPU's flags from /proc/cpuinfo (`flags`, on ARM `Features`)."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def parse_available(meminfo: str) -> int | None:
    """Return the bytes of `MemAvailable` from /proc/meminfo, which counts in KiB."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def cgroup_free(limit: str, used: str, stat: str) -> int | None:
    """Return the bytes that a control group may still use; None if it has no limit.

    Takes the texts of its limit, usage and memory.stat. The usage includes the page cache, whose
    inactive part at least is free for use.
    """
    if not (limit.strip().isdigit() and used.strip().isdigit()):  # no such file, or "max"
        return None
    match = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
    return max(0, int(limit) - int(used) + (int(match[1]) if match else 0))


def parse_gpus(listing: str) -> tuple[str, ...]:
    """Return the GPU names in the output of `nvidia-smi -L` ("GPU 0: NVIDIA A100 (UUID: ...)")."""
    return tuple(re.findall(r"^GPU \d+: (.+?) \(UUID", listing, re.MULTILINE))


def _read_memory() -> int | None:
    available = parse_available(_read_text("/proc/meminfo"))
    if available is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS: total memory
    for limit, used, stat in (  # paths inside a container: control groups version 2, version 1
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        free = cgroup_free(*(_read_text(f"/sys/fs/cgroup/{name}") for name in (limit, used, stat)))
        if available is not None and free is not None:
            available = min(available, free)
    return available


def _read_gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "-L"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(listing.stdout)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= GB else f"{num_bytes // MB} MB"


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 2 if a hard requirement is missing, else 0."""
    parser = argparse.ArgumentParser(description="Check this machine before an installation.")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="folder of the installation")
    parser.add_argument("--lock", choices=sorted(LOCKS), help="default: gpu if there is one")
    parser.add_argument("--installed", action="store_true", help="packages are installed already")
    parser.add_argument("--decide", action="store_true", help="print the lock and vllm or no-vllm")
    args = parser.parse_args(argv)
    machine = read_machine(args.root)
    lock = args.lock or choose_lock(machine)
    if args.decide:
        print(lock, "vllm" if lock == "gpu" or vllm_cpu_supported(machine)[0] else "no-vllm")
        return 0
    checks = check_machine(machine, lock, args.installed)
    print(format_table(checks))
    return 2 if any(check.verdict == FAIL for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
