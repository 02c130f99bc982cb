"""The pages of the API reference: one for every module of the package, grouped by rooms.

Reads the package's files and imports none of them. Sphinx's autodoc fills the pages.
"""

import ast
from pathlib import Path

ROOMS = {
    "": ("Library", "Models, units and their scores, interventions, training, evaluation."),
    "prompts": ("Prompts", "Data sets, splits that do not leak, chat templates, token ids."),
    "judge": ("Judge", "When an answer is refused, complied or degenerate; how good that is."),
    "experiments": ("Experiments", "What the notebooks ask, one module a question."),
    "figures": ("Figures", "From stored tables to figures, one file for each notebook."),
    "pipeline": ("Pipeline", "Runs notebooks, stores results, decides claims, publishes."),
}
INTRODUCTION = """# API reference

## Public names

{public}

## By rooms

Every module of the package. The library knows neither the figures nor the pipeline, and only
notebooks join the two halves.
"""
PAGE = """# {title}

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :undoc-members:
```
"""


def modules_by_room(package: Path) -> dict[str, list[str]]:
    """Names of the package's modules inside it (``models``, ``judge.rules``), by room.

    Raises ``ValueError`` for a folder of the package that is no room here.
    """
    found: dict[str, list[str]] = {room: [] for room in ROOMS}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        room = ".".join(parts[:-1])
        if room not in ROOMS:
            raise ValueError(f"{package.name}/{room} is no room of the API reference: name it here")
        if parts[-1] != "__init__":
            found[room].append(".".join(parts))
    return found


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = docstring(path)
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def pages(package: Path) -> dict[str, str]:
    """Markdown of every page by its file name: the index of the rooms, and one page a module."""
    index, made = [INTRODUCTION.format(public=docstring(package / "__init__.py"))], {}
    for room, modules in modules_by_room(package).items():
        title, meaning = ROOMS[room]
        index += [f"### {title}\n", f"{meaning}\n", "| module | what for |\n|---|---|"]
        for module in modules:
            path = package.joinpath(*module.split(".")).with_suffix(".py")
            index.append(f"| [{module}]({module}.md) | {purpose(path)} |")
            made[f"{module}.md"] = PAGE.format(title=module, module=f"{package.name}.{module}")
        listed = "\n".join(modules)
        index.append(f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n")
    return {"index.md": "\n".join(index), **made}


def write(package: Path, folder: Path) -> None:
    """Write the pages that have changed, and remove those whose module is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages(package)
    for path in set(folder.glob("*.md")) - {folder / name for name in made}:
        path.unlink()
    for name, text in made.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
