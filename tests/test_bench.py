"""The benchmark scripts run; their figures are not judged here."""

import json
import math
import subprocess
import sys

from ssah_utils import embedded, loading
from ssah_utils.files import ROOT
from tests import bench, bench_gpu


def test_gpu_script_on_a_tiny_shape():
    figures = bench_gpu.measure("cpu", (bench_gpu.TINY,))
    assert figures["scoring_over_forward"] > 0
    assert figures["ru_step_over_full"] > 0
    assert figures["device"] == "cpu"


def test_optimizer_state_is_counted(monkeypatch):
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    examples = bench.training_examples(tokenizer, 16)
    full, redundant = (
        bench.trained(name, model, tokenizer, examples, 2) for name in ("full", "redundant")
    )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert full.state_entries >= 2 * n_parameters
    assert redundant.state_entries < 0.5 * full.state_entries
    assert len(full.moments) == 2
    assert math.isfinite(bench.train_flops_per_step(examples, model))


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


def test_one_part_is_measured_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench.json").write_text(
        json.dumps({"generation_speedup": 7.5, "ru_peak_memory_over_full": 1.0})
    )
    monkeypatch.setattr(bench, "REFERENCE", tmp_path)
    monkeypatch.setitem(bench.PARTS, "memory", lambda: {"ru_peak_memory_over_full": 0.51234})
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "memory"])
    bench.main()
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["generation_speedup"] == 7.5
    assert stored["ru_peak_memory_over_full"] == 0.512
    assert "0.512   goal at most 0.65: met" in capsys.readouterr().out
