"""The explorer as people use it: JupyterLab in headless Chromium, with a kernel.

``make test-browser`` installs playwright and runs these; they need a Chromium of the system's.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from ssah_utils.files import ROOT
from tests.conftest import free_ports

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
]
# An explorer whose answers are told at once: what is tried is the panel, not a model.
CODE = """
import pandas as pd
from ssah_utils import explorer
from ssah_utils.experiments.safety_switch import NOTHING, RANDOM, SAFETY
from ssah_utils.figures import quickstart, style

style.set_style()

def look(number, share):
    rows = [(NOTHING, 0.0)] if share == 0 else [(SAFETY, 100 * share), (RANDOM, 5.0)]
    table = pd.DataFrame(rows, columns=["switched_off", "margin"])
    return table.assign(share=share, verdict="refused", response=f"answer {number} at {share}")

panel = explorer.Explorer(["first", "second"], [0.0, 0.013, 0.05], look, quickstart.explored)
panel
"""


def notebook(path: Path) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(CODE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab that shows the notebook, with its token."""
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(8)
    notebook(folder / "panel.ipynb")
    (port,) = free_ports(1)
    settings = {
        "IdentityProvider.token": token,
        "ServerApp.port": port,
        "ServerApp.root_dir": str(folder),
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | own,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api?token={token}", server, folder / "log")
        yield f"{address}/lab/tree/panel.ipynb?token={token}&reset"
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and server.poll() is None:
        try:
            with urllib.request.urlopen(address) as answer:
                json.load(answer)
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-1000:]}")


@pytest.fixture(scope="module")
def page(lab):
    """The notebook, run: the panel is there."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *quiet])
        shown = browser.new_page(viewport={"width": 1280, "height": 1100})
        shown.set_default_timeout(60_000)
        shown.goto(lab)
        shown.get_by_text("| Idle").wait_for()  # the kernel is there
        shown.get_by_text("import pandas as pd").click()
        shown.keyboard.press("Shift+Enter")
        shown.locator(".widget-image").wait_for()
        yield shown
        browser.close()


def picture(page) -> str:
    """What the picture shows, as a string that changes with it."""
    return page.locator("img.widget-image").evaluate(
        "async one => Array.from(new Uint8Array(await (await fetch(one.src)).arrayBuffer())).join()"
    )


def screenshot(page, name: str) -> None:
    """Kept where ``SSAH_SCREENSHOTS`` says, for people to look at."""
    if folder := os.environ.get("SSAH_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_the_panel_renders(page):
    assert page.locator(".widget-dropdown select").is_visible()
    assert page.locator(".widget-slider").is_visible()
    size = page.locator("img.widget-image").evaluate("one => [one.naturalWidth, one.complete]")
    assert size[0] > 300 and size[1]
    assert page.get_by_text("answer 0 at 0.0").is_visible()
    screenshot(page, "explorer")


def test_moving_the_slider_changes_the_picture_and_the_words(page):
    before = picture(page)
    page.locator(".widget-slider .noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("answer 0 at 0.013").first.wait_for()
    page.wait_for_function("() => !document.body.innerText.includes('asking the model')")
    assert picture(page) != before
    screenshot(page, "explorer_moved")


def test_another_request_is_asked_about(page):
    page.locator(".widget-dropdown select").select_option("second")
    page.get_by_text("answer 1 at 0.013").first.wait_for()
    assert page.get_by_text("answer 0 at 0.013").count() == 0


def test_the_stored_picture_stands_without_a_kernel():
    """What is committed of the quickstart has the panel's picture as an image beside the widget."""
    stored = nbformat.read(ROOT / "notebooks/00_quickstart.ipynb", as_version=4)
    outputs = [one for cell in stored.cells for one in cell.get("outputs", ())]
    shown = [one.data for one in outputs if "data" in one]
    assert any("image/png" in data for data in shown)
