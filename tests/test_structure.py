"""House rules that a program can check: imports, size, what is committed, notebook anatomy."""

import ast
import graphlib
import importlib
import re
import subprocess
import types

import nbformat
import pytest
import yaml

from ssah_utils.files import PACKAGE, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Kernels see tensors and tables: no model, no prompt, no stored result.
KERNELS = {
    "per_unit",
    "scores",
    "units",
    "search",
    "stats",
    "crossed",
    "frontier",
    "frozen_sets",
    "sweeps",
    "transfer",
}


def name_of(path) -> str:
    """A module's name inside the package: ``models``, ``judge.rules``; a folder: ``judge``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in PATHS.items() if path.name != "__init__.py"}


def imported_modules(path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, by their names inside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            for alias in node.names:
                # a public name would hide from the keys of the cache which module is behind it
                is_public = node.module == PACKAGE.name and alias.name not in PATHS
                assert not is_public or path == PATHS[""], (
                    f"{path}: import {alias.name} from the module that defines it"
                )
                inner = f"{node.module}.{alias.name}".removeprefix(f"{PACKAGE.name}.")
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
        elif isinstance(node, ast.Import):
            ours = [one.name for one in node.names if one.name.split(".")[0] == PACKAGE.name]
            found |= {name.removeprefix(f"{PACKAGE.name}.") for name in ours}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found - {""}


IMPORTS = {name: imported_modules(path) for name, path in MODULES.items()}


def room_of(name: str) -> str:
    """``library`` for the modules on top and in prompts/ and judge/, else the folder."""
    folder = name.split(".")[0]
    return folder if folder in ("experiments", "figures", "pipeline") else "library"


def test_there_is_no_circle():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    assert set(order) >= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_each_module_imports_only_what_its_room_may_know(name):
    imports, room = IMPORTS[name], room_of(name)
    rooms = {room_of(other) for other in imports}
    if room == "library":
        assert rooms <= {"library"}, "the library knows no experiment, no figure, no pipeline"
    if room == "experiments":
        assert rooms <= {"experiments", "library"}, "experiments are told by others"
    if room == "figures":
        assert not rooms & {"experiments", "pipeline"}, (
            "figures draw tables; they do not know where these come from"
        )
    if name in KERNELS:
        assert imports <= KERNELS | {"files", "extras"}, (
            "kernels see no model, no prompt, no stored result"
        )
    if name == "models":
        known = {"architectures", "experts", "per_unit", "placement", "quantised", "wrappers"}
        assert imports <= known
    if name == "architectures":
        assert imports <= {"per_unit"}
    if name.startswith("prompts."):
        assert not any(other.startswith("judge.") for other in imports)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_module_says_what_it_is_for_and_none_is_a_dump(path):
    source = path.read_text(encoding="utf-8")
    assert not source or ast.get_docstring(ast.parse(source))
    assert source.count("\n") <= 450


def test_only_architectures_knows_module_names():
    names = re.compile(r"\b(o_proj|down_proj|v_proj|gate_proj|up_proj|c_proj|c_attn)\b")
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node)
        }
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ]
        found = [text for text in texts if names.search(text)]
        # fused experts have the same names in all families
        assert name in ("architectures", "experts") or not found, (name, found)


def test_public_functions_of_substance_have_docstrings():
    missing = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            is_long = node.end_lineno - node.lineno > 12
            if is_long and not ast.get_docstring(node) and node.name not in ("main", "set_style"):
                missing.append(f"{name}.{node.name}")
    assert not missing, missing


# Two doors repeat names on purpose: ``cli`` those of its commands, ``upstream`` those of library
# functions that it calls with what a run has chosen. ``rates`` is one kind of table, of two kinds
# of rows.
DOORS, SAME_MEANING = {"pipeline.cli", "pipeline.commands", "pipeline.upstream"}, {"main", "rates"}


def test_a_public_name_has_one_meaning():
    where: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if is_public and name not in DOORS and node.name not in SAME_MEANING:
                where.setdefault(node.name, []).append(name)
    assert not {name: modules for name, modules in where.items() if len(modules) > 1}


def test_nothing_committed_names_a_machine_or_a_registry():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    forbidden = re.compile(r"/(?:work|root)/|pypi" + r"\.org|files\.pythonhosted")
    for name in listed:
        path = ROOT / name
        is_binary = path.suffix in (".png", ".pdf", ".safetensors")
        if is_binary or not path.exists() or path.name == "test_structure.py":
            continue
        match = forbidden.search(path.read_text(encoding="utf-8"))
        assert not match, f"{name}: {match.group()}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_anatomy(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    title, last = notebook.cells[0], notebook.cells[-1]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert "Claim" in title.source and "minute" in title.source
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in code]
    assert tagged == [True] + [False] * (len(code) - 1)
    for node in ast.parse(code[0].source).body:
        ast.literal_eval(node.value)  # flat literals, so that the runner can read and replace them
    assert "start(" in code[1].source
    assert "run.finish(" in "".join(cell.source for cell in code[-2:])
    assert last.cell_type == "markdown" and "To change it" in last.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_read_as_text_with_short_steps_of_code(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    longest = max(code[1:], key=lambda source: source.count("\n"))  # parameters may be as they are
    assert longest.count("\n") < 20, f"more than 20 lines in one cell, split it:\n{longest}"
    trees = [ast.parse(source) for source in code]
    is_function = (ast.FunctionDef, ast.Lambda)
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, is_function)]
    assert len(functions) <= 2, "a third function belongs to the library, with a test of its own"
    lines = [line.strip() for source in code for line in source.splitlines()]
    n_lines = sum(bool(line) and not line.startswith("#") for line in lines)
    n_words = sum(len(text.split()) for text in prose)
    assert n_words >= 5 * n_lines, f"{n_words} words for {n_lines} lines of code: say why"


def test_every_notebook_is_a_stage_and_every_stage_a_notebook():
    pipeline = (ROOT / "notebooks" / "pipeline.yaml").read_text(encoding="utf-8")
    stages = [stage["name"] for stage in yaml.safe_load(pipeline)["stages"]]
    assert sorted(stages) == [path.stem for path in NOTEBOOKS]


def names_missing(path) -> list[str]:
    """What a notebook imports from the package, or asks its modules for, and they have not."""
    cells = nbformat.read(path, as_version=4).cells
    tree = ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    found, missing = {}, []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] != PACKAGE.name:
            continue
        for alias in node.names:
            module = importlib.import_module(node.module)
            if f"{node.module}.{alias.name}".removeprefix(f"{PACKAGE.name}.") in MODULES:
                thing = importlib.import_module(f"{node.module}.{alias.name}")
            elif hasattr(module, alias.name):
                thing = getattr(module, alias.name)
            else:
                missing.append(f"{node.module}.{alias.name}")
                continue
            found[alias.asname or alias.name] = thing
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = found.get(node.value.id)
            if isinstance(owner, types.ModuleType) and not hasattr(owner, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    return missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_names_that_are_there(path):
    """Found in a second; executing the notebooks takes minutes."""
    assert names_missing(path) == []


def test_a_name_that_is_gone_is_found(tmp_path):
    source = "from ssah_utils import units\nfrom ssah_utils.stats import gone\nunits.lost(1)"
    cell = nbformat.v4.new_code_cell(source)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "book.ipynb")
    assert names_missing(tmp_path / "book.ipynb") == ["ssah_utils.stats.gone", "units.lost"]
