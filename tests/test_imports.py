"""The house's rule: a part imports only parts that stand below it, and nothing imports in a circle.

Every import counts: at the top of a file, inside a function, for types alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mllama_gguf

PACKAGE = Path(mllama_gguf.__file__).parent
# From the ground to the roof: each part, a file or a folder, may import those before it. docs/architecture.md
# draws the same order and says what each part is for.
FLOORS = (
    "errors",
    "words",
    "waiting",
    "handles",
    "temporary",
    "reading",
    "files",
    "cpus",
    "checks",
    "settings",
    "gguf",
    "backend",
    "store",
    "cache",
    "text",
    "vision",
    "decode",
    "convert",
    "loaded",
    "model",
    "inspect",
    "tune",
    "batch",
    "ray",
    "gallery",
    "chat",
    "__init__",
    "server",
    "cli",
    "__main__",
)
# Arrows that run up or close a circle, and are to be turned round: (importing module, imported module).
EXCEPTIONS: set[tuple[str, str]] = set()

Arrow = tuple[str, str]


def module_of(path: Path, package: Path) -> str:
    """backend/local.py is "backend.local", backend/__init__.py "backend", the package's own "__init__"."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def arrows(package: Path) -> set[Arrow]:
    """(importing module, imported module) for every import of the package's own modules."""
    files = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    found = set()
    for module, path in files.items():
        for target in imported(ast.parse(path.read_text("utf-8")), path, package):
            known = target
            while known and known not in files:  # a name in a module: the module
                known = known.rpartition(".")[0]
            if (known or "__init__") != module:
                found.add((module, known or "__init__"))
    return found


def imported(tree: ast.Module, path: Path, package: Path) -> Iterator[str]:
    """The names that a file imports from the package, without the package's own."""
    folder = path.parent.relative_to(package.parent).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) + 1 - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == package.name:
                yield rest


def part_of(module: str) -> str:
    return module.partition(".")[0]


def upward(found: set[Arrow], floors: tuple[str, ...]) -> set[Arrow]:
    """The arrows from a part to itself left out, those that do not lead down."""
    places = {part: place for place, part in enumerate(floors)}
    return {(a, b) for a, b in found if part_of(a) != part_of(b) and places[part_of(b)] >= places[part_of(a)]}


def circle(found: set[Arrow]) -> list[str]:
    """Modules that import each other in a circle; [] if none do."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for a, b in found:
        sorter.add(a, b)
    try:
        sorter.prepare()
    except CycleError as e:
        return list(e.args[1])
    return []


def test_every_arrow_leads_down() -> None:
    found = arrows(PACKAGE)
    assert len(found) > 100
    assert {part_of(module) for arrow in found for module in arrow} <= set(FLOORS)
    assert upward(found, FLOORS) <= EXCEPTIONS


def test_the_map_is_the_house() -> None:
    """docs/architecture.md lists the parts from the roof to the ground, and every folder of the C library."""
    root = Path(__file__).parents[1]
    text = (root / "docs" / "architecture.md").read_text("utf-8")
    listing = text[text.index("mllama_gguf/\n") : text.index("native/\n")]
    listed = [
        name.removesuffix(".py").rstrip("/")
        for line in listing.splitlines()[1:]
        for name in re.findall(r"\b[a-z_]+(?:\.py|/)", line.split("   ")[0])
    ]
    expected = [part for part in reversed(FLOORS) if not part.startswith("__")]
    assert listed == expected
    source = root / "native" / "src"
    inside = text[text.index("native/\n") : text.index("tests/        ")]
    for path in source.iterdir():
        name = f"src/{path.name}/" if path.is_dir() else path.name
        assert path.suffix == ".h" or name in inside, name


def test_no_file_is_long() -> None:
    """Sources of the package and of the C library, and the page's; a newcomer reads a file as a whole."""
    root = Path(__file__).parents[1]
    kinds = {".py", ".c", ".cpp", ".h", ".hpp", ".js", ".html", ".css"}
    paths = [path for folder in (PACKAGE, root / "native" / "src") for path in folder.rglob("*.*")]
    lines = {path: path.read_text("utf-8").count("\n") for path in paths if path.suffix in kinds}
    assert len(lines) > 200
    assert {path: n for path, n in lines.items() if n > 400 and path.parent.name != "lib"} == {}


def test_no_line_of_c_is_long() -> None:
    """120 columns; ruff holds Python to its 110."""
    native = Path(__file__).parents[1] / "native"
    paths = [path for path in native.rglob("*") if path.suffix in {".c", ".cpp", ".h", ".hpp"}]
    assert {path.parts[len(native.parts)] for path in paths} == {"include", "src", "tests", "fuzz"}
    lines = {
        f"{path}:{number}": len(line)
        for path in paths
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
    }
    assert {place: n for place, n in lines.items() if n > 120} == {}


def test_no_circles() -> None:
    assert circle(arrows(PACKAGE) - EXCEPTIONS) == []


def test_every_exception_is_one() -> None:
    found = arrows(PACKAGE)
    for exception in EXCEPTIONS:
        assert exception in found
        assert exception in upward(found, FLOORS) or circle((found - EXCEPTIONS) | {exception})


def test_the_init_files_import_nothing() -> None:
    """So that a command imports what it needs and no more; the package's own imports errors, and its public
    names when they are asked for."""
    for path in PACKAGE.glob("*/**/__init__.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert len(tree.body) == 1 and ast.get_docstring(tree), path


def test_the_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    texts = {
        "__init__.py": "",
        "ground.py": "def f():\n    from .roof.top import x\n",
        "roof/__init__.py": "",
        "roof/top.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import side\n",
        "roof/side.py": "from ..ground import f\nfrom .. import ground\nimport pack.roof.top, os\n",
        "roof/deep/__init__.py": "",
        "roof/deep/one.py": "from ...ground import f\nfrom ..side import f\nfrom ... import VERSION\n",
    }
    for name, text in texts.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    found = arrows(package)
    assert found == {
        ("ground", "roof.top"),
        ("roof.top", "roof.side"),
        ("roof.side", "ground"),
        ("roof.side", "roof.top"),
        ("roof.deep.one", "ground"),
        ("roof.deep.one", "roof.side"),
        ("roof.deep.one", "__init__"),
    }
    floors = ("ground", "__init__", "roof")
    assert upward(found, floors) == {("ground", "roof.top")}
    assert set(circle(found)) == {"ground", "roof.top", "roof.side"} or len(circle(found)) >= 3
    assert set(circle(found - {("ground", "roof.top")})) == {"roof.top", "roof.side"}
    assert circle(found - {("ground", "roof.top"), ("roof.side", "roof.top")}) == []
