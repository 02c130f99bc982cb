"""The take-away of 06_freezing: an exported set of units in a plain Hugging Face script."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from ssah_utils import models, per_unit, unit_files
from ssah_utils.files import ROOT
from ssah_utils.per_unit import PerUnit
from ssah_utils.unit_files import ModelInfo
from tests import plain_trainer
from tests.conftest import parameters_of, same_parameters, tiny_model, writers_by_name


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
            zip(writers_by_name(llama, kind), writers_by_name(tuned, kind), strict=True)
        ):
            kept = frozen[kind][layer]
            assert torch.equal(old.weight[:, kept], new.weight[:, kept])
            assert not (old.weight[:, ~kept] == new.weight[:, ~kept]).any()


# The launcher starts several processes for GPUs alone; the script itself asks for the CPU.
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SHOWN = re.search(r"^accelerate launch (--.*?) my_script\.py", GUIDE, re.M | re.S)[1]
LAUNCHED = {
    "whole": ("tests.plain_trainer", ["--multi_gpu", "--num_processes", "2"]),
    "in shards": (
        "tests.sharded_trainer",
        SHOWN.replace("--num_processes 8", "--num_processes 2").replace("\\\n", " ").split(),
    ),
}


@pytest.mark.parametrize(("script", "how"), LAUNCHED.values(), ids=LAUNCHED)
def test_two_processes_train_what_one_does(saved_llama, llama, data, tmp_path, script, how):
    """By ``accelerate launch``, in shards as the guide says: each on half of every batch."""
    unit_files.save_set(tmp_path / "units.safetensors", chosen_of(llama), llama, "a set", seed=0)
    given = [str(saved_llama), str(tmp_path / "units.safetensors"), str(data)]
    plain_trainer.main(*given, str(tmp_path / "one"), 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    how = [*how, "--num_machines", "1", "--main_process_port", port]
    called = ["-m", script, *given, str(tmp_path / "two"), "2"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *how, *called]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, a), b, start in zip(
        one.named_parameters(), two.parameters(), llama.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=lambda text, name=name: name + text)
        assert torch.equal(a == start, b == start)  # the same entries are frozen, and no others
    assert not same_parameters(two, parameters_of(llama))


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


def test_the_lines_that_06_shows_run_as_they_stand(saved_llama, llama, tmp_path, monkeypatch):
    book = json.loads((ROOT / "notebooks" / "06_freezing.ipynb").read_text(encoding="utf-8"))
    texts = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown"]
    (shown,) = [text for text in texts if "```python" in text]
    lines = shown.partition("```python\n")[2].partition("```")[0]
    frozen = chosen_of(llama)
    monkeypatch.chdir(tmp_path)
    unit_files.save_set("frozen_units.safetensors", frozen, llama, "random")
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    options = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 1}
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(tmp_path / "out"), **options, **quiet)
    data = [{"input_ids": [3, 4, 5 + row], "labels": [3, 4, 5 + row]} for row in range(6)]
    exec(lines, {"model": model, "args": args, "data": data})
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "fine-tuned")
    for old, new in zip(writers_by_name(llama, "mlp"), writers_by_name(tuned, "mlp"), strict=True):
        kept = (old.weight == new.weight).all(0)
        assert kept.any() and not kept.all()
    old, new = (writers_by_name(model, "mlp")[0].weight for model in (llama, tuned))
    assert torch.equal((old == new).all(0), frozen["mlp"][0])
