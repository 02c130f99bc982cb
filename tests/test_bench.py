"""The benchmark scripts run; their figures are not judged here."""

import math

from ssah_utils import models
from tests import bench, bench_gpu


def test_gpu_script_on_a_tiny_shape():
    figures = bench_gpu.measure("cpu", (bench_gpu.TINY,))
    assert figures["scoring_over_forward"] > 0
    assert figures["ru_step_over_full"] > 0
    assert figures["device"] == "cpu"


def test_optimizer_state_is_counted(monkeypatch):
    model, tokenizer = models.load(models.TINY_RANDOM)
    examples = bench.training_examples(tokenizer, 16)
    full, redundant = (bench.trained(name, model, tokenizer, examples, 2) for name in ("full", "redundant"))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert full.state_entries >= 2 * n_parameters
    assert redundant.state_entries < 0.5 * full.state_entries
    assert len(full.moments) == 2
    assert math.isfinite(bench.train_flops_per_step(examples, model))
