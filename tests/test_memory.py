"""What memory says from shapes alone, held against what a process of its own really takes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from ssah_utils import loading, models, unit_training
from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.pipeline import cli, memory, run
from ssah_utils.pipeline.memory_plan import (
    GIB,
    LOOKING,
    TITLES,
    TRAINING,
    Machine,
    Need,
    Planned,
    advice,
    largest_process,
    taken_before,
)
from tests import families, mixtures
from tests.measured_memory import MIDDLE

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back to the system at once
WORKS = {
    "openings": (16, 60, 64),
    "answers": (32, 60, 16),
    "moments": (16, 96, 256),
    "gradients": (8, 96, 256),
    "choices": (16, 24, 0),
    "steps": (8, 96, 256),
    "fifth": (8, 96, 256),
}


@pytest.fixture(scope="module")
def taken() -> dict[str, dict]:
    """What each kind of work took, one after the other in a process that is not ours."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux alone tells a peak")
    works = [f"{kind}:{','.join(map(str, sizes))}" for kind, sizes in WORKS.items()]
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.measured_memory", *works],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | GIVES_BACK,
    )
    found = map(json.loads, outcome.stdout.splitlines())
    return {one["kind"]: one for one in found}


@pytest.mark.parametrize("kind", WORKS)
def test_what_is_planned_is_what_a_process_takes(taken, kind):
    """Of weights and work together, within 15%, but for what glibc keeps of freed memory."""
    assert taken[kind]["planned"] == pytest.approx(taken[kind]["measured"], rel=0.15)


def test_logits_are_counted_to_the_byte():
    config = LlamaConfig(**MIDDLE)
    peak = memory.Shapes(config, torch.float32).peak(memory.choosing(4, 10))
    both = 2 * 4 * 10 * MIDDLE["vocab_size"] * 4  # logits, and their logarithms of probabilities
    assert both <= peak < 1.05 * both


def test_few_blocks_tell_of_many():
    config = LlamaConfig(**MIDDLE)
    shapes, work = memory.Shapes(config, torch.float32), memory.training(2, 16, 8, True)
    whole = shapes._peak(MIDDLE["num_hidden_layers"], work, False)
    assert shapes.peak(work) == pytest.approx(whole, rel=0.01)


