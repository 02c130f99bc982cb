"""Figures from stored tables: what is unreadable is reported, the rest is drawn; equal figures are
equal files.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import files, unit_files, units
from ssah_utils.architectures import ModelShape
from ssah_utils.figures import style
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline import cli, redraw, runs
from ssah_utils.pipeline.stored import load_result
from ssah_utils.unit_files import ModelInfo, ScoreInfo
from tests import test_figures_finders as stability
from tests.test_figures_defences import defence_tables
from tests.test_figures_stepwise import direction_tables

matplotlib.use("Agg")
DRAWN = {
    stage: set(drawings)
    for stage, drawings in redraw.FIGURES.items()
    if stage not in redraw.ONLY_NAMED
}
ALL = set().union(*DRAWN.values())


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": max(0.0, mean - 0.1), "high": min(1.0, mean + 0.1)}


def alignment_tables() -> dict[str, pd.DataFrame]:
    shares = {"refused": 0.5, "coherent_asr": 0.3, "degenerate": 0.2, "asr": 0.5}
    rates = [
        {"model": model, "set": name, "metric": metric} | interval(mean)
        for model, name, (metric, mean) in itertools.product(
            ("base", "aligned", "unaligned"), ("harmful", "helpful", "safe_twin"), shares.items()
        )
    ]
    training = pd.DataFrame(
        {
            "model": ["aligned"] * 12 + ["unaligned"] * 12,
            "step": [*range(12)] * 2,
            "loss": np.linspace(2, 1, 24),
        }
    )
    return {"rates": pd.DataFrame(rates), "training": training}


def judge_tables() -> dict[str, pd.DataFrame]:
    rows = [
        {
            "judge": judge,
            "part": part,
            "n": 20,
            "precision": 1.0,
            "recall": 0.9,
            "f1": 0.95,
            "low": 0.9,
            "high": 1.0,
        }
        for judge, part in itertools.product(
            ("learned", "rules", "substring list"), ("development", "test", "all")
        )
    ]
    cases = pd.DataFrame(
        {
            "kind": ["real", "words looped", "ablated 40%"],
            "base_nll": [1.0, np.nan, 9.0],
            "repetition": [0.0, 0.7, 0.1],
            "gibberish": [False, True, True],
        }
    )
    constants = pd.DataFrame(
        {"constant": ["REPETITION_WEIGHT", "MAX_DEGENERACY"], "stored": [8.0, 4.0]}
    )
    names = ("base", "aligned", "safety", "random, as safety", "utility", "redundant")
    lengths = pd.DataFrame(
        [
            {"condition": condition, "set": name, "length": length, "n": 12}
            for condition, name, length in itertools.product(
                names, ("harmful", "helpful"), (12, 16, 96)
            )
        ]
    )
    overall = pd.DataFrame({"condition": "all", "set": "all", "length": [12, 16, 96], "n": 144})
    flips = pd.concat([lengths, overall], ignore_index=True)
    flips = flips.assign(flips=1 / flips["length"], low=0.0, high=2 / flips["length"])
    flips["role"] = flips["length"].map({12: "", 16: "default", 96: "longest"})
    return {
        "length_verdicts": lengths.assign(coherent_asr=0.5, refused=0.4, degenerate=0.1),
        "length_flips": flips,
        "judge_refusals": pd.DataFrame(rows),
        "judge_cases": cases,
        "judge_constants": constants,
    }


def probing_tables() -> dict[str, pd.DataFrame]:
    rows = [
        {"model": model, "queries": queries, "layer": layer} | interval(0.1 * layer)
        for model, queries, layer in itertools.product(
            ("aligned", "unaligned"), ("harmful", "harmless"), range(3)
        )
    ]
    distances = pd.DataFrame(rows)
    margins = pd.DataFrame(
        [
            {"model": model, "queries": queries, "id": str(n), "margin": float(n)}
            for model, queries, n in itertools.product(
                ("aligned", "unaligned"), ("harmful", "harmless"), range(4)
            )
        ]
    )
    return {
        "distances": distances,
        "residual": distances[distances["queries"] == "harmful"],
        "margins": margins,
    }


def ablation_tables() -> dict[str, pd.DataFrame]:
    rows = []
    for condition in ("nothing", "safety", "random, as safety", "utility"):
        for draw in range(2 if condition.startswith("random") else 1):
            keys = {
                "part": "groups",
                "condition": condition,
                "draw": draw,
                "units": 10,
                "fraction": 0.01,
            }
            for metric, mean in {"refused": 0.6, "coherent_asr": 0.3, "degenerate": 0.1}.items():
                rows.append(keys | {"set": "harmful", "metric": metric} | interval(mean))
            rows.append(keys | {"set": "helpful", "metric": "refused"} | interval(0.05))
            rows.append(keys | {"set": "cloze", "metric": "accuracy"} | interval(0.5))
    for condition, fraction in itertools.product(("safety", "random"), (0.001, 0.01, 0.05)):
        keys = {
            "part": "curve",
            "condition": condition,
            "draw": 0,
            "units": 10,
            "fraction": fraction,
        }
        for name, metric in (
            ("harmful", "coherent_asr"),
            ("helpful", "refused"),
            ("helpful", "answer_nll"),
        ):
            rows.append(keys | {"set": name, "metric": metric} | interval(10 * fraction))
    rates = pd.DataFrame(rows)
    differences = rates[rates["part"] == "groups"].rename(columns={"mean": "difference"})
    return {"rates": rates, "differences": differences}


TABLES = {
    "01_alignment": alignment_tables,
    "02_probing": probing_tables,
    "A2_stepwise": lambda: direction_tables(("aligned", "unaligned")),
    "03_units": dict,  # all its figures are drawn from the units
    "04_ablation": ablation_tables,
    "A1_judge": judge_tables,
    "A3_finders": stability.finder_tables,
    "A4_defences": defence_tables,
}
# drawn from small tables elsewhere
for trained in ("05_transfer", "06_freezing", "07_redundant_units", "08_claims"):
    TABLES[trained] = lambda stage=trained: load_result(files.REFERENCE / stage / "result.json")[
        "tables"
    ]


MODEL = ModelInfo("tiny", "", "f", ModelShape("llama", 3, 12, 2, 1, 10, 30))


def write_stage(source: Path, stage: str) -> None:
    run = runs.Run(stage, source / stage, {})
    if stage == "03_units":
        generator = torch.Generator().manual_seed(0)
        sizes = {"attention": (3, 20), "mlp": (3, 30)}
        z_safety, z_utility = (
            PerUnit({kind: torch.randn(size, generator=generator) for kind, size in sizes.items()})
            for _ in range(2)
        )
        parted = units.partition(z_safety, z_utility, fingerprint="f")
        z = {"z_safety": z_safety, "z_utility": z_utility}
        about_z = {name: ScoreInfo("random numbers", "standard deviations") for name in z}
        unit_files.save_partition(run.path("units.safetensors"), parted, MODEL, z, about_z)
    run.finish(**TABLES[stage]())


@pytest.fixture(autouse=True)
def coarse(drawn_in_our_style):
    """A tenth of the usual resolution, as only the equality of files matters here."""
    plt.rcParams["savefig.dpi"] = 20


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("stored") / "seed-0"
    for stage in DRAWN:
        write_stage(source, stage)
    return source


@pytest.fixture
def source(stored, tmp_path) -> Path:
    """A copy that a test may damage."""
    for path in stored.rglob("*.*"):
        target = tmp_path / "seed-0" / path.relative_to(stored)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "seed-0"


def drawn(target: Path) -> set[str]:
    return {path.stem for path in target.glob("*.png")}


def redrawn(source: Path, target: Path) -> tuple[list[str], set[str]]:
    """Problems, and the names of the figures that were drawn."""
    problems = redraw.redraw(source, target)
    assert not any("\n" in problem for problem in problems)
    return problems, drawn(target)


@pytest.fixture(scope="module")
def twice(stored, tmp_path_factory) -> tuple[Path, Path]:
    targets = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for target in targets:
        style.set_style()
        plt.rcParams["savefig.dpi"] = 20
        assert redraw.redraw(stored, target) == []
    return targets


def test_every_figure_is_drawn_as_png_and_pdf(twice):
    for suffix in ("png", "pdf"):
        assert {path.stem for path in twice[0].glob(f"*.{suffix}")} == ALL
    assert {path.suffix for path in twice[0].iterdir()} == {".png", ".pdf"}, (
        "no temporary file is left"
    )


def test_saved_figures_are_closed(stored, tmp_path):
    assert redraw.redraw_stage("04_ablation", stored, tmp_path) == []  # in this process
    assert drawn(tmp_path) == DRAWN["04_ablation"] and plt.get_fignums() == []


@pytest.mark.parametrize("name", sorted(ALL))
def test_drawing_twice_gives_equal_files(twice, name):
    for suffix in ("png", "pdf"):
        first, second = ((target / f"{name}.{suffix}").read_bytes() for target in twice)
        assert first == second
    assert (twice[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("training", [None, []], ids=["no table", "empty table"])
def test_given_pair_without_training_has_no_loss_curve(source, tmp_path, monkeypatch, training):
    """01_alignment stores an empty table where it trains nothing."""
    monkeypatch.setattr(redraw, "FIGURES", {"01_alignment": redraw.FIGURES["01_alignment"]})
    path = source / "01_alignment" / "result.json"
    content = json.loads(path.read_text())
    del content["tables"]["training"]
    content["tables"] |= {} if training is None else {"training": training}
    path.write_text(json.dumps(content))
    assert redrawn(source, tmp_path / "figures") == ([], {"alignment_verdicts"})


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "of another format": lambda path: path.write_text('{"format": "ssah-result-0", "tables": {}}'),
    "another JSON value": lambda path: path.write_text("[1, 2]"),
    "without tables": lambda path: path.write_text('{"format": "ssah-result-1"}'),
    "with empty tables": lambda path: path.write_text(
        '{"format": "ssah-result-1", "tables": {"rates": []}}'
    ),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00{"),
}


@pytest.fixture
def quick(monkeypatch):
    """Empty figures, except those of a stage named in ``quick(stage)``."""

    def keep(*stages: str) -> None:
        empty = {
            name: dict.fromkeys(drawings, lambda tables: plt.figure())
            for name, drawings in redraw.FIGURES.items()
        }
        monkeypatch.setattr(
            redraw, "FIGURES", empty | {stage: redraw.FIGURES[stage] for stage in stages}
        )

    return keep


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "of another format"])
@pytest.mark.parametrize("stage", TABLES)
def test_damaged_result_names_the_stage_to_run_again(source, tmp_path, stage, damage):
    DAMAGE[damage](source / stage / "result.json")
    (problem,) = redraw.redraw_stage(stage, source, tmp_path / "figures")
    assert problem.startswith(f"{stage}: ") and f"run {stage}" in problem and "\n" not in problem
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        *((stage, "missing") for stage in TABLES),
        *(("04_ablation", one) for one in list(DAMAGE)[1:]),
    ],
)
def test_what_other_results_have_is_drawn_beside_a_damaged_one(
    source, tmp_path, quick, stage, damage
):
    quick(stage)
    DAMAGE[damage](source / stage / "result.json")
    problems, names = redrawn(source, tmp_path / "figures")
    (problem,) = problems
    assert problem.startswith(f"{stage}: ") and f"run {stage}" in problem
    assert names == ALL - DRAWN[stage]


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "another JSON value"])
def test_damaged_units_name_the_stage_to_run_again_and_the_rest_is_drawn(
    source, tmp_path, quick, damage
):
    quick("03_units")
    DAMAGE[damage](source / "03_units" / "units.safetensors")
    problems, names = redrawn(source, tmp_path / "figures")
    (problem,) = problems
    assert problem.startswith("03_units: ") and "run 03_units" in problem
    assert names == ALL - DRAWN["03_units"]


def test_units_without_scores_name_the_stage_to_run_again(source, tmp_path, quick):
    quick("03_units")
    path = source / "03_units" / "units.safetensors"
    parted, _ = unit_files.load_partition(path)
    unit_files.save_partition(path, parted, MODEL)
    problems, names = redrawn(source, tmp_path / "figures")
    assert len(problems) == 1 and "run 03_units" in problems[0]
    assert names == ALL - DRAWN["03_units"]


def test_a_result_from_before_a_figure_was_added_loses_that_figure_only(source, tmp_path, quick):
    quick("04_ablation")
    path = source / "04_ablation" / "result.json"
    content = json.loads(path.read_text())
    del content["tables"]["differences"]
    path.write_text(json.dumps(content))
    (problem,), names = redrawn(source, tmp_path / "figures")
    assert problem == "04_ablation: figure table1_ablation lacks 'differences': re-run 04_ablation"
    assert names == ALL - {"table1_ablation"}
    assert plt.get_fignums() == []


@pytest.mark.parametrize("damage", ["rows", "values"])
def test_a_table_without_the_rows_or_values_it_needs_costs_its_figure_only(
    source, tmp_path, damage
):
    path = source / "05_transfer" / "result.json"
    content = json.loads(path.read_text())
    moves = content["tables"]["moves"]
    if damage == "rows":
        content["tables"]["moves"] = [row for row in moves if row["data"] != "floor"]
    else:
        content["tables"]["moves"] = [row | {"share": "many"} for row in moves]
    path.write_text(json.dumps(content))
    problems, names = redrawn(source, tmp_path / "figures")
    assert (
        len(problems) == 1
        and problems[0].endswith("re-run 05_transfer")
        and "\n" not in problems[0]
    )
    assert {
        "transfer_flow",
        "transfer_heat",
        "transfer_path",
    } >= ALL - names and plt.get_fignums() == []


# ------------------------------------------------------------------------------------ whose results


def run_folder(root: Path, profile: str, model: str, seed: int, age: int) -> Path:
    folder = root / profile / model / f"seed-{seed}"
    stamp = folder / "01_alignment" / "stamp.json"
    stamp.parent.mkdir(parents=True)
    stamp.write_text("{}")
    os.utime(stamp, (1_000_000 - age, 1_000_000 - age))
    return folder


def test_results_are_those_of_the_newest_run_with_the_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    run_folder(tmp_path, "smoke", "a", 0, age=30)
    newest = run_folder(tmp_path, "smoke", "org--b", 0, age=10)
    other_seed = run_folder(tmp_path, "smoke", "a", 1, age=0)
    drawn = []
    monkeypatch.setattr(redraw, "redraw", lambda source, target: drawn.append(source) or [])
    for words in (["--profile", "smoke"], ["--profile", "smoke", "--seed", "1"], []):
        assert cli.main(["figures", *words]) == 0
    assert drawn == [newest, other_seed, files.REFERENCE]
    assert cli.main(["figures", "--profile", "laptop"]) == 2
    assert "no finished run of profile 'laptop'" in capsys.readouterr().err


def test_main_redraws_and_reports_problems_on_stderr(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(redraw, "REFERENCE", source)
    monkeypatch.setattr(redraw, "FIGURES", {"01_alignment": {"one": lambda tables: plt.figure()}})
    target = tmp_path / "figures"
    assert cli.main(["figures", "--to", str(target)]) == 0
    output = capsys.readouterr()
    assert str(source) in output.out and str(target) in output.out and output.err == ""
    (source / "01_alignment" / "result.json").unlink()
    assert cli.main(["figures", "--to", str(target)]) == 1
    assert capsys.readouterr().err.startswith("error: 01_alignment")


def test_figures_that_cannot_be_written_are_one_line(source, tmp_path, monkeypatch, capsys):
    def full(figure, target, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(redraw, "REFERENCE", source)
    monkeypatch.setattr(redraw, "FIGURES", {"01_alignment": {"one": lambda tables: plt.figure()}})
    monkeypatch.setattr(redraw, "save_figure", full)
    (tmp_path / "file").write_text("no folder")
    for place, code in (("file", 2), ("file/inside", 2), ("figures", 1)):
        assert cli.main(["figures", "--to", str(tmp_path / place)]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert ("name a folder" in line) == (code == 2) and "Traceback" not in line


FORKED = """
from pathlib import Path
import torch
from ssah_utils.pipeline import redraw

def work(*where):
    return [str(int(torch.ones(2_000_000).sqrt().sum()))]

redraw.FIGURES, redraw.redraw_across_models, redraw.redraw_growth = {}, work, work
assert torch.get_num_threads() > 1
print(*work(), *redraw.redraw(Path(), Path()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_figures_are_drawn_after_torch_has_computed_with_threads():
    """After a fork its threads are gone: who waited for them would wait for ever."""
    there = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORKED]
    found = subprocess.run(
        command, env=there, cwd=files.ROOT, capture_output=True, text=True, timeout=240, check=True
    )
    assert found.stdout == "2000000 2000000 2000000\n"
