"""
Print which rooms import which, and check them against the table of allowed arrows: which room may import which, and that no
two files import each other in a circle.

    python scripts/import_arrows.py            # the counts, and what breaks a rule; exit code 1 if anything does
"""

import ast
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
ROOM_OF_FOLDER = {folder: package for package, folder in PROJECT["package-dir"].items()}

# the rooms that each room may import; `dijiang`, the front door, may import all of them
ARROWS: dict[str, set[str]] = {
    "common": set(),
    "modeling": set(),
    "checkpoint": {"common", "modeling"},
    "convert": {"common", "checkpoint", "modeling"},
    "train": {"common", "checkpoint", "convert", "modeling"},
    "evaluate": {"common", "checkpoint", "convert", "modeling"},
    "compress": {"common", "checkpoint", "modeling"},
    "configs": set(),
}
# what the files of modeling/ may import besides one another: they are copied into checkpoints
OUTSIDE_OF_MODELING = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
OPTIONAL_IN_MODELING = {"fla", "triton"}  # inside `try` alone


def modules() -> dict[str, Path]:
    """Files of all rooms by the name they are imported under."""
    files = {}
    for folder, package in ROOM_OF_FOLDER.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            files[name] = path
    return files


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool, ast.AST]]:
    """
    Every import in a file of `package`.

    Yields:
        The absolute name (`from a import b` gives a.b), whether it is inside `try`, and the statement.
    """
    tried = {id(node) for t in ast.walk(tree) if isinstance(t, ast.Try) for s in t.body for node in ast.walk(s)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            home = parts[: len(parts) - node.level + 1] if node.level else []
            names = [".".join([*home, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in tried, node) for name in names)


def broken_arrows(source: str, room: str, package: str) -> list[str]:
    """The imports by which a file of `room`, in `package`, breaks the table."""
    allowed = {room, *ARROWS[room]}
    broken = []
    for name, tried, node in imports(ast.parse(source), package):
        top, *rest = name.split(".")
        forbidden = top == "dijiang" and (not rest or rest[0] not in allowed)
        if forbidden or (room == "modeling" and not fits_in_a_checkpoint(top, tried, node)):
            broken.append(name)
    return broken


def fits_in_a_checkpoint(top: str, tried: bool, node: ast.AST) -> bool:
    """Whether an import of modeling/ works where only this room's files are, side by side."""
    if top == "dijiang":
        flat = isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module
        return bool(flat) and (ROOT / "modeling" / f"{node.module}.py").exists()  # type: ignore[attr-defined]
    return top in OUTSIDE_OF_MODELING or (top in OPTIONAL_IN_MODELING and tried)


def runs_later(block: ast.AST) -> bool:
    """Whether the imports in `block` do not run when its module is loaded: a function, or `if TYPE_CHECKING`."""
    if isinstance(block, ast.If):
        return isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
    return isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)


def file_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """The modules of ours that each module imports when it is loaded; what a function imports when it runs is left out."""
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = {id(n) for block in ast.walk(tree) if runs_later(block) for n in ast.walk(block)}
        targets = set()
        for target, _, node in imports(tree, package_of(name, path)):
            if id(node) not in late:
                targets.add(target if target in files else target.rpartition(".")[0])
        graph[name] = (targets & files.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles among modules, each once, found by a walk in depth."""
    done: set[str] = set()
    path: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        if name in path:
            circles.append([*path[path.index(name) :], name])
        elif name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                visit(target)
            path.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)
    return circles


def package_of(name: str, path: Path) -> str:
    """The package that relative imports in a module start from."""
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def room_of(name: str) -> str:
    """The room of a dotted name."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS else "dijiang"


def arrow_counts(files: dict[str, Path]) -> Counter[tuple[str, str]]:
    """How many import statements of one room name another room."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = {
            (id(node), room_of(target))
            for target, _, node in imports(tree, package_of(name, path))
            if target.startswith("dijiang.")
        }
        counts.update((room_of(name), target) for _, target in targets if target not in (room_of(name), "dijiang"))
    return counts


def violations(files: dict[str, Path]) -> list[str]:
    """One line for each import that breaks the table, and for each circle of files."""
    lines = []
    for name, path in files.items():
        folder = path.relative_to(ROOT).parts[0]
        if folder in ARROWS:
            lines += [
                f"{path.relative_to(ROOT)} imports {target}"
                for target in broken_arrows(path.read_text(encoding="utf-8"), folder, package_of(name, path))
            ]
    return lines + [f"circle: {' -> '.join(circle)}" for circle in circles(file_graph(files))]


def main() -> int:
    files = modules()
    for (room, target), count in sorted(arrow_counts(files).items()):
        print(f"{room:>10} -> {target:<10} {count:3d}")
    problems = violations(files)
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
