"""Two processes give what one process gives, whether each holds the whole model or a part of it;
what cannot be trained so is refused in one line, and no model is lost.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ssah_utils import guards, precision, shards, training
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


def in_two_processes(command: list[str], folder: Path, seconds: float = 600, **more) -> list[str]:
    """What both ranks print. A rank that fails ends the other one, and its error is raised."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | more
    ranks = []
    try:
        for rank in range(2):
            own = [sys.executable, *(part.replace("RANK", str(rank)) for part in command)]
            with (
                open(folder / f"out{rank}", "w") as out,
                open(folder / f"error{rank}", "w") as error,
            ):
                ranks.append(
                    subprocess.Popen(own, cwd=ROOT, env=environment, stdout=out, stderr=error)
                )
        end = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.2)
        failed = [number for number, rank in enumerate(ranks) if rank.poll() != 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    errors = [f"rank {rank}: {(folder / f'error{rank}').read_text()[-3000:]}" for rank in failed]
    assert not failed, "\n".join(errors)
    return [(folder / f"out{rank}").read_text() for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """By both ranks. Started once: most of the time goes into imports."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = in_two_processes(
        ["-m", "tests.ranks", "RANK", str(folder)], folder, MASTER_PORT=str(port)
    )
    return [json.loads(out.splitlines()[-1]) for out in said]


def test_a_rank_that_dies_ends_the_test_at_once(tmp_path):
    dying = "import sys, time; sys.exit('gone') if RANK else time.sleep(600)"
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1: gone"):
        in_two_processes(["-c", dying], tmp_path)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_two_ranks_train_what_one_does(found, name, rest, when):
    for of_rank in found:
        one = of_rank[f"DDP, {name}, {rest}, {when}"]
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


def test_frozen_entries_are_not_sent_at_every_forward_pass(found):
    for of_rank in found:
        assert of_rank["buffers"] == {"more": 0}


SHARDED = [
    "llama, False, inside",
    "llama, True, before",
    "gpt2, True, inside",
    "gpt2, False, before",
    "mixtral, False, inside",
    "mixtral, True, before",
    "kept gathered",
]


@pytest.mark.parametrize("case", SHARDED)
def test_a_model_in_shards_is_trained_as_one_in_one_piece(found, case):
    """Under FSDP2, whether it is sharded before the block or inside."""
    for of_rank in found:
        one = of_rank[f"FSDP2, {case}"]
        assert one["sharded"] and one["states"]
        assert one["moved"] > 100 * ROUNDING
        assert one["distance"] < ROUNDING
        assert one["frozen"]


@pytest.mark.parametrize("case", SHARDED)
def test_checkpoints_of_shards_are_those_of_an_ordinary_model(found, case):
    for of_rank in found:
        one = of_rank[f"FSDP2, {case}"]
        assert one["names"] and one["checkpoint"]
        assert one["saved"] == 0


@pytest.mark.parametrize("case", SHARDED)
def test_leaving_gives_an_ordinary_model_that_is_still_in_shards(found, case):
    for of_rank in found:
        one = of_rank[f"FSDP2, {case}"]
        assert one["still"]
        assert one["after"] < 2 * ROUNDING  # it goes on to be trained as a whole


def test_an_optimizer_of_shards_made_before_is_refused_inside_and_afterwards(found):
    for of_rank in found:
        one = of_rank["early"]
        assert one["inside"] == f"ValueError: {guards.MADE_BEFORE}"
        assert one["after"] == f"ValueError: {guards.REPLACED}"
        assert one["whole"] == one["still whole"] == 0
        assert one["anew"] == "nothing" and one["moved"] > 0


def test_two_precisions_in_shards_are_refused_in_one_line(found):
    for of_rank in found:
        one = of_rank["narrow"]
        assert one["before"] == one["inside"] == f"ValueError: {shards.TWO_PRECISIONS}"
        assert one["before, whole"] == one["inside, whole"] == 0


def test_mixed_precision_trains_a_bfloat16_model_in_shards(found):
    for of_rank in found:
        one = of_rank["mixed"]
        assert one["frozen"] and one["moved"] > 0
        assert one["goes on"] == "nothing"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("case", ["2 to 1", "1 to 2", "2 to 2"])
def test_resuming_on_another_number_of_ranks(found, name, case):
    """Weights and AdamW's moments."""
    for of_rank in found:
        assert of_rank[f"resumed, {name}"][case] < ROUNDING


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_was_saved_in_shards_is_read_by_any_model(found, name):
    for of_rank in found:
        one = of_rank[f"resumed, {name}"]
        assert one["names"]
        assert one["whole"] == one["shards"] == one["shards inside"] == 0


def test_units_need_no_more_memory_than_plain_sharding(found):
    """Parameters and optimizer; plain sharding trains all of the model."""
    for rank, of_rank in enumerate(found):
        plain = of_rank["memory"]["plain"]
        shares = {case: size / plain for case, size in of_rank["memory"].items()}
        print(f"rank {rank}: {plain / 2**20:.2f} MiB of plain FSDP2; of that, {shares}")
        assert shares["20% trained"] < 0.5
        assert shares["7.5% frozen"] <= 1.0


@pytest.mark.parametrize("way", ["loaded by all", "loaded by the first"])
def test_accelerate_shards_saves_and_loads_units(found, way):
    """Its own functions: in a CPU's processes, ``Accelerator`` itself knows no FSDP."""
    for of_rank in found:
        one = of_rank[f"accelerate, {way}"]
        assert one["distance"] < ROUNDING
        assert one["moved"] > 100 * ROUNDING
        assert one["names"]
        assert one["full"] == one["sharded"] == one["optimizer"] == 0


def test_ranks_that_differ_are_refused_in_one_line(found):
    what = {
        "units": "the units to train",
        "rest": "whether the rest is trained",
        "version": "the versions of ssah_utils or of libraries",
        "data": "the data",
    }
    for case, named in what.items():
        first, second = (of_rank["disagreements"][case] for of_rank in found)
        assert first == second
        assert first.startswith(f"ValueError: the ranks differ in {named}: rank 0 has ")
        assert "\n" not in first


def test_a_rank_that_does_not_come_is_named(found):
    said = found[0]["disagreements"]["absent"]
    assert said.startswith("ValueError: rank 1 has not come to the block")


@pytest.mark.parametrize("when", ["before", "inside"])
def test_fsdp_1_is_refused_in_one_line_and_nothing_is_lost(found, when):
    for of_rank in found:
        one = of_rank[f"FSDP 1, {when}"]
        for what, said in one.items():
            if what.endswith("whole"):
                assert said is True
            else:
                assert said.startswith("ValueError: the model is sharded by FSDP 1")
                assert "\n" not in said
        assert len(one) == (2 if when == "before" else 6)


def test_an_error_in_the_block_loses_nothing(found):
    for of_rank in found:
        one = of_rank["failing"]
        assert one["error"].startswith("ZeroDivisionError")
        assert one["part"].startswith("ValueError: FSDP2 has not gathered")
        assert one["whole"] == one["still whole"] == 0


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
