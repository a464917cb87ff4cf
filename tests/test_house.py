"""The arrows between the rooms: who may import whom, read off the source, so that the house stays a house."""

import ast
import re
import sys
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentcodec"

# From the ground up. A room imports from lower floors and from itself, never from its own floor or from above.
FLOORS = [
    {"control_groups", "leftovers"},
    {"extras", "files", "finite", "machine", "openmp", "printable", "randomness", "vae", "ops"},
    {"pixels", "engine", "model_card", "model_folder", "offloading"},
    {"stock"},
    {"sources", "adopt", "latents"},
    {"vae_config"},
    {"single_file"},
    {"loading"},
    {"codec"},
    {"quality"},
    {"store", "report", "training"},
    {"cli", "speed"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def imports(file):
    """The modules and names that a file imports of this package: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.removeprefix("latentcodec.") for name in found if name.startswith("latentcodec")}


def modules():
    """Module name without the package -> file; the package itself, whose names are for users, is left out."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        names[name] = file
    return {name: file for name, file in names.items() if name != "__init__"}


def graph():
    names = modules()
    return {name: {other for other in imports(file) if other in names} for name, file in names.items()}


def room(module):
    return module.split(".")[0]


def test_files_are_short_enough_to_be_read_at_once():
    folders = ("latentcodec", "train", "bench", "examples", "experiments", "tests")
    lines = {f: len(f.read_text().splitlines()) for folder in folders for f in (ROOT / folder).rglob("*.py")}
    assert len(lines) > 300
    assert [f"{file}: {count}" for file, count in lines.items() if count > 300] == []


def test_mutants_follow_the_code():
    mutants.check(mutants.MUTANTS)


def test_no_two_test_files_share_a_name():
    """pytest refuses two of one name in one process, and whether two workers hide that is chance."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_room_has_a_floor():
    assert {room(name) for name in modules()} <= FLOOR.keys()


def test_arrows_go_down_only():
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]
    assert not wrong


@pytest.mark.parametrize(("name", "libraries"), [("vae", {"torch"}), ("ops", {"torch", "triton"})])
def test_the_network_and_the_operations_stand_on_torch_alone(name, libraries):
    for file in (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            known = sys.stdlib_module_names | libraries
            assert all(n.split(".")[0] in known or n.startswith(f"latentcodec.{name}") for n in names), file


def test_the_network_knows_nothing_of_strips_and_operations_know_nothing_of_modules():
    assert not [file for file in (PACKAGE / "vae").rglob("*.py") if "strip" in file.read_text().lower()]
    for file in (PACKAGE / "ops").rglob("*.py"):
        tree = ast.parse(file.read_text())
        assert "nn" not in {
            alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }


def test_nobody_imports_the_roof():
    """The names in latentcodec/__init__.py are for users: a room imports from where a thing lives."""
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "latentcodec":
                assert {alias.name for alias in node.names} <= modules().keys() | {"__version__"}, name


def test_there_is_no_import_circle():
    edges = graph()
    while edges:
        leaves = {name for name, others in edges.items() if not others & edges.keys() - {name}}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}


@pytest.mark.parametrize("folder", ["train", "bench", "examples", "experiments"])
def test_scripts_never_import_each_other(folder):
    files = list((ROOT / folder).rglob("*.py"))
    siblings = {file.stem for file in files}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in siblings | {folder}, file
            elif isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & (siblings | {folder}), file


def test_there_is_no_room_for_odds_and_ends():
    assert not [
        file for file in PACKAGE.rglob("*.py") if file.stem in {"utils", "util", "helpers", "common", "misc"}
    ]


def test_nothing_needs_the_docstrings_that_python_drops_with_oo():
    files = [
        file
        for room in ("latentcodec", "bench", "experiments", "examples", "train")
        for file in (ROOT / room).rglob("*.py")
    ]
    assert files
    assert not [file.name for file in files if re.search(r"__doc__\.|__doc__.*splitlines", file.read_text())]
