"""The site: every page is in its table of contents, its API pages are those of the package, and it
builds without a warning, a broken link or a request to another host.
"""

import importlib.util
import re
import subprocess
import sys
import tomllib
from types import ModuleType

import pytest

from ssah_utils.files import PACKAGE, ROOT
from tests.links import broken_in_site


@pytest.fixture
def configuration(monkeypatch) -> ModuleType:
    """docs/conf.py, which looks for its neighbour on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    specification = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def api_pages(configuration) -> ModuleType:
    return configuration.api_pages


def test_every_document_and_notebook_is_in_the_table_of_contents(configuration):
    listed = [page for _, pages in configuration.contents() for page in pages]
    written = {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")}
    notebooks = [f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*written, *notebooks, "data/README", "docs/api/index"}


def test_only_the_readme_gets_the_table_of_contents(configuration):
    readme, other = ["# Title\n"], ["# Other\n"]
    configuration.add_contents(None, "README", readme)
    configuration.add_contents(None, "docs/guide", other)
    assert other == ["# Other\n"]
    assert readme[0].startswith("# Title\n") and "notebooks/01_alignment" in readme[0]


def test_docstrings_are_read_as_the_package_writes_them(configuration):
    """Bars are no substitutions, also beside literals over two lines; indented lines are code."""
    written = "|a| in ``x |\ny``, so\n\n    a = b | c\n    d\n\nand:\n\n* one\n\n    more"
    lines = written.split("\n")
    configuration.as_restructured_text(None, "function", "f", None, None, lines)
    assert "\n".join(lines) == (
        "\\|a\\| in ``x |\ny``, so\n\n::\n\n    a = b | c\n    d\n\nand:\n\n* one\n\n    more"
    )


def test_every_module_has_a_page_in_its_room(api_pages):
    rooms = api_pages.modules_by_room(PACKAGE)
    modules = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {name for names in rooms.values() for name in names} == modules
    assert all(name.startswith(f"{room}.") for room in rooms if room for name in rooms[room])
    assert set(api_pages.pages(PACKAGE)) == {"index.md", *(f"{name}.md" for name in modules)}


def test_a_folder_that_is_no_room_is_an_error(api_pages, tmp_path):
    (tmp_path / "attic").mkdir()
    (tmp_path / "attic" / "old.py").write_text("")
    with pytest.raises(ValueError, match="attic is no room"):
        api_pages.modules_by_room(tmp_path)


def test_the_page_of_a_module_that_is_gone_goes_too(api_pages, tmp_path):
    package, folder = tmp_path / "package", tmp_path / "api"
    package.mkdir()
    (package / "__init__.py").write_text('"""What most users need."""\n')
    for name in ("kept", "gone"):
        (package / f"{name}.py").write_text('"""Does this\nand that. And more."""\n')
    api_pages.write(package, folder)
    index = (folder / "index.md").read_text()
    assert "What most users need." in index and "| [kept](kept.md) | Does this and that |" in index
    (package / "gone.py").unlink()
    api_pages.write(package, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["index.md", "kept.md"]
    assert "gone" not in (folder / "index.md").read_text()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    named = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in named}


@pytest.mark.parametrize("extra", ["site", "browser"])
def test_the_lock_of_an_extra_holds_it_and_contradicts_no_other_lock(extra):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wanted = {re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra]}
    own, package = pins(f"requirements-{extra}.lock"), pins("requirements.lock")
    assert wanted <= own.keys() and not own.keys() & package.keys()


def test_broken_links_and_foreign_hosts_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#here"></a><a href="#top"></a><a href="c.html"></a>'
        '<a href="b.html#gone"></a><a href="https://a.example"></a><img src="gone.png">'
        '<script src="https://cdn.example/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p>')
    (tmp_path / "style.css").write_text("p { background: url('//cdn.example/x.png') }")
    assert broken_in_site(tmp_path) == [
        "a.html loads https://cdn.example/x.js",
        "a.html: c.html does not exist",
        "a.html: b.html#gone has no such anchor",
        "a.html: gone.png does not exist",
        "style.css loads //cdn.example/x.png",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_a_broken_link_or_another_host(tmp_path):
    for package in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(package, reason="make site installs it")
    command = f"{sys.executable} -m sphinx -M html . {tmp_path} -c docs -q -W --keep-going"
    built = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    assert broken_in_site(tmp_path / "html") == []
    words = (tmp_path / "html" / "searchindex.js").read_text(encoding="utf-8")
    assert "refus" in words and "interventions.ablated" in words.replace("ssah_utils.", "")
