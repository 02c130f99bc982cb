"""Turn a finished run into what is committed: data/reference, claims, figures, notebook outputs, README tables.

    python -m ssah_utils.publish --profile reference --seed 1     # stores the results of another seed, in data/reference/seed-1
    python -m ssah_utils.publish --profile reference              # the run with seed 0, last: all that is committed
    python -m ssah_utils.publish                                  # writes figures and README again from what is stored

Knows stored results and the notebooks' structure. Loads no model, and writes no number that a run did not produce.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd

from ssah_utils import claims
from ssah_utils.figures import redraw
from ssah_utils.files import complete_only, sha256_of, write_json
from ssah_utils.paper_figures import number, shown_interval
from ssah_utils.results import REFERENCE, ROOT, load_result, runs_root, set_style

STORED = ("result.json", "units.safetensors", "frozen_units.safetensors")
README = ROOT / "README.md"
CLAIMS = "claims.json"


def find_run(profile: str, seed: int) -> Path:
    """The newest run of a profile with this seed on this machine; ``FileNotFoundError`` says how to make one."""
    stamps = sorted((runs_root() / profile).glob(f"*/seed-{seed}/*/stamp.json"), key=lambda stamp: stamp.stat().st_mtime)
    if not stamps:
        raise FileNotFoundError(
            f"no finished run of profile '{profile}' with seed {seed}: "
            f"run python -m ssah_utils.run --profile {profile} --set seed={seed}"
        )
    return stamps[-1].parents[1]


def copy_results(source: Path, target: Path, names: tuple[str, ...] = STORED) -> list[str]:
    """Copy the small result files of every stage; returns the stages found."""
    stages = sorted(folder.name for folder in source.iterdir() if (folder / "stamp.json").exists())
    for stage in stages:
        for name in names:
            if (source / stage / name).exists():
                with complete_only(target / stage / name) as partial:
                    shutil.copyfile(source / stage / name, partial)
    return stages


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of a notebook's code cells: what its outputs belong to."""
    return sha256_of([cell.source for cell in notebook.cells if cell.cell_type == "code"])[:16]


