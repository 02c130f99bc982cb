"""Sphinx reads this: ``make site`` builds README, docs/, notebooks/ and the API reference.

The source folder is the project itself, so that a relative link means the same on a page as in the
repository. Nothing is executed: notebooks show the outputs that are committed. Nothing on a page
comes from another host.
"""

import re
import shutil
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import api_pages  # noqa: E402 (it lies beside this file)

project = "ssah_utils"
author = "The ssah_utils authors"
project_copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["README.md", "data/README.md", "docs/**", "notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "dist", "figures", "runs", "site", "ssah_utils", "tests"]

nb_execution_mode = "off"
nb_output_stderr = "remove"
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]  # <img>, where an image has a width

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "ssah_utils"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False


def contents() -> list[tuple[str, list[str]]]:
    """The table of contents: captions and the pages under them.

    Every Markdown file of docs/ is there, and every notebook in the order of pipeline.yaml.
    """
    first = ["guide", "results", "judge"]
    others = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    written = [*first, *(name for name in others if name not in first)]
    stages = yaml.safe_load((ROOT / "notebooks/pipeline.yaml").read_text(encoding="utf-8"))
    return [
        ("Guide", [*(f"docs/{name}" for name in written), "data/README"]),
        ("Notebooks", [f"notebooks/{stage['name']}" for stage in stages["stages"]]),
        ("Reference", ["docs/api/index"]),
    ]


def add_contents(app, docname: str, source: list[str]) -> None:
    """Put the table of contents, which GitHub does not need, at the end of the README."""
    if docname == root_doc:
        for caption, pages in contents():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def as_restructured_text(app, what, name, item, options, lines: list[str]) -> None:
    """Docstrings as this package writes them: a bar is an absolute value or a union, and what is
    indented after a paragraph is code.
    """
    kept = r"(``.*?``|^    [^\n]*)"  # literals and code
    text = "\n".join(lines)
    text = re.sub(kept + r"|\|", lambda found: found[1] or r"\|", text, flags=re.S | re.M)
    text = re.sub(r"^(?![ *-])(.*[^:\n])\n\n(?=    \S)", r"\1\n\n::\n\n", text, flags=re.M)
    lines[:] = text.split("\n")


def write_index(app, failed: Exception | None) -> None:
    """The README's page is also the page at the site's address."""
    if not failed and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app) -> None:
    api_pages.write(ROOT / "ssah_utils", ROOT / "docs" / "api")
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("build-finished", write_index)
