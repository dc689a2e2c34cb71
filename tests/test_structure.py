"""The habits of the code that a machine can see: imports go down, never in a circle, as docs/structure.md draws them;
files are short, and shape letters have a legend."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "archs", "objectives", "experiments"]
LONGEST = 400  # lines of a file


def modules() -> dict[str, Path]:
    """All modules of the floors, by their dotted name."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def imported(name: str) -> set[str]:
    """The modules of the floors that a module imports, wherever in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {full if full in MODULES else node.module for full in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys() - {name}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_own_floor_and_those_below(name):
    floor = FLOORS.index(name.split(".")[0])
    assert {module for module in imported(name) if FLOORS.index(module.split(".")[0]) > floor} == set()


def test_no_imports_go_in_a_circle():
    TopologicalSorter({name: imported(name) for name in MODULES}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_not_long(name):
    assert len(MODULES[name].read_text().splitlines()) <= LONGEST


def test_the_picture_shows_every_module_in_a_room_and_what_the_rooms_import():
    """A room is a folder, or files of a floor that are named in its label; arrows between floors stand for all between
    their rooms."""
    drawn = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs" / "structure.md").read_text(), re.DOTALL)[1]
    arrows = set(re.findall(r"^ *(\w+) --> (\w+)$", drawn, re.MULTILINE))
    room_of = {}
    for room, label in re.findall(r'(\w+)\["([^"]+)"\]', drawn):
        folder, _, files = label.partition(": ")
        for name in [f"{folder}/{file}" for file in files.split(", ")] if files else [folder]:
            room_of[name.replace("/", ".")] = room
    rooms = {}
    for name in MODULES:
        where = name if name in room_of else name.rpartition(".")[0]
        assert where in room_of or name in FLOORS, f"{name} is in no room of the picture"
        rooms[name] = room_of.get(where, name)
    imports = [(name, other) for name in MODULES for other in imported(name)]
    floors = {(a.split(".")[0], b.split(".")[0]) for a, b in imports}
    inside = {
        (rooms[a], rooms[b]) for a, b in imports if a.split(".")[0] == b.split(".")[0] and not {a, b} & set(FLOORS)
    }
    assert arrows == {(a, b) for a, b in inside | floors if a != b}


@pytest.mark.parametrize("name", MODULES)
def test_the_shape_letters_in_names_are_in_the_legend_of_the_file(name):
    tree = ast.parse(MODULES[name].read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    suffixes = {suffix for word in names for suffix in re.findall(r"^[a-z]\w*_([A-Z]+)\d*$", word)}
    legend = re.search(r"Shape letters(.*?)(\n\n|$)", ast.get_docstring(tree) or "", re.DOTALL)
    known = re.findall(r"\b[A-Z]\b", legend[1]) if legend else []
    assert {letter for suffix in suffixes for letter in suffix} <= set(known)