def with_outputs(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The source notebook with the outputs of its execution, cells counted 1..n; the injected parameters stay out.

    Raises ``ValueError`` when the execution was of other code.
    """
    by_id = {cell.id: cell for cell in executed.cells}
    count = 0
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        done = by_id.get(cell.id)
        if done is None or done.source != cell.source:
            raise ValueError(f"cell {count} has changed since the run: execute the notebook again before publishing")
        # what libraries say on stderr is about the machine it ran on, not about the finding
        cell.outputs = [output for output in done.outputs if output.get("name") != "stderr"]
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    source.metadata["ssah"] = {"outputs_of": code_hash(source)}
    return source


def publish_notebook(stage: str, source: Path) -> None:
    path = ROOT / "notebooks" / f"{stage}.ipynb"
    notebook = with_outputs(nbformat.read(path, as_version=4), nbformat.read(source / stage / f"{stage}.ipynb", as_version=4))
    with complete_only(path) as partial:
        nbformat.write(notebook, partial)


# ------------------------------------------------------------------------------------------------------------ README


def interval(row: pd.Series, scale: float = 100, digits: int = 1) -> str:
    return f"{scale * row['mean']:.{digits}f} [{scale * row['low']:.{digits}f}, {scale * row['high']:.{digits}f}]"


def markdown(rows: list[list[str]], header: list[str]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def alignment_table(results: dict[str, dict]) -> str:
    """Rates of the three models on held-out requests, in percent with 95% intervals."""
    rates = results["01_alignment"]["tables"]["rates"].set_index(["set", "metric", "model"])
    names = [("harmful", "asr", "ASR, AdvBench"), ("other_harmful", "asr", "ASR, HarmBench"),
             ("helpful", "refused", "harmless requests refused"), ("safe_twin", "refused", "safe contrast twins refused"),
             ("harmful_twin", "asr", "ASR, harmful contrast twins"), ("cloze", "accuracy", "cloze accuracy")]  # fmt: skip
    models = [name for name in ("base", "unaligned", "aligned") if name in rates.index.get_level_values("model")]
    rows = [[title, *(interval(rates.loc[(name, metric, model)]) for model in models)] for name, metric, title in names]
    return markdown(rows, ["held-out, %", *models])


def ablation_table(results: dict[str, dict]) -> str:
    """Verdicts and utility under every ablation; random controls are averaged over their draws, range in parentheses."""
    rates = results["04_ablation"]["tables"]["rates"]
    rates = rates[rates["part"].isin(["groups", "kinds"])]
    columns = [
        ("harmful", "asr"),
        ("harmful", "coherent_asr"),
        ("harmful", "degenerate"),
        ("helpful", "refused"),
        ("cloze", "accuracy"),
    ]
    rows = []
    for condition, part in rates.groupby("condition", sort=False):
        cells = []
        for name, metric in columns:
            found = part[(part["set"] == name) & (part["metric"] == metric)]
            if len(found) == 1:
                cells.append(interval(found.iloc[0], digits=0))
            else:
                cells.append(
                    f"{100 * found['mean'].mean():.0f} ({100 * found['mean'].min():.0f} to {100 * found['mean'].max():.0f})"
                )
        nll = part[(part["set"] == "helpful") & (part["metric"] == "answer_nll")]["mean"].mean()
        rows.append([condition, f"{part['fraction'].iloc[0]:.1%}", *cells, f"{nll:.2f}"])
    header = [
        "ablated",
        "share",
        "ASR",
        "coherent ASR",
        "degenerate",
        "harmless refused",
        "cloze accuracy",
        "NLL of own answers",
    ]
    return markdown(rows, header)


def paper_table(results: dict[str, dict]) -> str:
    """Changes in points beside the paper's Llama2-7B-Chat."""
    table = results["04_ablation"]["tables"]["comparison"]
    rows = []
    for _, row in table.iterrows():
        change = {name: f"{row[name]:+.1f}" for name in row.index if name not in ("ablated", "same direction")}
        attack = f"{change['coherent ASR, ours']} [{change['low']}, {change['high']}]"
        beside = [change[name] for name in ("random control", "ASR, paper", "utility, ours", "utility, paper")]
        rows.append([row["ablated"], change["ASR, ours"], attack, *beside, "yes" if row["same direction"] else "no"])
    header = [
        "ablated",
        "ASR",
        "coherent ASR [95%]",
        "random control",
        "ASR, paper",
        "utility",
        "utility, paper",
        "same direction",
    ]
    return markdown(rows, header)


def transfer_table(results: dict[str, dict]) -> str:
    """What fine-tuning moved, against its two controls."""
    rows = [
        [row["claim"], row["paper"], f"{row['ours']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", f"{row['control']:.2f}",
         f"{row['floor']:.2f}", "yes" if row["holds"] else "no"]
        for _, row in results["05_transfer"]["tables"]["comparison"].iterrows()
    ]  # fmt: skip
    return markdown(rows, ["claim", "paper", "ours", "fine-tuned with refusals", "other calibration", "holds"])


def freezing_table(results: dict[str, dict]) -> str:
    """Margin gained at equal task loss, and the judged answers at the last step (mean over seeds), per task and frozen set."""
    tables = results["06_freezing"]["tables"]
    columns = [("harmful", "asr"), ("harmful", "coherent_asr"), ("other_harmful", "coherent_asr"), ("cloze", "accuracy")]
    rows = []
    for _, row in tables["equal"].iterrows():
        part = tables["rates"][(tables["rates"]["task"] == row["task"]) & (tables["rates"]["condition"] == row["frozen"])]
        cells = [percent(part, name, metric) for name, metric in columns]
        path = tables["paths"][(tables["paths"]["task"] == row["task"]) & (tables["paths"]["condition"] == row["frozen"])]
        last = path[path["step"] == path["step"].max()]["task_loss"].mean()
        gain = "-" if row["frozen"] == "nothing" else f"{row['gain']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        seeds = f"{row['seed_low']:+.2f} to {row['seed_high']:+.2f}"
        rows.append([row["task"], row["frozen"], gain, seeds, *cells, f"{last:.2f}"])
    header = ["fine-tuned on", "frozen", "margin gained, nats", "seeds", "ASR, AdvBench", "coherent", "coherent, HarmBench"]
    return markdown(rows, [*header, "cloze", "last task loss"])


def percent(part: pd.DataFrame, name: str, metric: str) -> str:
    return f"{100 * part[(part['set'] == name) & (part['metric'] == metric)]['mean'].mean():.0f}"


def adapter_table(results: dict[str, dict]) -> str:
    """PEFT methods against full fine-tuning and freezing, at the task loss each method reaches."""
    table = results["06_freezing"]["tables"]["peft"]
    gains = [f"{row['gain']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" for _, row in table.iterrows()]
    rows = [[row["method"], row["against"], f"{row['task_loss']:.2f}", gains[n]] for n, row in table.iterrows()]
    return markdown(rows, ["method", "against (frozen)", "task loss", "margin, difference in nats"])


def budget_table(results: dict[str, dict]) -> str:
    """What was trained, the alignment it reached and the tax it paid."""
    rates = results["07_redundant_units"]["tables"]["rates"]
    columns = [("harmful", "coherent_asr"), ("other_harmful", "coherent_asr"), ("helpful", "refused"), ("safe_twin", "refused"),
               ("cloze", "accuracy"), ("arithmetic", "accuracy")]  # fmt: skip
    rows = []
    for (method, trained), part in rates.groupby(["method", "trained"], sort=False):
        found = [part[(part["set"] == name) & (part["metric"] == metric)] for name, metric in columns]
        cells = [interval(one.iloc[0], digits=0) if len(one) == 1 else f"{100 * one['mean'].mean():.0f}" for one in found]
        nll = part[(part["set"] == "helpful") & (part["metric"] == "answer_nll")]["mean"].mean()
        rows.append([method.upper(), trained, *cells, f"{nll:.2f}"])
    header = ["", "trained", "coherent ASR, AdvBench", "HarmBench", "harmless refused", "safe twins refused"]
    return markdown(rows, [*header, "cloze", "arithmetic", "NLL of the base's answers"])


def claims_table(results: dict[str, dict]) -> str:
    """One row per claim: ours and its interval, control, verdict; numbers are those of claims.json."""
    rows = []
    for _, row in results["08_claims"]["tables"]["claims"].iterrows():
        seeds = "" if pd.isna(row["n_seeds"]) else f"{row['n_seeds']:.0f}"
        cells = [row["claim"], row["source"], row["paper"], shown_interval(row), number(row["control"]), row["unit"], seeds]
        rows.append([*cells, f"**{row['verdict']}**" if row["verdict"] == "replicated" else row["verdict"]])
    return markdown(rows, ["claim", "in the paper", "paper", "ours", "control", "unit", "seeds", "verdict"])


def cost_table(results: dict[str, dict]) -> str:
    """What each notebook took, package start-up included."""
    rows = [[stage, f"{result['seconds'] / 60:.1f}", f"{result['peak_memory_gib']:.1f}"] for stage, result in results.items()]
    return markdown(rows, ["notebook", "minutes", "peak memory, GiB"])


TABLES = {
    "cost": cost_table,
    "claims": claims_table,
    "alignment": alignment_table,
    "ablation": ablation_table,
    "paper": paper_table,
    "transfer": transfer_table,
    "freezing": freezing_table,
    "adapters": adapter_table,
    "budget": budget_table,
}


def fill_readme(text: str, results: dict[str, dict]) -> str:
    """README with everything between ``<!-- NAME -->`` and ``<!-- end NAME -->`` replaced by the table of that name."""
    for name, make in TABLES.items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise ValueError(f"README.md has no place for the table '{name}': put {opening} and {closing} where it belongs")
        text = f"{before}{opening}\n{make(results)}\n{closing}{after}"
    return text


def reference_results() -> dict[str, dict]:
    return {path.parent.name: load_result(path) for path in sorted(REFERENCE.glob("*/result.json"))}


def publish_claims(folder: Path) -> list[str]:
    """Write claims.json from the stored results; one line if the stored stage 08_claims says otherwise."""
    table, problems = claims.judge_stored(folder, claims.load_claims())
    write_json(folder / CLAIMS, claims.to_records(table))
    said = claims.to_records(load_result(folder / "08_claims" / "result.json")["tables"]["claims"])
    if said != json.loads((folder / CLAIMS).read_text(encoding="utf-8")):
        problems.append("08_claims does not follow from the results and seeds stored now: re-run 08_claims and publish it")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ssah_utils.publish", description="Make a finished run the committed one.")
    parser.add_argument("--profile", default="", help="whose run to store (default: none, only write again what follows)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds than 0 are stored beside it, as data/reference/seed-K")
    options = parser.parse_args(arguments)
    set_style()
    try:
        source = find_run(options.profile, options.seed) if options.profile else None
        if options.seed:
            if not source:
                raise ValueError("--seed needs --profile: whose run with that seed?")
            stages = copy_results(source, REFERENCE / f"seed-{options.seed}", ("result.json",))
            print(f"seed {options.seed}: stored {', '.join(stages)}; publish seed 0 after running its 08_claims again")
            return 0
        for stage in copy_results(source, REFERENCE) if source else []:
            publish_notebook(stage, source)
        problems = publish_claims(REFERENCE) + redraw(REFERENCE, ROOT / "figures")
        text = fill_readme(README.read_text(encoding="utf-8"), reference_results())
        with complete_only(README) as partial:
            partial.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        problems = str(error).splitlines()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
