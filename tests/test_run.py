"""The runner: everything a user can get wrong is one line before a kernel starts; a stage is
finished or absent.
"""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import papermill
import pytest
import transformers
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from safetensors.torch import save_file

from ssah_utils import embedded, hub, room
from ssah_utils.files import ROOT
from ssah_utils.locks import InUse
from ssah_utils.pipeline import cli, kernel, run, runs, stamps, stored
from ssah_utils.prompts import datasets

EXECUTE = papermill.execute_notebook


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text.rstrip(), repr(text)
    return text


@pytest.fixture(autouse=True)
def no_notebook_no_network(tmp_path, monkeypatch):
    """A mistake that is not found must fail a test, not execute the real notebooks."""

    def refuse(*args, **kwargs):
        raise AssertionError("a notebook was executed")

    monkeypatch.setenv("SSAH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(papermill, "execute_notebook", refuse)
    monkeypatch.setattr(hub, "answers", lambda: False)  # it would ask the network


# ----------------------------------------------------------------------------------------- planning


N_STAGES = len(list((ROOT / "notebooks").glob("*.ipynb")))


def test_plan_joins_defaults_profile_and_assignments():
    stages = run.plan("smoke", ["safety_fraction=0.02", "seed=3"])
    names = [stage.name for stage in stages]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert names[:2] == ["00_quickstart", "01_alignment"]
    assert names[-1] == "08_claims", "claims are judged last"
    for stage in stages:
        assert stage.parameters["profile"] == "smoke" and stage.parameters["seed"] == 3
        assert stage.parameters["model"] == embedded.TINY_RANDOM  # the profile's
        # the notebook's, where it reads requests
        assert stage.parameters.get("harmful_data", "advbench") == "advbench"
        assert stage.parameters.get("safety_fraction", 0.02) == 0.02
    assert "safety_fraction" not in stages[0].parameters


def test_assignments_go_to_the_only_notebook():
    stages = run.plan("smoke", ["n_harmful=3"], only="04_ablation")
    found = {
        stage.name: stage.parameters["n_harmful"]
        for stage in stages
        if "n_harmful" in stage.parameters
    }
    assert found.pop("04_ablation") == 3
    assert set(found.values()) == {8}


@pytest.mark.parametrize("name", sorted(run.SHARED))
def test_what_inputs_were_made_with_is_not_changed_for_one_notebook(name):
    with pytest.raises(
        ValueError, match=f"'{name}' is what the inputs of 04_ablation were made with, too"
    ):
        run.plan("smoke", [f"{name}=helpful"], only="04_ablation")


def test_a_notebook_alone_refuses_inputs_that_were_changed_by_hand(quick):
    quick.run()
    (quick.stage_folder("a") / "result.json").write_text("by hand")
    with pytest.raises(
        ValueError, match=r"result\.json of a was changed since it was made: run a again first"
    ):
        quick.run(only="b")
    assert quick.run() == ["a", "b"]


MADE_FROM_A = """
import hashlib, json
read = hashlib.sha256((folder.parent / "a" / "result.json").read_bytes()).hexdigest()
(folder / "result.json").write_text(json.dumps({"inputs": {"a/result.json": read}}))
"""


def test_a_notebook_alone_refuses_inputs_of_two_different_runs(quick):
    """As after one notebook was run alone with other parameters, and those that need it were
    not.
    """
    pipeline = yaml.safe_load((quick.folder / "pipeline.yaml").read_text())
    pipeline["stages"][2]["inputs"] = ["a", "b"]
    (quick.folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    quick.write("b", MADE_FROM_A)
    quick.run()
    assert quick.run("n_items=4", only="a") == ["a"]
    with pytest.raises(
        ValueError, match=r"b was made from another a/result\.json than is there: run b again first"
    ):
        quick.run(only="c")
    assert quick.run(only="b") == ["b"] and quick.run(only="c") == ["c"]


def test_a_notebook_started_by_hand_takes_its_stamp_away(quick):
    quick.run()
    runs.lock_stage(quick.stage_folder("a"))
    runs._held.pop(quick.stage_folder("a")).release()
    assert quick.run() == ["a", "b"]


def test_folders_called_as_one_of_ours_are_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("helpful", "advbench", embedded.TINY_RANDOM):
        (tmp_path / name).mkdir()
    (stage,) = (s for s in run.plan("smoke", []) if s.name == "03_units")
    assert (stage.parameters["helpful_data"], stage.parameters["model"]) == (
        "helpful",
        embedded.TINY_RANDOM,
    )


def test_two_model_folders_have_two_run_folders(tmp_path):
    paths = ["/a/b--c", "/a/b/c", "/x/c", "a/b"]
    assert len({runs.run_folder("laptop", path, 0) for path in paths}) == len(paths)


def test_a_system_prompt_that_begins_with_a_slash_is_no_path(monkeypatch):
    stages = run.plan("smoke", ["system_prompt=/no_think " + "be kind " * 60])
    assert all(stamps.named_files(stage) == {} for stage in stages)


@pytest.mark.parametrize("value", ["", "~/somewhere"])
def test_runs_folder_of_an_empty_or_home_relative_variable(monkeypatch, value):
    monkeypatch.setenv("SSAH_RUNS", value)
    expected = Path(value).expanduser() if value else ROOT / "runs"
    assert stored.runs_root() == expected.resolve()


def test_a_precision_asked_for_once_does_not_stick(monkeypatch, tmp_path):
    monkeypatch.setenv("SSAH_DTYPE", "bfloat16")
    for asked, found in (("float32", "float32"), ("auto", "bfloat16"), ("auto", "bfloat16")):
        runs.set_dtype(asked)
        assert os.environ["SSAH_DTYPE"] == found


def test_what_is_no_table_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = runs.start(
        "08_claims", runs.declared_parameters(ROOT / "notebooks" / "08_claims.ipynb")
    )
    with pytest.raises(TypeError, match="'inputs' is no table, but a list"):
        started.finish(inputs=[])
    assert not started.path("result.json").exists()
    started.finish()


def test_the_partition_belongs_to_03_and_changes_all_that_use_it(monkeypatch):
    """04 once partitioned anew at another share, beside a reference set and random controls of the
    first.
    """
    with pytest.raises(
        ValueError,
        match=r"'safety_fraction' is not one of 04_ablation, but of 03_units, 07_.*: leave --only",
    ):
        run.plan("smoke", ["safety_fraction=0.004"], only="04_ablation")
    monkeypatch.setattr(stamps, "read_stamp", lambda stage: {})
    keys = [
        {s.name: stamps.stage_key(s, stages) for s in stages}
        for stages in (run.plan("smoke", []), run.plan("smoke", ["utility_fraction=0.1"]))
    ]
    changed = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert changed == {
        *("03_units", "04_ablation", "05_transfer", "06_freezing"),
        *("A1_judge", "A2_stepwise", "A3_finders", "A4_defences", "08_claims"),
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_every_declared_parameter_is_stored_with_the_result(path, tmp_path, monkeypatch):
    declared = runs.declared_parameters(path)
    monkeypatch.chdir(tmp_path)
    started = runs.start(path.stem, declared | {"another": 1})
    started.finish(table=runs.pd.DataFrame({"x": [1.5]}))
    stored = json.loads(started.path("result.json").read_text())
    assert stored["parameters"] == declared and stored["tables"] == {"table": [{"x": 1.5}]}
    assert ("dtype" in stored["machine"]) == ("dtype" in declared)


@pytest.mark.parametrize(
    ("around", "asked", "found"),
    [
        ("", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float32"),
    ],
)
def test_precision_is_that_of_the_parameter_else_of_the_environment(
    monkeypatch, tmp_path, around, asked, found
):
    """As the stage's key has it, which the runner makes in the same environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_DTYPE", around)
    (stage,) = (s for s in run.plan("smoke", [f"dtype={asked}"]) if s.name == "05_transfer")
    keyed = stamps.dtype_of(stage).removeprefix("torch.")
    started = runs.start("05_transfer", stage.parameters)
    started.finish()
    stored = json.loads(started.path("result.json").read_text())
    assert keyed == stored["machine"]["dtype"] == found


def test_a_notebook_lacking_a_parameter_of_its_own_is_refused():
    declared = runs.declared_parameters(ROOT / "notebooks" / "A3_finders.ipynb")
    del declared["n_seeds"]
    with pytest.raises(ValueError, match="A3_finders declares 'n_seeds', which has no value"):
        runs.start("A3_finders", declared)


@pytest.mark.parametrize(
    "profile", sorted(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))
)
def test_every_profile_names_known_parameters_of_the_right_type(profile, monkeypatch):
    monkeypatch.setattr(run.parameters, "check_reachable", lambda name: None)
    monkeypatch.setattr(run.parameters, "check_room", lambda *where: None)
    monkeypatch.setattr(run.parameters, "check_room_to_train", lambda *where: None)
    monkeypatch.setattr(run.parameters, "checked_config", lambda name: transformers.LlamaConfig())
    monkeypatch.setattr(run.parameters, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(
        run.parameters, "set_chat_template", lambda tokenizer, file, system_prompt: None
    )
    monkeypatch.setattr(run.parameters, "check_pairs", lambda name: None)  # some are on the hub
    assert len(run.plan(profile, [])) == N_STAGES


def test_room_is_asked_of_the_machine_and_the_notebooks_that_execute(monkeypatch):
    """A job on a cluster is planned where it is submitted, and its run as a whole on a node."""
    asked = []
    check_room_for = lambda stage, values: asked.append((stage, values["model"]))  # noqa: E731
    monkeypatch.setattr(run.parameters, "check_room_for", check_room_for)
    run.plan("smoke", [])
    stages = run.read_pipeline()["stages"]
    of_all = [one["name"] for one in stages if not one.get("only_named") and one.get("work")]
    assert asked == [(name, embedded.TINY_RANDOM) for name in of_all] and "08_claims" not in of_all
    for only, as_in, there in (
        ("04_ablation", "", ["04_ablation"]),
        ("A5_recipes", "", ["A5_recipes"]),
        ("08_claims", run.EVERY, []),
        ("04_ablation", "04_ablation,06_freezing", ["04_ablation"]),
    ):
        asked.clear()
        run.plan("smoke", [], only, as_in=as_in)
        assert [name for name, _ in asked] == there
    asked.clear()
    run.plan("smoke", [], here=False)
    run.plan("smoke", [], checked=False)
    assert not asked


def test_a_model_that_does_not_fit_is_one_line_before_a_kernel_starts(monkeypatch, capsys):
    monkeypatch.setattr(room, "free_memory", lambda: 8)
    words = ["run", "--profile", "smoke", "--set", f"model={embedded.VENDOR_ALIGNED}", "--only"]
    assert cli.main([*words, "02_probing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the weights of '{embedded.VENDOR_ALIGNED}' need" in line


@pytest.mark.parametrize(
    ("profile", "assignments", "only", "words"),
    [
        ("laptp", [], "", ["profile 'laptp'", "'laptop'"]),
        ("smoke", [], "04_ablatoin", ["notebook '04_ablatoin'", "'04_ablation'"]),
        ("smoke", ["n_randm=3"], "", ["parameter 'n_randm'", "'n_random'"]),
        ("smoke", ["n_random=3"], "02_probing", ["parameter 'n_random'", "04_ablation"]),
        ("smoke", ["harmful_data=advbnch"], "", ["data set 'advbnch'", "'advbench'"]),
        ("smoke", ["n_random=many"], "", ["'n_random' takes int", "str 'many'"]),
        ("smoke", ["n_random=2.5"], "", ["'n_random' takes int", "float 2.5"]),
        ("smoke", ["n_random=true"], "", ["'n_random' takes int", "bool True"]),
        ("smoke", ["safety_fraction=yes"], "", ["'safety_fraction' takes float", "str 'yes'"]),
        ("smoke", ["curve_fractions=0.1"], "", ["'curve_fractions' takes list", "float 0.1"]),
        ("smoke", ["n_random"], "", ["name=value", "n_random"]),
        ("smoke", ["n_random=0"], "", ["n_random is 0", "at least 1"]),
        ("smoke", ["new_tokens=-1"], "", ["new_tokens is -1"]),
        ("smoke", ["safety_fraction=1.2"], "", ["safety_fraction is 1.2", "[0, 1]"]),
        ("smoke", ["utility_fraction=-0.1"], "", ["utility_fraction is -0.1"]),
        ("smoke", ["curve_fractions=[0.1, 1.5]"], "", ["curve_fractions is 1.5"]),
        (
            "smoke",
            ["safety_fraction=0.5", "utility_fraction=0.4"],
            "",
            ["safety_fraction", "utility_fraction", "1.05"],
        ),
        ("smoke", ["positions=answer"], "", ["positions is 'answer'", "response, prompt, all"]),
        ("smoke", ["ablation_mode=noise"], "", ["ablation_mode is 'noise'", "zero, mean"]),
        (
            "smoke",
            ["model=smolm2-135m-instruct"],
            "",
            ["model 'smolm2-135m-instruct'", embedded.DEFAULT],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, list) and value and "=" in value[0] else "",
)
def test_mistake_is_one_line_with_the_way_out_and_exit_code_2(
    capsys, profile, assignments, only, words
):
    with pytest.raises(ValueError) as caught:
        run.plan(profile, assignments, only)
    text = one_line(caught.value)
    assert all(word in text for word in words), text
    arguments = [
        "--profile",
        profile,
        *itertools.chain.from_iterable(("--set", a) for a in assignments),
    ]
    assert cli.main(["run", *arguments] + (["--only", only] if only else [])) == 2
    output = capsys.readouterr()
    assert output.err == f"error: {text}\n" and output.out == ""


def test_integer_stands_for_a_float():
    (stage,) = (s for s in run.plan("smoke", ["epochs=2"]) if s.name == "01_alignment")
    assert stage.parameters["epochs"] == 2.0 and type(stage.parameters["epochs"]) is float


def test_strings_need_no_quotes_and_may_hold_an_equals_sign():
    (stage,) = (s for s in run.plan("smoke", ["system_prompt=x = 1"]) if s.name == "02_probing")
    assert stage.parameters["system_prompt"] == "x = 1"


@pytest.mark.parametrize("text", ["[cloze, boolq]", "['cloze', 'boolq']", '["cloze", boolq]'])
def test_strings_in_a_list_need_no_quotes(text):
    (stage,) = (
        s
        for s in run.plan("smoke", [f"utility_tasks={text}"], checked=False)
        if s.name == "01_alignment"
    )
    assert stage.parameters["utility_tasks"] == ["cloze", "boolq"]


@pytest.mark.parametrize(
    "assignment", ["utility_tasks=cloze", "utility_tasks=[cloze", "curve_fractions=[0.1, half]"]
)
def test_what_is_no_list_of_its_kind_is_refused(assignment):
    with pytest.raises(ValueError, match="takes list"):
        run.plan("smoke", [assignment])


def fails_in_one_line(capsys, *arguments: str) -> str:
    assert cli.main(["run", "--profile", "smoke", *arguments]) == 2
    output = capsys.readouterr()
    assert len(output.err.rstrip("\n").splitlines()) == 1, output.err
    return output.err


@pytest.mark.parametrize("parameter", ["model", "unaligned_model"])
def test_an_unreachable_hub_model_names_the_embedded_ones(capsys, parameter):
    """tests/test_hub.py has what a hub says that answers."""
    text = fails_in_one_line(capsys, "--set", f"{parameter}=some/other")
    assert "'some/other' is not in the local cache" in text and embedded.DEFAULT in text


def folder_with_config(folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    return folder


def test_model_of_an_unsupported_architecture_names_the_supported_ones(capsys, tmp_path):
    folder = folder_with_config(tmp_path / "m", model_type="bert")
    text = fails_in_one_line(capsys, "--set", f"model={folder}")
    assert "'bert'" in text and "llama" in text


def test_model_of_a_type_that_transformers_does_not_know_is_one_line(capsys, tmp_path):
    folder = folder_with_config(tmp_path / "m", model_type="nonsense")
    assert str(folder) in fails_in_one_line(capsys, "--set", f"model={folder}")


def test_model_with_code_of_its_own_is_refused_without_asking(capsys, tmp_path, monkeypatch):
    folder = folder_with_config(
        tmp_path / "m", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}
    )
    (folder / "own.py").write_text("raise SystemExit('remote code ran')")
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "n")
    text = fails_in_one_line(capsys, "--set", f"model={folder}")
    assert str(folder) in text and not questions


def test_model_folder_without_config_or_tokenizer_is_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails_in_one_line(capsys, "--set", f"model={tmp_path / 'empty'}")
    folder = folder_with_config(tmp_path / "m", model_type="llama")
    assert str(folder) in fails_in_one_line(capsys, "--set", f"model={folder}")


def test_empty_model_name_is_refused(capsys):
    assert "model" in fails_in_one_line(capsys, "--set", "model=")


def test_profile_cannot_be_set_as_a_parameter_to_an_unknown_one(capsys):
    assert "profile" in fails_in_one_line(capsys, "--set", "profile=nonsense")


def test_list_of_words_where_fractions_belong_is_refused(capsys):
    assert "curve_fractions" in fails_in_one_line(capsys, "--set", "curve_fractions=['a', 'b']")


def test_absent_chat_template_is_found_before_a_kernel_starts_also_for_the_embedded_model(capsys):
    assert "nowhere.jinja" in fails_in_one_line(capsys, "--set", "chat_template=nowhere.jinja")


def test_malformed_data_file_is_found_before_a_kernel_starts(capsys, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    text = fails_in_one_line(capsys, "--set", f"harmful_data={tmp_path / 'mine.jsonl'}")
    assert "mine.jsonl, line 2" in text
    assert "nowhere.csv" in fails_in_one_line(capsys, "--set", "harmful_data=nowhere.csv")


def test_list_shows_every_notebook_and_runs_none(capsys):
    assert cli.main(["list", "--profile", "smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("to run" in line or "by --only" in line for line in lines) == N_STAGES
    assert not any("up to date" in line for line in lines)
    text = "\n".join(lines)
    for name in (*run.profiles(), *embedded.NAMES, *datasets.DATASETS):
        assert name in text, name


@pytest.fixture
def copied_notebooks(tmp_path, monkeypatch) -> Path:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("all: {n_clozes: 3}", ["'n_clozes'", "'n_cloze'", "mine"]),
        ("04_ablation: {n_randoms: 3}", ["'n_randoms'", "'n_random'", "04_ablation", "mine"]),
        ("04_ablatoin: {n_random: 3}", ["'04_ablatoin'", "'04_ablation'", "mine"]),
        ("all: {n_cloze: many}", ["'n_cloze' takes int", "'many'"]),
    ],
)
def test_mistake_in_a_profile_names_profile_and_nearest(copied_notebooks, capsys, content, words):
    (copied_notebooks / "profiles" / "mine.yaml").write_text(content)
    text = fails_in_one_line(capsys, "--profile", "mine")
    assert all(word in text for word in words), text


@pytest.mark.parametrize("content", ["", "# nothing changed\n", "all:\n", "04_ablation:\n"])
def test_profile_that_changes_nothing_is_the_default(copied_notebooks, content):
    (copied_notebooks / "profiles" / "mine.yaml").write_text(content)
    of_models = {stage.name: stage.parameters["model"] for stage in run.plan("mine", [])}
    assert of_models.pop("00_quickstart") == "qwen2.5-coder-0.5b-instruct", "it came aligned"
    assert set(of_models.values()) == {embedded.DEFAULT}


@pytest.mark.parametrize("content", ["all: [1, 2\n", "- 1\n", "all: 3\n"])
def test_profile_that_is_no_yaml_mapping_is_one_line_that_names_it(
    copied_notebooks, capsys, content
):
    (copied_notebooks / "profiles" / "mine.yaml").write_text(content)
    assert "mine" in fails_in_one_line(capsys, "--profile", "mine")


def test_notebook_without_parameters_cell_is_named(copied_notebooks, capsys):
    notebook = nbformat.read(copied_notebooks / "02_probing.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(notebook, copied_notebooks / "02_probing.ipynb")
    assert "02_probing.ipynb" in fails_in_one_line(capsys)


# ---------------------------------------------------------------------------------------- execution

PARAMETERS = (
    'profile = "laptop"\nmodel = "tiny-random-llama"\nseed = 0\nn_items = 3\nharmful_data ='
    ' "advbench"'
)
WRITE = """
import os
from pathlib import Path
folder = Path(os.environ["SSAH_RUNS"]) / profile / model / f"seed-{seed}" / "NAME"
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.json").write_text(str(n_items))
"""


class Pipeline:
    """Three throw-away notebooks a <- b, c alone; ``executed`` lists what ran since the last
    look.
    """

    names = ("a", "b", "c")

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self._executed = folder / "notebooks", folder / "runs", []
        (self.folder / "profiles").mkdir(parents=True)
        (self.folder / "profiles" / "laptop.yaml").write_text("all: {}\n")
        stages = [
            {
                "name": name,
                "inputs": ["a"] * (name == "b"),
                "outputs": ["result.json"],
                "minutes": {"laptop": 0.1},
            }
            for name in self.names
        ]
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump({"stages": stages}))
        for name in self.names:
            self.write(name)

    def write(self, name: str, *cells: str) -> None:
        """A notebook with a title, its parameters, the cell that writes the result, and ``cells``
        after it.
        """
        code = [WRITE.replace("NAME", name), *cells]
        parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        nbformat.write(
            new_notebook(
                cells=[new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, code)],
                metadata={
                    "kernelspec": {
                        "name": "python3",
                        "language": "python",
                        "display_name": "Python 3",
                    }
                },
            ),
            self.folder / f"{name}.ipynb",
        )
        stamps.forget_sources()

    def stage_folder(self, name: str, seed: int = 0) -> Path:
        return self.runs / "laptop" / "tiny-random-llama" / f"seed-{seed}" / name

    def run(self, *assignments: str, only: str = "", force: bool = False) -> list[str]:
        """Plan and run; returns the notebooks executed by this call."""
        self._executed.clear()
        run.run(run.plan("laptop", list(assignments), only), only, force)
        return list(self._executed)

    def fake(self, source, target, parameters, **options) -> None:
        """papermill in this process: executes the cells, writes the executed notebook."""
        name = Path(source).stem
        self._executed.append(name)
        notebook = nbformat.read(source, as_version=4)
        space: dict = {}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
                cell.execution_count = 1
                if "parameters" in cell.metadata.get("tags", []):
                    space |= parameters
        nbformat.write(notebook, target)


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Pipeline:
    """With papermill itself: every executed notebook costs a kernel."""
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(papermill, "execute_notebook", EXECUTE)
    return Pipeline(tmp_path)


@pytest.fixture
def quick(pipeline, monkeypatch) -> Pipeline:
    """Without kernels."""
    monkeypatch.setattr(papermill, "execute_notebook", pipeline.fake)
    return pipeline


def test_notebooks_run_in_order_and_then_are_up_to_date(quick, capsys):
    assert quick.run() == ["a", "b", "c"]
    for name in quick.names:
        found = {path.name for path in quick.stage_folder(name).iterdir()}
        assert found == {f"{name}.ipynb", f"{name}.log", "result.json", "stamp.json"}
    capsys.readouterr()
    assert quick.run() == []
    assert capsys.readouterr().out.count("up to date") == 3


def test_force_executes_what_is_up_to_date(quick):
    quick.run()
    assert quick.run(force=True) == ["a", "b", "c"]


def test_changed_source_runs_the_notebook_and_what_needs_it(quick):
    quick.run()
    quick.write("a", "extra = 1")
    assert quick.run() == ["a", "b"]
    quick.write("c", "extra = 1")
    assert quick.run() == ["c"]


def test_changed_markdown_runs_nothing(quick):
    quick.run()
    notebook = nbformat.read(quick.folder / "a.ipynb", as_version=4)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, quick.folder / "a.ipynb")
    stamps.forget_sources()
    assert quick.run() == []


def test_changed_parameter_runs_what_it_belongs_to(quick):
    quick.run()
    assert quick.run("n_items=4", only="c") == ["c"]
    assert (quick.stage_folder("c") / "result.json").read_text() == "4"
    assert quick.run() == ["c"], "back to the profile's value"
    assert quick.run("n_items=4") == ["a", "b", "c"]


def test_several_notebooks_are_run_alone_in_the_order_of_the_pipeline(quick):
    assert quick.run(only="b,a") == ["a", "b"]
    assert quick.run(only="a, b") == [], "they are up to date"
    assert quick.run("n_items=4", only="a,b") == ["a", "b"]
    assert (quick.stage_folder("a") / "result.json").read_text() == "4"
    assert quick.run("n_items=4", only="c,b") == ["c"]


def test_a_notebook_run_alone_needs_the_inputs_that_are_not_run_with_it(quick):
    with pytest.raises(ValueError, match="b needs the results of a"):
        quick.run(only="b,c")
    with pytest.raises(ValueError, match="unknown notebook 'd'"):
        quick.run(only="a,d")


def test_what_notebooks_must_agree_on_is_set_where_their_inputs_run_with_them():
    named = "01_alignment,03_units,04_ablation"
    stages = run.plan("smoke", ["dtype=float32"], only=named)
    asked = {stage.name: stage.parameters.get("dtype") for stage in stages}
    assert {asked[name] for name in named.split(",")} == {"float32"}
    with pytest.raises(ValueError, match="or name 01_alignment") as raised:
        run.plan("smoke", ["dtype=float32"], only="03_units,04_ablation")
    one_line(raised.value)


def test_changed_upstream_parameter_runs_the_downstream_notebook(quick):
    quick.run()
    assert quick.run("n_items=4", only="a") == ["a"]
    assert quick.run() == ["a", "b"], "what follows from a stage is made again after it"
    stages = run.plan("laptop", ["n_items=4"], "a")
    assert [stamps.is_current(stage, stamps.stage_key(stage, stages)) for stage in stages] == [
        False,
        False,
        True,
    ]


def test_a_stage_run_on_other_inputs_is_not_taken_for_the_planned_one(quick):
    quick.run()
    quick.run("n_items=4", only="a")
    assert quick.run(only="b") == ["b"] and quick.run(only="b") == []
    assert quick.run() == ["a", "b"]


def test_the_list_shows_what_a_run_would_do(quick, capsys):
    quick.run()
    (quick.stage_folder("a") / "result.json").unlink()
    capsys.readouterr()
    assert cli.main(["list", "--profile", "laptop"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "needs" in line]
    states = [row.split("needs")[0].split(maxsplit=1)[1].strip() for row in rows]
    assert states == ["to run", "to run", "up to date"] and quick.run() == ["a", "b"]


def test_what_a_forced_stage_feeds_is_made_again_if_something_else_came_out(quick):
    quick.run()
    assert quick.run(only="a", force=True) == ["a"]
    assert quick.run() == [], "the same came out"
    quick.write("a", "(folder / 'result.json').write_text(str(__import__('time').time_ns()))")
    assert quick.run() == ["a", "b"]
    assert quick.run(only="a", force=True) == ["a"]
    assert quick.run() == ["b"] and quick.run() == []


@pytest.mark.parametrize("name", ["result.json", "a.ipynb"])
def test_a_stamp_stands_for_the_files_it_was_written_for(quick, name):
    """What another run, an editor or a copy put in place of a result is not up to date."""
    quick.run()
    path = quick.stage_folder("a") / name
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("3", "4"))
    os.utime(path, ns=times)
    assert quick.run() == ["a", "b"]


def test_a_torn_stamp_is_none(quick):
    quick.run()
    (quick.stage_folder("c") / "stamp.json").write_text('{"key": "')
    assert quick.run() == ["c"]


def test_a_run_folder_taken_elsewhere_stays_up_to_date(quick, tmp_path, monkeypatch):
    quick.run()
    shutil.copytree(quick.runs, tmp_path / "elsewhere")  # other times, same content
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path / "elsewhere"))
    assert quick.run() == []


@pytest.mark.parametrize("what", ["versions", "dtype_of"])
def test_other_libraries_or_another_precision_run_everything(quick, monkeypatch, what):
    quick.run()
    monkeypatch.setattr(stamps, what, lambda *stage: "another")
    assert quick.run() == ["a", "b", "c"]


def test_auto_means_another_precision_on_another_machine(monkeypatch):
    (stage,) = (s for s in run.plan("smoke", []) if s.name == "03_units")
    keys = set()
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setenv("SSAH_DTYPE", dtype)
        keys.add(stamps.dtype_of(stage))
    assert keys == {"torch.float32", "torch.bfloat16"}


def test_what_changes_while_a_notebook_runs_has_no_stamp(quick, monkeypatch):
    def edited_meanwhile(source, target, parameters, **options):
        quick.fake(source, target, parameters)
        quick.write("a", "extra = 1")

    monkeypatch.setattr(papermill, "execute_notebook", edited_meanwhile)
    with pytest.raises(RuntimeError, match="a was changed while it ran"):
        quick.run()
    assert not (quick.stage_folder("a") / "stamp.json").exists()
    monkeypatch.setattr(papermill, "execute_notebook", quick.fake)
    assert quick.run() == ["a", "b", "c"]


def test_expected_times_are_scaled_to_the_speed_of_the_machine(quick, monkeypatch, capsys):
    pipeline = yaml.safe_load((quick.folder / "pipeline.yaml").read_text())
    reference = {"gflops": 1000, "beside": 0.001}  # 2 s for 1000 GFLOP, half of them products
    (quick.folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline | {"machine": reference}))
    monkeypatch.setattr(run.machine, "gflops", lambda dtype, device: 200)  # 5 s, and 1 s
    monkeypatch.setenv("SSAH_DTYPE", "float32")
    assert quick.run(only="c") == ["c"]
    said = capsys.readouterr().out
    assert (
        "takes about 3.0 times as long" in said
        and "1 of 1 notebooks to execute, about 0:18" in said
    )
    quick.run(only="c", force=True)
    assert "times as long" not in capsys.readouterr().out, "it knows by now"


# -------------------------------------------------------------------------------- two in one folder

OTHER = """
import sys, time
from pathlib import Path
from ssah_utils.locks import Lock
lock = Lock(Path(sys.argv[1]), "the other run")
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def another_process(pipeline) -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Somebody else who holds a lock."""
    started = []

    def hold(path: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_in_the_folder_is_refused_in_one_line_that_says_who_is_there(
    quick, another_process, capsys
):
    other = another_process(runs.run_lock(quick.stage_folder("a").parent).path)
    assert cli.main(["run", "--profile", "laptop"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"process {other.pid}" in line
        and "the other run" in line
        and str(quick.stage_folder("a").parent) in line
    )
    assert not quick.stage_folder("a").exists()
    assert quick.run("seed=1") == ["a", "b", "c"], "another folder is free"
    assert cli.main(["list", "--profile", "laptop"]) == 0
    other.kill()
    other.wait()
    assert quick.run() == ["a", "b", "c"], "a lock dies with its process"


def test_a_notebook_open_in_another_kernel_is_not_overwritten(quick, another_process, monkeypatch):
    quick.run()
    monkeypatch.setattr(run, "PATIENCE", 0.1)
    another_process(runs.stage_lock(quick.stage_folder("b")).path)
    assert quick.run() == []
    with pytest.raises(InUse, match="seed-0 is in use by process"):
        quick.run(force=True)
    assert (quick.stage_folder("b") / "stamp.json").exists()


def test_a_notebook_by_hand_is_refused_where_a_run_is_at_work(quick, another_process):
    folder = quick.stage_folder("a")
    other = another_process(runs.run_lock(folder.parent).path)
    with pytest.raises(InUse, match=f"process {other.pid}"):
        runs.lock_stage(folder)
    other.kill()
    other.wait()
    for _ in range(2):  # a cell can be run again
        runs.lock_stage(folder)
    runs._held.pop(folder).release()


def test_changed_package_runs_everything(quick, monkeypatch):
    quick.run()
    monkeypatch.setattr(stamps, "package_source", functools.cache(lambda: {"scores.py": "changed"}))
    assert quick.run() == ["a", "b", "c"]


def test_a_file_of_one_stage_changes_that_stage_alone(monkeypatch):
    def keys() -> dict[str, str]:
        stages = run.plan("laptop", [])
        return {stage.name: stamps.stage_key(stage, stages) for stage in stages}

    source = stamps.package_source()
    assert {"data/claims.yaml", "ssah_utils/pipeline/claims.py"} <= source.keys()
    before = keys()
    monkeypatch.setattr(stamps, "package_source", lambda: source | {"data/claims.yaml": "changed"})
    assert [name for name, key in keys().items() if key != before[name]] == ["08_claims"]


def test_stored_results_of_other_seeds_change_the_stage_that_reads_them(monkeypatch, tmp_path):
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))

    def keys() -> dict[str, str]:
        stages = run.plan("smoke", [])
        return {stage.name: stamps.stage_key(stage, stages) for stage in stages}

    before = keys()
    own, other = (
        tmp_path / "smoke" / "tiny-random-llama" / f"seed-{k}" / "03_units" / "result.json"
        for k in (0, 1)
    )
    for path in (own, other):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert keys() == before, "it has not finished"
        path.with_name("stamp.json").write_text("{}")
        changed = [name for name, key in keys().items() if key != before[name]]
        assert changed == ([] if path == own else ["08_claims"])


def test_seeds_that_were_made_by_the_same_say_so_in_their_stamps(quick, monkeypatch):
    def hashes(seed: int) -> dict[str, str]:
        folders = {name: quick.stage_folder(name, seed) for name in quick.names}
        return {name: stored.stamp_of(one)["without_seed"] for name, one in folders.items()}

    quick.run()
    monkeypatch.setattr(stamps, "dtype_of", lambda stage: "what another machine computes in")
    quick.run("seed=1")
    first = hashes(0)
    assert hashes(1) == first, "whatever the seed and the precision of the machine"
    for name in quick.names:
        quick.run("seed=2", only=name)
    assert hashes(2) == first, "also one by one"
    quick.write("a", "extra = 1")
    quick.run("seed=1")
    assert {name for name, one in hashes(1).items() if one != first[name]} == {"a", "b"}
    quick.run("seed=2", only="a")
    quick.run("seed=2", only="b")
    assert hashes(2) == hashes(1)
    monkeypatch.setattr(stamps, "versions", lambda: "of other libraries")
    quick.run("seed=2", "n_items=4")
    changed = hashes(2)
    assert all(changed[name] != hashes(1)[name] for name in quick.names)


def test_another_seed_is_another_folder(quick):
    quick.run()
    assert quick.run("seed=1") == ["a", "b", "c"]
    assert (quick.stage_folder("b", seed=1) / "stamp.json").exists() and quick.run() == []


def test_lost_output_is_made_again(quick):
    quick.run()
    (quick.stage_folder("c") / "result.json").unlink()
    assert quick.run() == ["c"]


def test_changed_content_of_a_data_file_runs_the_notebooks_again(quick, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n')
    quick.run(f"harmful_data={file}")
    assert quick.run(f"harmful_data={file}") == []
    file.write_text('{"prompt": "b"}\n')
    assert quick.run(f"harmful_data={file}") == ["a", "b", "c"]


def test_relative_data_file_is_found_by_the_notebook(quick, tmp_path, monkeypatch):
    """Plan and notebook must mean the same file, although a notebook runs in the folder of the
    notebooks.
    """
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    quick.write("a", "import pathlib\nassert pathlib.Path(harmful_data).is_file(), harmful_data")

    def in_its_folder(source, target, parameters, **options):
        before, target = os.getcwd(), Path(target).absolute()
        os.chdir(options["cwd"])
        try:
            quick.fake(source, target, parameters)
        finally:
            os.chdir(before)

    monkeypatch.setattr(papermill, "execute_notebook", in_its_folder)
    quick.run("harmful_data=mine.jsonl")


def test_relative_runs_folder_means_the_same_to_runner_and_notebook(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_RUNS", "runs")
    assert run.plan("laptop", [])[0].folder.is_absolute()


def test_only_needs_its_inputs_and_says_so(quick, capsys):
    with pytest.raises(ValueError, match="b needs the results of a: run the whole profile first"):
        quick.run(only="b")
    assert cli.main(["run", "--profile", "laptop", "--only", "b"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    quick.run(only="a")
    assert quick.run(only="b") == ["b"]


def test_only_with_another_seed_needs_the_inputs_of_that_seed(quick):
    quick.run()
    with pytest.raises(ValueError, match="b needs the results of a"):
        quick.run("seed=1", only="b")


def test_interrupted_run_continues_with_what_is_missing(quick, monkeypatch):
    def interrupt(source, target, parameters, **options):
        if Path(source).stem == "b":
            Path(target).write_text("{half a notebook")
            raise KeyboardInterrupt
        quick.fake(source, target, parameters)

    monkeypatch.setattr(papermill, "execute_notebook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quick.run()
    assert [path.name for path in quick.stage_folder("b").iterdir()] == ["b.log"]
    assert not quick.stage_folder("c").exists()
    monkeypatch.setattr(papermill, "execute_notebook", quick.fake)
    assert quick.run() == ["b", "c"]
    assert quick.run() == []


def test_interrupt_ends_with_one_line_and_exit_code_130(quick, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupt)
    assert cli.main(["run", "--profile", "laptop"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted")


def test_what_a_killed_run_left_is_removed_by_the_next(quick):
    quick.run()
    (quick.stage_folder("b") / "stamp.json").unlink()
    workspace = quick.stage_folder("b") / ".b.failed.ipynb.x1y2"
    workspace.mkdir()
    (workspace / "b.failed.ipynb").write_text("{half a notebook")
    assert quick.run() == ["b"]
    assert not [path for path in quick.stage_folder("b").iterdir() if path.name.startswith(".")]


def test_killed_between_notebook_and_stamp_runs_again(quick):
    quick.run()
    (quick.stage_folder("b") / "stamp.json").unlink()
    assert quick.run() == ["b"]


def test_full_disk_is_found_before_a_kernel_starts(quick, monkeypatch, capsys):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0)
    )
    assert cli.main(["run", "--profile", "laptop"]) == 1
    assert "SSAH_RUNS" in capsys.readouterr().err and not quick.runs.exists()


def test_a_run_with_nothing_to_do_needs_no_space(quick, monkeypatch, capsys):
    quick.run()
    capsys.readouterr()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0)
    )
    assert cli.main(["run", "--profile", "laptop"]) == 0
    assert capsys.readouterr().out.count("up to date") == 3


# ------------------------------------------------------------------------------------- real kernels

WHO = """
import sys
from ssah_utils.pipeline import kernel
kernel.check_kernel()
who = f"{sys.executable}|{kernel.PACKAGE}|{sys.flags.isolated}"
(folder / "result.json").write_text(who)
"""


@pytest.mark.parametrize("own", [None, "77"])
def test_a_kernel_shares_cores_with_others_unless_told_otherwise(pipeline, monkeypatch, own):
    """Two trainings on the same two cores took thirty times as long as one."""
    name, number = kernel.SPINS
    monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(name, own)
    pipeline.write("a", f"import os\n(folder / 'result.json').write_text(os.environ['{name}'])")
    pipeline.run(only="a")
    assert (pipeline.stage_folder("a") / "result.json").read_text() == (own or number)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"\nexport {name} ?= {number}\n" in makefile  # for JupyterLab, tests and bench


def test_the_kernel_is_this_interpreter_whatever_kernels_are_installed(
    pipeline, tmp_path, monkeypatch
):
    for name in ("python3", "this-interpreter", "ssah"):
        folder = tmp_path / "jupyter" / "kernels" / name
        folder.mkdir(parents=True)
        argv = [sys.executable, "-I", "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        content = {
            "argv": argv,
            "display_name": name,
            "language": "python",
            "env": {"PYTHONPATH": "/somewhere/else"},
        }
        (folder / "kernel.json").write_text(json.dumps(content))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    pipeline.write("a", WHO)
    pipeline.run(only="a")
    found = (pipeline.stage_folder("a") / "result.json").read_text()
    assert found == f"{sys.executable}|{ROOT / 'ssah_utils'}|0"


def test_a_kernel_that_is_not_the_runners_says_so(monkeypatch, tmp_path):
    kernel.check_kernel()
    monkeypatch.setenv(kernel.EXPECTED, "/another/python:/another/ssah_utils")
    with pytest.raises(RuntimeError, match="but the runner is /another/python"):
        kernel.check_kernel()
    monkeypatch.delenv(kernel.EXPECTED)
    for name in ("notebooks", "ssah_utils"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(RuntimeError, match="the notebook belongs to"):
        kernel.check_kernel()


@pytest.mark.parametrize(
    "name",
    ["brace {x}", "brace {seed}", "lone { brace", "%s 100%", "with space, ü and 日本", "a#b?c"],
)
def test_any_folder_name_will_do(pipeline, monkeypatch, tmp_path, name):
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path / name))
    run.run(run.plan("laptop", [], "a"), "a")
    folder = tmp_path / name / "laptop" / "tiny-random-llama" / "seed-0" / "a"
    assert {path.name for path in folder.iterdir()} == {
        "a.ipynb",
        "a.log",
        "result.json",
        "stamp.json",
    }


def test_real_kernels_run_a_pipeline_with_injected_parameters(pipeline, capsys):
    run.run(run.plan("laptop", ["n_items=7"], "a"), "a")
    folder = pipeline.stage_folder("a")
    assert (folder / "result.json").read_text() == "7"
    executed = nbformat.read(folder / "a.ipynb", as_version=4)
    assert any("n_items = 7" in cell.source for cell in executed.cells)
    assert json.loads((folder / "stamp.json").read_text())["seconds"] > 0


def failure(pipeline: Pipeline, capsys, *cells: str) -> str:
    """The one line that a failing notebook ``a`` leaves, after checking that nothing finished is
    left.
    """
    pipeline.write("a", *cells)
    assert cli.main(["run", "--profile", "laptop", "--only", "a"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    folder = pipeline.stage_folder("a")
    assert not (folder / "a.ipynb").exists() and not (folder / "stamp.json").exists()
    return lines[0]


def test_failing_cell_is_one_line_with_notebook_cell_last_line_and_path(pipeline, capsys):
    text = failure(
        pipeline, capsys, "print('fine')", 'raise ValueError("first line\\nthe last line")'
    )
    assert (
        "a failed in cell" in text
        and "ValueError: the last line" in text
        and "first line" not in text
    )
    path = pipeline.stage_folder("a") / "a.failed.ipynb"
    assert str(path) in text
    failed = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    (number,) = [
        n
        for n, cell in enumerate(failed)
        if any(out.output_type == "error" for out in cell.outputs)
    ]
    assert f"a failed in cell {failed[number].execution_count}:" in text


def test_failing_notebook_leaves_nothing_of_an_earlier_finished_run(quick, capsys):
    quick.run(only="a")
    quick.write("a", "raise RuntimeError('now it fails')")
    with pytest.raises(RuntimeError, match="now it fails"):
        quick.run(only="a")
    left = {path.name for path in quick.stage_folder("a").iterdir()}
    assert not left & {"a.ipynb", "stamp.json"}, left


def test_failing_cell_without_a_message_is_one_line_too(pipeline, capsys):
    text = failure(pipeline, capsys, "assert n_items > 100")
    assert "a failed in cell" in text and "AssertionError" in text


def test_notebook_that_exits_before_writing_its_outputs_has_failed(pipeline, capsys):
    pipeline.write("a")
    notebook = nbformat.read(pipeline.folder / "a.ipynb", as_version=4)
    notebook.cells.insert(2, new_code_cell("import sys\nsys.exit(0)"))
    nbformat.write(notebook, pipeline.folder / "a.ipynb")
    assert cli.main(["run", "--profile", "laptop", "--only", "a"]) == 1
    lines = capsys.readouterr().err.splitlines()
    folder = pipeline.stage_folder("a")
    assert len(lines) == 1 and "a " in lines[0] and str(folder / "a.failed.ipynb") in lines[0]
    assert not (folder / "stamp.json").exists() and not (folder / "a.ipynb").exists()


def test_notebook_that_exits_in_the_middle_has_failed_also_when_its_outputs_are_there(
    pipeline, capsys
):
    text = failure(pipeline, capsys, "import sys\nsys.exit(0)", "print('never reached')")
    assert "a.failed.ipynb" in text


def test_notebook_that_writes_no_outputs_has_failed(quick, capsys):
    notebook = nbformat.read(quick.folder / "a.ipynb", as_version=4)
    notebook.cells[2].source = "pass"
    nbformat.write(notebook, quick.folder / "a.ipynb")
    stamps.forget_sources()
    assert cli.main(["run", "--profile", "laptop"]) == 1
    text = capsys.readouterr().err
    assert "a ended without writing result.json" in text and "a.failed.ipynb" in text
    assert (
        not (quick.stage_folder("a") / "stamp.json").exists()
        and not quick.stage_folder("b").exists()
    )


def test_dying_kernel_is_one_line_that_names_the_notebook(pipeline, capsys):
    text = failure(pipeline, capsys, "import os\nos._exit(1)")
    assert text.startswith("error: a ")