CONFIGS = families.CONFIGS | mixtures.CONFIGS
FAMILIES = ["llama", "gpt2", "gemma3_text", "falcon", "mixtral", "gpt_oss", "qwen2_moe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_work_is_told_of_other_families(name):
    shapes = memory.Shapes(CONFIGS[name](), torch.float32)
    for work in (
        memory.reading_prompts(2, 8, 3),
        memory.reading_openings(2, 8, 5),
        memory.scoring_responses(2, 8, 4),
        memory.choosing(2, 8),
        memory.taking_moments(2, 8, 6),
        memory.taking_gradients(2, 8, 6),
        memory.training(2, 8, 6, False),
    ):
        assert shapes.peak(work) > 0


# ------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("train_rest", [False, True])
def test_trained_numbers_are_those_that_an_optimizer_gets(name, train_rest):
    config = CONFIGS[name]()
    model = loading.auto_class(config).from_config(config)
    fraction = 0.5
    told = memory.Trained.units_of(config, fraction, train_rest, torch.float32)
    every = told.n_trained + told.n_frozen
    assert every == sum(parameter.numel() for parameter in model.parameters())
    chosen = models.per_unit_of(
        (one, torch.arange(one.channels.stop - one.channels.start) % 2 == 0)
        for one in models.writers(model)
    )
    with unit_training.training_only(model, chosen, train_rest):
        n_trained = unit_training.count_trainable(model)
    assert told.n_trained == pytest.approx(n_trained, rel=0.2)


def test_a_trained_number_takes_sixteen_bytes_and_a_frozen_one_its_own():
    config = LlamaConfig(**MIDDLE)
    n, owned = memory.n_numbers(config), memory.n_owned(config)
    whole = memory.Trained.units_of(config, 1.0, True, torch.float32)
    assert whole.weights + whole.gradients + whole.moments == 16 * n
    fifth = memory.Trained.units_of(config, 0.2, False, torch.bfloat16)
    assert fifth.n_trained == round(0.2 * owned)
    assert fifth.weights == 4 * fifth.n_trained + 2 * (n - fifth.n_trained)
    assert fifth.gradients + fifth.moments == 12 * fifth.n_trained
    assert fifth.peak(10**9) == fifth.weights + fifth.moments + 10**9
    assert fifth.peak(0) == fifth.weights + fifth.moments + fifth.gradients
    narrow = memory.Trained.units_of(config, 1.0, True, torch.bfloat16)
    assert narrow == dataclasses.replace(whole, dtype=torch.bfloat16), "blocks are float32"


# --------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("asked", ["24", "0x24", "1x", "axb", "1x0", "1x-3"])
def test_machines_that_are_none_are_refused(asked):
    with pytest.raises(ValueError, match="--gpus takes NUMBERxGIB, such as 1x24"):
        Machine.named(asked, None)


@pytest.mark.parametrize("asked", [0, -1, float("nan")])
def test_memory_that_is_none_is_refused(asked):
    with pytest.raises(ValueError, match="--cpu takes GiB of memory"):
        Machine.named("", asked)


@pytest.mark.parametrize(
    ("gpus", "weights", "kind", "said"),
    [
        ("1x24", 14, "answers", "fits on one GPU"),
        ("4x80", 140, "answers", "device_map=auto: over 4 GPUs"),
        ("1x24", 60, "answers", "device_map=auto: the rest in memory"),
        ("1x24", 160, "answers", "device_map=auto: the rest on disk"),
        ("1x24", 60, "all", "does not fit: one GPU of 61 GiB"),
        ("4x80", 140, "redundant", "shards it over 4 by FSDP2"),
        ("", 14, "answers", "fits"),
        ("", 140, "answers", "device_map=auto: the rest on disk"),
        ("", 140, "freezing", "leave it out by --only"),
    ],
)
def test_what_to_change_where_work_does_not_fit(gpus, weights, kind, said):
    size = weights * GIB
    need = Need(kind, "", "", (), size, 0, GIB, size + GIB)
    assert said in advice(need, Machine.named(gpus, 64))


def test_notebooks_say_what_they_do_in_names_that_are_planned():
    stages = run.plan("laptop", [], checked=False)
    assert all(set(stage.work) <= {*LOOKING, *TRAINING} for stage in stages)
    assert {one for stage in stages for one in stage.work} == {*LOOKING, *TRAINING}
    silent = [stage.name for stage in stages if not stage.work]
    assert silent == ["08_claims"], "every other notebook loads a model"
    trains = {stage.name for stage in stages if set(stage.work) & {*TRAINING}}
    rated = {stage.name for stage in stages if "learning_rate" in stage.parameters}
    assert trains == rated | {"A5_recipes"}


def test_a_plan_has_a_line_for_every_kind_of_work(capsys):
    assert cli.main(["plan", "--gpus", "1x24", "--set", "dtype=bfloat16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("smollm2-135m-instruct: 0.13 billion parameters, bfloat16; 1 GPU of 24")
    for title in TITLES.values():
        assert title.partition("{")[0] in said
    assert "training 20% of the units" in said and "fits on one GPU" in said


def test_the_largest_notebook_takes_more_than_any_kind_of_work_alone(tmp_path, monkeypatch):
    """What `make reproduce` took of memory at most, measured: 5.9 GiB, in 06."""
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    stages, here = run.selected_of(run.plan("brief", []), ""), Machine.named("", 64)
    largest = largest_process(stages, here)
    assert max(need.peak for need in Planned(stages, here).needs()) < largest - GIB
    assert 5.9 * GIB < largest < 8 * GIB
    with pytest.raises(ValueError, match="none of the notebooks"):
        largest_process([stage for stage in stages if not stage.work], here)
    of_laptop = largest_process(run.selected_of(run.plan("laptop", []), ""), here)
    stored = [json.loads(path.read_text()) for path in REFERENCE.glob("0*/result.json")]
    assert of_laptop >= max(int(GIB * one.get("peak_memory_gib", 0)) for one in stored)


def test_what_a_notebook_took_when_it_ran_last_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    (stage,) = (one for one in run.plan("brief", []) if one.name == "06_freezing")
    assert taken_before(stage) == 0, "what comes with the project is of another profile"
    stage.folder.mkdir(parents=True)
    result = {"parameters": stage.parameters, "peak_memory_gib": 12.5}
    (stage.folder / "result.json").write_text(json.dumps(result))
    assert taken_before(stage) == 12.5 * GIB == largest_process([stage], Machine.named("", 64))
    (stage.folder / "result.json").write_text("{")
    assert taken_before(stage) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "24"], "--gpus takes NUMBERxGIB"),
        (["--cpu", "-1"], "--cpu takes GiB"),
        (["--profile", "lapotp"], "'laptop'"),
        (["--set", "model=no-such-model"], "unknown model 'no-such-model'"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line(words, told, capsys):
    assert cli.main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
