"""The take-away of 06_freezing: an exported set of units in a plain Hugging Face script."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssah_utils import models, per_unit, unit_files
from ssah_utils.per_unit import PerUnit
from ssah_utils.unit_files import ModelInfo
from tests import plain_trainer
from tests.conftest import tiny_model


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"w{3 + i} w{4 + i}", "response": f"w{5 + i} w{6 + i}"} for i in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def chosen_of(model) -> PerUnit:
    shape = models.shape_of(model)
    generator = torch.Generator().manual_seed(0)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in per_unit.KINDS}
    return (
        PerUnit({kind: torch.rand(size, generator=generator) for kind, size in sizes.items()}) < 0.3
    )


def test_frozen_units_survive_a_plain_script(saved_llama, llama, data, tmp_path):
    frozen = chosen_of(llama)
    unit_files.save_set(tmp_path / "units.safetensors", frozen, llama, "a random set", seed=0)
    plain_trainer.main(
        str(saved_llama), str(tmp_path / "units.safetensors"), str(data), str(tmp_path / "out")
    )
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for kind in per_unit.KINDS:
        for layer, (old, new) in enumerate(
            zip(models.writers(llama, kind), models.writers(tuned, kind), strict=True)
        ):
            kept = frozen[kind][layer]
            assert torch.equal(old.weight[:, kept], new.weight[:, kept])
            assert not (old.weight[:, ~kept] == new.weight[:, ~kept]).any()


def test_units_of_another_model_are_refused(saved_llama, llama, data, tmp_path):
    other = dataclasses.replace(ModelInfo.of(llama), fingerprint="0123456789abcdef")
    unit_files.save_set(
        tmp_path / "units.safetensors", chosen_of(llama), other, "of another model", seed=0
    )
    with pytest.raises(ValueError, match="belongs to model 0123456789abcdef"):
        plain_trainer.main(
            str(saved_llama), str(tmp_path / "units.safetensors"), str(data), str(tmp_path / "out")
        )
    assert not (tmp_path / "out" / "config.json").exists()


def test_units_of_another_shape_are_refused(tmp_path):
    from ssah_utils import unit_training

    other = chosen_of(tiny_model("gpt2"))
    with (
        pytest.raises(ValueError, match="the unit set has"),
        unit_training.freezing(tiny_model("llama"), other),
    ):
        pass
