"""The house rules that a program can check: imports, names of modules, size, what is committed, notebook anatomy."""

import ast
import re
import subprocess

import nbformat
import pytest
import yaml

from ssah_utils.results import ROOT

PACKAGE = sorted(path for path in (ROOT / "ssah_utils").glob("*.py") if path.stem != "__init__")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Which of our modules each may import. Kernels (scores, units, stats) never see models, prompts or stored results.
ALLOWED = {
    "files": set(),
    "assets": {"files"},
    "per_unit": set(),
    "cache": {"files", "models", "per_unit"},
    "loading": {"assets", "chat", "files"},
    "wrappers": set(),
    "models": {"files", "loading", "per_unit", "wrappers"},
    "formats": set(),
    "arithmetic": set(),
    "chat": {"wrappers"},
    "prompts": {"arithmetic", "assets", "chat", "formats", "reading", "splits"},
    "activations": {"models", "per_unit"},
    "rewrites": {"prompts"},
    "scores": {"per_unit"},
    "units": {"files", "per_unit"},
    "interventions": {"models"},
    "adapters": {"models"},
    "guards": set(),
    "partial": {"guards", "models", "per_unit"},
    "settings": {"models"},
    "sequences": {"prompts", "reading"},
    "training": {"cache", "files", "locks", "models", "partial", "per_unit", "sequences", "settings"},
    "direction": {"chat", "judge", "reading", "wrappers"},
    "reading": {"chat", "wrappers"},
    "splits": set(),
    "stats": set(),
    "wording": {"splits"},
    "judge": {"splits", "stats", "wording"},
    "evaluation": {"arithmetic", "assets", "cache", "chat", "judge", "models", "prompts", "reading"},
    "judge_models": {"assets", "chat", "evaluation", "models", "reading"},
    "results": {"files", "kernel", "locks", "models"},
    "kernel": set(),
    "locks": set(),
    "machine": set(),
    "parameters": {"adapters", "evaluation", "formats", "judge_models", "loading", "models", "prompts", "reading", "units"},
    "search": set(),
    "training_figures": {"results", "units"},
    "stability_figures": {"results"},
    "direction_figures": {"results"},
    "paper_figures": {"results"},
    "claims": {"results"},
    "figures": {"direction_figures", "paper_figures", "results", "stability_figures", "training_figures", "units"},
    "status": {"files", "results"},
    "stamps": {"files", "models", "results"},
    "run": {"files", "kernel", "locks", "machine", "models", "parameters", "prompts", "results", "stamps", "status"},
    "readme_tables": {"paper_figures"},
    "publish": {"claims", "figures", "files", "readme_tables", "results", "stamps"},
}


def imported_modules(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "ssah_utils":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssah_utils."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ssah_utils.")}
    return found


def test_the_import_table_covers_every_module():
    assert {path.stem for path in PACKAGE} == set(ALLOWED)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_imports_stay_within_the_table(path):
    assert imported_modules(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_every_module_says_what_it_knows_and_none_is_a_dump(path):
    source = path.read_text(encoding="utf-8")
    assert re.search(r"\bKnows?\b|\bOnly\b|\bonly\b", ast.get_docstring(ast.parse(source))), "the docstring says what it knows"
    assert source.count("\n") <= 400


def test_only_models_knows_module_names():
    names = re.compile(r"\b(o_proj|down_proj|v_proj|gate_proj|up_proj|c_proj|c_attn)\b")
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        }
        constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
        found = [node.value for node in constants if isinstance(node.value, str) and names.search(node.value)]
        assert path.stem == "models" or not found, (path.stem, found)


def test_public_functions_of_substance_have_docstrings():
    missing = []
    for path in PACKAGE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                long = node.end_lineno - node.lineno > 10
                if long and not ast.get_docstring(node) and node.name not in ("main", "list_pipeline", "training_arguments"):
                    missing.append(f"{path.stem}.{node.name}")
    assert not missing, missing


def test_nothing_committed_names_a_machine_or_a_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    forbidden = re.compile(r"/(?:work|root)/|pypi" + r"\.org|files\.pythonhosted")
    for name in files:
        path = ROOT / name
        if path.suffix in (".png", ".pdf", ".safetensors") or not path.exists() or path.name == "test_structure.py":
            continue
        match = forbidden.search(path.read_text(encoding="utf-8"))
        assert not match, f"{name}: {match.group()}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_anatomy(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert "Claim" in notebook.cells[0].source and "minute" in notebook.cells[0].source
    assert [("parameters" in cell.metadata.get("tags", [])) for cell in code] == [True] + [False] * (len(code) - 1)
    for node in ast.parse(code[0].source).body:
        ast.literal_eval(node.value)  # flat literals, so that the runner can read and replace them
    assert "start(" in code[1].source and "run.finish(" in "".join(cell.source for cell in code[-2:])
    assert all(cell.source.count("\n") <= 22 for cell in code[1:])
    assert notebook.cells[-1].cell_type == "markdown" and "To change it" in notebook.cells[-1].source


def test_every_notebook_is_a_stage_and_every_stage_a_notebook():
    pipeline = yaml.safe_load((ROOT / "notebooks" / "pipeline.yaml").read_text(encoding="utf-8"))["stages"]
    assert [stage["name"] for stage in pipeline] == [path.stem for path in NOTEBOOKS]
