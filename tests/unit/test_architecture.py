"""The rules of the layout that a tool can check; the import rule stands in pyproject.toml."""

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("rlhf_ray", "actors")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
TEXTS = [path.read_text(encoding="utf-8") for path in FILES]
SOURCES = [(name, text, ast.parse(text)) for name, text in zip(NAMES, TEXTS, strict=True)]
MAX_LINES = 350
MAX_MODULES, MAX_ROOM_SHARE = 14, 0.12
MAX_FUNCTION_LINES = 50
"""Without the docstring."""


def test_imports_go_one_way() -> None:
    """Every contract of pyproject.toml, by import-linter."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 8 kept, 0 broken." in done.stdout


def test_files_and_functions_fit_a_readers_head() -> None:
    sizes = {name: len(text.splitlines()) for name, text, _ in SOURCES}
    assert not {name: size for name, size in sizes.items() if size > MAX_LINES}
    lengths = {
        f"{name}:{function.name}": num_lines(function)
        for name, _, tree in SOURCES
        for function in functions(tree)
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}


def test_rooms_are_taken_in_at_a_glance() -> None:
    """`config` has a file a section; a room's lines are its own and those of its sub-rooms."""
    modules = Counter(Path(name).parent for name in NAMES if Path(name).stem != "__init__")
    del modules[Path("rlhf_ray/config")]
    assert not {room: count for room, count in modules.items() if count > MAX_MODULES}
    lines: Counter[str] = Counter()
    for name, text, _ in SOURCES:
        lines["/".join(Path(name).parts[:2])] += len(text.splitlines())
    assert not {room: n for room, n in lines.items() if n > MAX_ROOM_SHARE * lines.total()}


def test_a_room_says_what_it_is_for_and_what_to_read_first() -> None:
    rooms = {name: ast.get_docstring(tree) or "" for name, _, tree in SOURCES if "__init__" in name}
    assert not [name for name, text in rooms.items() if len(text.split()) < 10]


def test_no_module_is_called_utils() -> None:
    assert not [name for name in NAMES if Path(name).stem in ("utils", "util", "helpers", "misc")]


def test_actors_leave_ray_alone() -> None:
    """Actors are plain Python; Ray wraps them where they are spawned."""
    for path in (ROOT / "actors").glob("*.py"):
        assert "ray" not in set(imports(path)), path.name


def test_what_is_public_is_described() -> None:
    bare = [
        f"{name}:{node.name}"
        for name, _, tree in SOURCES
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, signature included, docstring not."""

    def lines(node: ast.stmt) -> int:
        return (node.end_lineno or node.lineno) - node.lineno + 1

    described = ast.get_docstring(function) is not None
    return lines(function) - (lines(function.body[0]) if described else 0)


def imports(path: Path) -> Iterator[str]:
    """First names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
