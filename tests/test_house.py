"""The arrows between the rooms: who may import whom, read off the source, so that the house stays a house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentcodec"


def imports(file):
    """The modules of this package that a file imports at run time; type-checking blocks do not count."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name and name.startswith("latentcodec")}


def modules():
    names = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names[name] = file
    return names


def graph():
    names = modules()
    return {name: {other for other in imports(file) if other in names} for name, file in names.items()}


def test_there_is_no_import_cycle():
    edges = {name: {o for o in others if o != "latentcodec"} for name, others in graph().items()}
    while edges:
        leaves = {name for name, others in edges.items() if not others & edges.keys()}
        assert leaves, f"a cycle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}


def test_inference_needs_nothing_of_training():
    for name, others in graph().items():
        if not name.startswith("latentcodec.training"):
            assert not any(other.startswith("latentcodec.training") for other in others), name


@pytest.mark.parametrize("folder", ["train", "bench"])
def test_scripts_never_import_each_other(folder):
    siblings = {file.stem for file in (ROOT / folder).glob("*.py")}
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in siblings | {folder}, file
            elif isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & (siblings | {folder}), file


def test_there_is_no_room_for_odds_and_ends():
    assert not [
        file for file in PACKAGE.rglob("*.py") if file.stem in {"utils", "util", "helpers", "common", "misc"}
    ]
