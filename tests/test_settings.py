"""No default of a library decides anything: every field of its configurations is set by us, or
listed with a reason.
"""

import dataclasses
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import DPOConfig

from ssah_utils import adapters, precision, settings
from ssah_utils.settings import SFTConfig, common_arguments, training_arguments, without_dropout
from tests.conftest import tiny_model


def fields_of(configuration: type) -> set[str]:
    return {field.name for field in dataclasses.fields(configuration) if field.init}


def named(table: dict[str, tuple[str, ...]]) -> set[str]:
    names = [name for group in table.values() for name in group]
    assert len(names) == len(set(names))
    return set(names)


def of_trainer(extra: dict) -> set[str]:
    return common_arguments("folder", SFTConfig(), tiny_model("gpt2")).keys() | extra.keys()


PEFT = {
    "lora": peft.LoraConfig,
    "llama-adapter": peft.AdaptionPromptConfig,
    "prefix": peft.PrefixTuningConfig,
}
# set by ``with_adapter`` from the model
OF_MODEL = {"task_type", "fan_in_fan_out", "target_modules", "adapter_layers"}
OF_MODEL |= {"num_layers", "num_attention_heads", "token_dim"}
TABLES = {
    "supervised": (
        transformers.TrainingArguments,
        lambda: of_trainer(settings.SUPERVISED),
        settings.LEFT_TO_LIBRARIES,
    ),
    "preference": (
        DPOConfig,
        lambda: (
            of_trainer(settings.PREFERENCE) | {"beta", "loss_weights", "precompute_ref_batch_size"}
        ),
        settings.LEFT_TO_LIBRARIES,
    ),
    "accelerator": (AcceleratorConfig, lambda: settings.COMMON["accelerator_config"].keys(), {}),
    **{
        name: (
            kind,
            lambda name=name, kind=kind: (
                (adapters.PEFT_COMMON.keys() | adapters.PEFT_SETTINGS[name].keys() | OF_MODEL)
                & fields_of(kind)
            ),
            adapters.LEFT_TO_PEFT,
        )
        for name, kind in PEFT.items()
    },
}


@pytest.mark.parametrize("table", TABLES)
def test_every_field_is_set_or_left_for_a_reason(table):
    configuration, ours, left = TABLES[table]
    fields, ours = fields_of(configuration), ours()
    assert fields - ours - named(left) == set(), (
        "new fields: set them, or say why they do not matter"
    )
    assert ours - fields == set(), "no such fields any more"
    assert not ours & named(left)


@pytest.mark.parametrize(
    ("left", "configurations"),
    [(settings.LEFT_TO_LIBRARIES, [DPOConfig]), (adapters.LEFT_TO_PEFT, PEFT.values())],
)
def test_what_is_left_is_there(left, configurations):
    assert named(left) <= set().union(*map(fields_of, configurations))


def test_every_table_is_used_whole():
    assert {"inference_mode", "revision"} == adapters.PEFT_COMMON.keys()
    for name, kind in PEFT.items():
        assert adapters.PEFT_SETTINGS[name].keys() <= fields_of(kind)


def test_environment_variables_of_accelerate_have_no_say(tmp_path, tokenizer):
    """In a process of its own: they are read once."""
    code = """
import json, os, sys
import torch
from ssah_utils import precision, training
from tests.conftest import tiny_model
from tests.test_training import PAIRS, examples_of
precision.preferred_dtype = lambda device: torch.float32
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = training.SFTConfig(1e-2, max_steps=3, batch_size=4, warmup_steps=0)
found = [training.train_sft(tiny_model("llama"), tokenizer, examples_of(12), config),
         training.train_dpo(tiny_model("llama"), tokenizer, PAIRS, config)]
print(json.dumps([found, os.environ.get("ACCELERATE_MIXED_PRECISION")]))
"""

    tokenizer.save_pretrained(tmp_path)
    found = []
    hostile = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "eager",
        "ACCELERATE_USE_FSDP": "true",
    }
    for more in ({}, hostile):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")
        } | more
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found.append(json.loads(run.stdout.splitlines()[-1]))
    assert found[1][1] == "bf16"  # it is still there for others
    assert found[0][0] == found[1][0]


# ------------------------------------------------------------------------------------------ dropout


def rates(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


class Functional(nn.Module):
    """OPT and Llama hand rates to functions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout, self.layerdrop, self.dropout_name = 0.5, 0.25, "none"


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_nothing_is_dropped_inside_and_all_is_as_before_after(token_ids, error):
    model = tiny_model("gpt2").train()
    model.more = Functional()
    before = rates(model)
    assert set(before) == {0.1}
    expected = model.eval()(token_ids).logits
    model.train()
    assert not torch.allclose(model(token_ids).logits, expected)
    try:
        with without_dropout(model):
            torch.testing.assert_close(model(token_ids).logits, expected)
            assert set(rates(model)) == {0.0}
            assert (model.more.attention_dropout, model.more.layerdrop) == (0.0, 0.0)
            if error:
                raise error
    except ZeroDivisionError:
        pass
    assert rates(model) == before
    assert (model.more.attention_dropout, model.more.layerdrop, model.more.dropout_name) == (
        0.5,
        0.25,
        "none",
    )


def test_autocast_follows_the_preferred_precision(llama, tmp_path, monkeypatch):
    for preferred in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(
            precision, "preferred_dtype", lambda device, preferred=preferred: preferred
        )
        assert training_arguments(str(tmp_path), SFTConfig(), llama).bf16 == (
            preferred == torch.bfloat16
        )
    assert not training_arguments(str(tmp_path), SFTConfig(), llama.bfloat16()).bf16


def test_no_two_repetitions_of_any_runs_are_trained_with_the_same_seed():
    seeds = [settings.training_seed(run, k) for run in range(4) for k in range(5)]
    assert len(set(seeds)) == len(seeds) and seeds[:5] == [0, 1, 2, 3, 4]
    assert settings.training_seed(1, 0) > settings.training_seed(0, 999)
    with pytest.raises(ValueError, match="one below 1000 is needed"):
        settings.training_seed(0, 1000)
