"""The benchmark scripts run; their figures are not judged here."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from ssah_utils import embedded, loading, models, unit_training
from ssah_utils.files import ROOT
from tests import bench, bench_gpu, bench_times, bench_training
from tests.conftest import parameters_of


def test_gpu_script_on_a_tiny_shape():
    figures = bench_gpu.measure("cpu", (bench_gpu.TINY,))
    assert figures["scoring_over_forward"] > 0
    assert figures["ru_step_over_full"] > 0
    assert figures["device"] == "cpu"


def test_optimizer_state_is_counted(monkeypatch):
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    examples = bench_training.training_examples(tokenizer, 16)
    full, redundant = (
        bench_training.trained(name, model, tokenizer, examples, 2)
        for name in ("full", "redundant")
    )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert full.state_entries >= 2 * n_parameters
    assert redundant.state_entries < 0.5 * full.state_entries
    assert len(full.moments) == 2
    assert math.isfinite(bench_training.flops_per_step(examples, model))


def test_memory_of_a_process_is_its_own():
    """It grows with what the process holds, and does not begin with the peak of the process that
    started it.
    """
    held = bytearray(b"x") * 2**31
    code = (
        "from ssah_utils.pipeline.runs import peak_memory_gib as peak; "
        "a = peak(); x = bytearray(b'x') * 2**28; print(a, peak())"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after = map(float, outcome.stdout.split())
    assert after >= before + 0.2
    assert sys.platform != "linux" or before < len(held) / 2**30


def moved(condition: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By parameter of the tiny model, which entries a few steps of a condition have changed."""
    model, tokenizer = loading.load(embedded.TINY_RANDOM, dtype)
    before = parameters_of(model)
    examples = bench_training.training_examples(tokenizer, 16)
    bench_training.trained(condition, model, tokenizer, examples, 4, learning_rate=0.1)
    return {name: one.detach() != before[name] for name, one in model.named_parameters()}


def test_masked_training_moves_what_training_by_units_moves():
    ours, masked = (moved(name, torch.float32) for name in ("redundant", "masked"))
    assert any(one.any() for one in ours.values())
    assert all(torch.equal(ours[name], masked[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contiguous_training_moves_as_much_in_the_first_lines_of_each_matrix(dtype):
    ours, contiguous = (moved(name, dtype) for name in ("redundant", "contiguous"))
    matrices = {name: one for name, one in contiguous.items() if one.ndim == 2}
    for name, one in matrices.items():
        across = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else -1
        n_lines = int(ours[name].any(across).sum())
        lines = one.any(across)
        assert lines.sum() == n_lines and lines[:n_lines].all()
    assert not any(one.any() for name, one in contiguous.items() if name not in matrices)


def test_the_gradient_of_a_slice_is_that_of_the_whole_matrix():
    torch.manual_seed(0)
    linear, values = torch.nn.Linear(6, 5, bias=False), torch.randn(2, 3, 6, requires_grad=True)
    (linear(values) ** 2).sum().backward()
    of_values, of_weight = values.grad.clone(), linear.weight.grad
    for dimension in (0, 1):
        values.grad = None
        part = bench_training.SliceLinear(linear, dimension, 2)
        (part(values) ** 2).sum().backward()
        torch.testing.assert_close(values.grad, of_values)
        torch.testing.assert_close(part.block.grad, of_weight.narrow(dimension, 0, 2))


@pytest.mark.parametrize("condition", bench_training.CONDITIONS)
def test_every_condition_takes_its_steps(condition):
    subject, tokenizer = (
        bench_training.subject_of(condition, embedded.TINY_RANDOM),
        loading.load_tokenizer(embedded.TINY_RANDOM),
    )
    examples = bench_training.training_examples(tokenizer, 16)
    watch = bench_training.trained(condition, subject, tokenizer, examples, 2)
    assert len(watch.moments) == 2 and watch.state_entries


def test_lora_has_about_as_many_entries():
    model, _ = loading.load(embedded.TINY_RANDOM)
    some = bench_training.random_share(models.shape_of(model), 0.2)
    with unit_training.training_only(model, some):
        ours = sum(one.numel() for one in model.parameters() if one.requires_grad)
    adapted = bench_training.subject_of("lora", embedded.TINY_RANDOM)
    theirs = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    assert theirs == pytest.approx(ours, rel=0.3)


def test_a_run_is_not_timed_where_it_would_execute_notebooks(tmp_path, monkeypatch, capsys):
    """Else what is taken for a no-op would run for an hour."""
    timed = []
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    monkeypatch.setattr(
        bench_times, "seconds", lambda *command, **where: timed.append(command) or 1.0
    )
    found = bench_times.measured("smoke", with_tests=False)
    assert not {"smoke_minutes", "smoke_notebooks", "noop_seconds"} & found.keys()
    assert {"help_seconds", "figures_seconds", "quickstart_seconds"} <= found.keys()
    assert not any(command[-2:] == ("--profile", "smoke") for command in timed)
    assert "make reproduce PROFILE=smoke" in capsys.readouterr().out


def test_a_run_lasts_from_its_first_start_to_its_last_end(tmp_path):
    """Two notebooks may have run at a time: their minutes do not add up to those that passed."""
    spans = [("01_x", 300, 1300), ("02_y", 240, 1600), ("03_z", 240, 1540), ("A9_late", 60, 9000)]
    for name, seconds, end in spans:
        stamp = tmp_path / name / "stamp.json"
        stamp.parent.mkdir()
        stamp.write_text(json.dumps({"seconds": seconds}))
        os.utime(stamp, (end, end))
    asked = ["01_x", "02_y", "03_z"]
    assert bench_times.wall_minutes(tmp_path, asked) == pytest.approx(10)
    assert bench_times.wall_minutes(tmp_path, [*asked, "A9_late"]) is None, "on another day"
    assert bench_times.notebook_minutes(tmp_path)["02_y"] == 4


def test_rivals_are_conditions():
    assert set(bench.RIVALS) < set(bench_training.CONDITIONS)
    named = {name.rsplit("_over_", 1)[1] for name in bench.GOALS if name.startswith("ru_")}
    assert named <= {*bench.RIVALS, "plain"}


def test_one_part_is_measured_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench.json").write_text(
        json.dumps(
            {
                bench.kind_of_machine(): {
                    "generation_speedup": 7.5,
                    "ru_peak_memory_over_full": 1.0,
                },
                "another": {"generation_speedup": 3.0},
            }
        )
    )
    monkeypatch.setattr(bench, "REFERENCE", tmp_path)
    monkeypatch.setitem(bench.PARTS, "memory", lambda: {"ru_peak_memory_over_full": 0.51234})
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "memory"])
    bench.main()
    columns = json.loads((tmp_path / "bench.json").read_text())
    assert columns["another"] == {"generation_speedup": 3.0}
    stored = columns[bench.kind_of_machine()]
    assert stored["generation_speedup"] == 7.5
    assert stored["ru_peak_memory_over_full"] == 0.512
    assert "0.512   goal at most 0.65: met" in capsys.readouterr().out
