"""A finished run as one HTML page that needs nothing else: ``ssah report``.

On top the verdicts on every claim that the run can decide, then each notebook as it was executed:
prose, sentences, tables and figures, without code. Knows executed notebooks and stored results.
"""

import base64
import io
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import traitlets.config
from nbconvert import HTMLExporter

from ssah_utils.figures.claims import claims as claims_figure
from ssah_utils.figures.claims import shown_interval, two_digits
from ssah_utils.figures.style import set_style
from ssah_utils.files import complete_only
from ssah_utils.pipeline.claims import CLAIM_VERDICTS, load_claims
from ssah_utils.pipeline.stored import amiss, load_result
from ssah_utils.pipeline.verdicts import stored_verdicts

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# What the notebooks leave to a page: no code, no prompts, nothing that asks another host.
SHOWN = {
    "template_name": "basic",
    "exclude_input": True,
    "exclude_input_prompt": True,
    "exclude_output_prompt": True,
    "embed_images": True,
}


def write_report(run: Path, target: Path) -> list[str]:
    """Write the page of a run to ``target``, whole or not at all; gives the notebooks in it.

    ``run``: a folder of one profile, model and seed. ``FileNotFoundError`` where no notebook in it
    has finished, ``ValueError`` for a result that cannot be read, or that is not what is in the
    run.
    """
    folders = sorted(path.parent for path in run.glob("*/stamp.json"))
    folders = [folder for folder in folders if (folder / f"{folder.name}.ipynb").is_file()]
    if not folders:
        raise FileNotFoundError(f"no finished notebook in {run}: run ssah run first")
    for folder in folders:
        if what := amiss(folder):
            raise ValueError(f"{what} before reporting")
    results = {folder.name: load_result(folder / "result.json") for folder in folders}
    about = results[folders[0].name]
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    verdicts = _verdicts(run)
    text = page.render(
        parameters=about["parameters"],
        machine=about["machine"],
        versions=about["versions"],
        commits=sorted({result["commit"] for result in results.values()}),
        counts={name: int((verdicts["verdict"] == name).sum()) for name in CLAIM_VERDICTS},
        verdicts=verdicts.to_dict("records"),
        figure=_claims_picture(verdicts),
        notebooks=[_notebook(folder, results[folder.name]) for folder in folders],
    )
    with complete_only(target) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return list(results)


def _verdicts(run: Path) -> pd.DataFrame:
    """Claims whose results are there, with ours and the control as text."""
    table, _ = stored_verdicts(run, load_claims())
    table = table.assign(is_measured=table["verdict"] != "not measured")
    ours = [shown_interval(row) if row["is_measured"] else "" for _, row in table.iterrows()]
    return table.assign(shown=ours, beside=table["control"].astype(float).map(two_digits))


def _claims_picture(verdicts: pd.DataFrame) -> str:
    """The figure of all claims that were measured, as the address of an image; or nothing."""
    measured = verdicts[verdicts["is_measured"]]
    if measured.empty:
        return ""
    set_style()
    figure = claims_figure({"claims": measured})
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _notebook(folder: Path, result: dict) -> dict[str, object]:
    """A notebook as HTML, with its title and what is said of it in the contents."""
    notebook = nbformat.read(folder / f"{folder.name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress and warnings are no results
            cell.outputs = [one for one in cell.outputs if one.output_type != "stream"]
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    exporter = HTMLExporter(config=traitlets.config.Config({"HTMLExporter": SHOWN}))
    body, _ = exporter.from_notebook_node(notebook)
    return {
        "name": folder.name,
        "title": title,
        "body": jinja2.filters.Markup(body),
        "minutes": result["seconds"] / 60,
    }
