"""Two processes: data parallelism gives what one process gives; sharding is refused in one line,
and no model is lost.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ssah_utils import precision, training
from ssah_utils.files import ROOT
from tests.conftest import tiny_model
from tests.test_training import examples_of

# float32 sums in another order: a few units of rounding, 2^-24 of values of size one, after four
# steps with momentum
ROUNDING = 1e-5


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """By both ranks. Started once: most of the time goes into imports."""
    file: Path = tmp_path_factory.mktemp("ranks") / "store"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(rank), str(file)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = []
    for rank in ranks:
        out, err = rank.communicate(timeout=600)
        assert rank.returncode == 0, err[-3000:]
        said.append(json.loads(out.splitlines()[-1]))
    return said


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_two_ranks_train_what_one_does(found, name, rest, when):
    for of_rank in found:
        one = of_rank[f"{name}, {rest}, {when}"]
        assert one["given"]
        assert one["moved"] > 100 * ROUNDING
        assert one["distance"] < ROUNDING
        assert one["spread"] == 0
        assert one["frozen"]
        if when == "before":
            assert one["after"] < 2 * ROUNDING  # the same wrapper goes on to train the whole model


def test_the_wrapper_keeps_its_settings_and_hooks(found):
    for of_rank in found:
        assert of_rank["settings"]["distance"] < ROUNDING
        assert of_rank["settings"]["spread"] == 0
        assert of_rank["hooks"] == {"kept": [False, False], "sum": True, "forward": 4, "spread": 0}


@pytest.mark.parametrize(
    "shard", ["FSDP 2", "FSDP 2 of blocks", "FSDP 1", "FSDP 1, original parameters"]
)
def test_sharded_models_are_refused_at_entry(found, shard):
    for of_rank in found:
        for message in of_rank[f"{shard}, before"].values():
            assert message.startswith("ValueError: the model is sharded (FSDP")
            assert "one process" in message
            assert "\n" not in message


@pytest.mark.parametrize(
    "shard", ["FSDP 2", "FSDP 2 of blocks", "FSDP 1", "FSDP 1, original parameters"]
)
def test_sharding_inside_is_one_line_and_loses_nothing(found, shard):
    for of_rank in found:
        one = of_rank[f"{shard}, inside"]
        for what in ("first step", "leaving"):
            # FSDP 1 itself refuses to lay parameters of which some are frozen into one
            theirs = (
                "Must flatten tensors with uniform `requires_grad`"
                if shard == "FSDP 1"
                else "the model is sharded (FSDP"
            )
            assert one[what].startswith(f"ValueError: {theirs}"), one[what]
            assert "\n" not in one[what]
        assert shard == "FSDP 1" or "sharded inside the block" in one["leaving"]
        assert one["there"] == 2
        assert one["whole"]
        assert one["trained"]


def test_the_packages_own_trainer_sums_over_ranks(found, monkeypatch):
    def in_order(*args):
        arguments = made(*args)
        arguments.train_sampling_strategy = "sequential"
        return arguments

    made = training.training_arguments
    monkeypatch.setattr(training, "training_arguments", in_order)
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.float32)
    model = tiny_model("llama")
    config = training.SFTConfig(1e-2, max_steps=3, batch_size=4, warmup_steps=0)
    training.train_sft(model, tokenizer_of_words(), examples_of(16), config)
    expected = sum(parameter.double().abs().sum().item() for parameter in model.parameters())
    for of_rank in found:
        assert of_rank["train_sft"]["spread"] == 0
        assert of_rank["train_sft"]["sum"] == pytest.approx(expected, rel=1e-4)
