"""What is trained on: our token ids, our padding, and what cannot be trained on is named early."""

import copy
import math

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer
from trl import DPOTrainer
from trl.trainer import utils as trl_utils

from ssah_utils import per_unit, precision, training
from ssah_utils.attribution import unit_gradients
from ssah_utils.prompts import tokens
from ssah_utils.sequences import batch_of_examples, batch_of_pairs, tokens_of_pairs
from ssah_utils.training import SFTConfig, train_dpo, train_sft
from tests.conftest import VOCABULARY, parameters_of, same_parameters, tiny_model
from tests.test_training import IGNORED, PAIRS, examples_of, log_p

# A float32 sum of n terms of size x is exact to about sqrt(n) x 2^-24; losses here are means of
# some 50 terms below 10, each after some 10 matrix products.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.float32)


def positional(name: str) -> nn.Module:
    """A model without rotary positions, in which a shift of all positions shows."""
    if name == "gpt2":
        model = tiny_model("gpt2")
        model.transformer.wpe.weight.data.mul_(20)
        return model
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=42,
        ffn_dim=70,
        num_hidden_layers=2,
        num_attention_heads=6,
        word_embed_proj_dim=42,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dropout=0.3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.decoder.embed_positions.weight.data.mul_(20)
    return model


def hostile(tokenizer: PreTrainedTokenizerBase, how: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tokenizer)
    if how == "no padding token":
        tokenizer.pad_token = None
    elif how == "padding token beyond the embedding":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id >= VOCABULARY
    elif how == "padding on the left":
        tokenizer.padding_side = "left"
    elif how == "cuts":
        tokenizer.model_max_length, tokenizer.truncation_side = 4, "left"
    elif how == "begins every text":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


HOSTILE = [
    "as it is",
    "no padding token",
    "padding token beyond the embedding",
    "padding on the left",
    "cuts",
    "begins every text",
]


@torch.no_grad()
def mean_loss(model: nn.Module, examples: list[dict[str, list[int]]]) -> float:
    """Whole passes, one for each example, without padding."""
    terms = []
    for example in examples:
        rows = model(torch.tensor([example["input_ids"]])).logits[0].double().log_softmax(-1)
        terms += [
            -rows[i - 1, token].item()
            for i, token in enumerate(example["labels"])
            if token != IGNORED
        ]
    return sum(terms) / len(terms)


class ForwardOnly(Trainer):
    """OPT is no architecture of ours: its loss is its own."""


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_loss_is_that_of_whole_passes(tokenizer, monkeypatch, name, how):
    model, examples = tiny_model("llama") if name == "llama" else positional(name), examples_of(8)
    if name == "opt":
        monkeypatch.setattr(training, "ResponseTrainer", ForwardOnly)
    expected = mean_loss(model, examples)
    found = train_sft(
        model, hostile(tokenizer, how), examples, SFTConfig(max_steps=1, batch_size=8)
    )
    assert found[0] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_unit_gradients_do_not_depend_on_the_padding(name, side):
    model, examples = positional("gpt2") if name == "gpt2" else tiny_model(name), examples_of(6)
    expected = unit_gradients(model, [batch_of_examples([example]) for example in examples])
    batch = batch_of_examples(examples)
    if side == "left":
        for row in range(len(examples)):
            shift = int((batch["attention_mask"][row] == 0).sum())
            for values in batch.values():
                values[row] = values[row].roll(shift)
    found = unit_gradients(model, [batch])
    for kind in per_unit.KINDS:
        torch.testing.assert_close(
            found[kind], expected[kind], rtol=1e-3, atol=1e-5 * expected[kind].max().item()
        )


def test_unit_gradients_are_those_of_the_first_step(tokenizer):
    """Without dropout and of all units, whatever the mode and the flags that the model comes
    with.
    """
    expected = unit_gradients(tiny_model("gpt2"), [batch_of_examples(examples_of(6))])
    model = tiny_model("gpt2").train().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    found = unit_gradients(
        torch.compile(model, backend="eager"), [batch_of_examples(examples_of(6))]
    )
    assert all(torch.equal(found[kind], expected[kind]) for kind in per_unit.KINDS)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "transformer.wte.weight"
    }
    assert model.training


# -------------------------------------------------------------------------------------- preferences


@pytest.fixture
def trainers(monkeypatch) -> list[DPOTrainer]:
    """TRL's trainers as they are when training starts."""
    seen, train = [], DPOTrainer.train
    monkeypatch.setattr(
        DPOTrainer,
        "train",
        lambda trainer, *a, **k: (seen.append(trainer), train(trainer, *a, **k))[1],
    )
    return seen


def uneven(n: int = 6) -> list[dict[str, str]]:
    """Pairs of which no two are of one length."""
    words = [f"w{3 + (7 * i) % 90}" for i in range(60)]
    return [
        {
            "prompt": " ".join(words[i : 2 * i + 1]),
            "chosen": " ".join(words[i : i + 2]),
            "rejected": " ".join(words[2 * i : 2 * i + 5]),
        }
        for i in range(1, n + 1)
    ]


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pairs_are_read_as_whole_passes_read_them(tokenizer, trainers, name, how):
    """Log-probabilities of the reference, and the loss of the second step, one pass for each
    answer.
    """
    model, pairs, kept = positional("gpt2") if name == "gpt2" else tiny_model(name), uneven(), {}
    given, before, after_one = hostile(tokenizer, how), copy.deepcopy(model), copy.deepcopy(model)
    config = SFTConfig(1e-3, max_steps=2, batch_size=6, warmup_steps=0)
    losses = train_dpo(model, given, pairs, config, beta=0.3, callbacks=(After(1, kept),))
    after_one.load_state_dict(kept)
    margin = 0.0
    for answer, sign in (("chosen", 1), ("rejected", -1)):
        expected = log_p(before, tokenizer, pairs, answer)
        found = torch.tensor(trainers[0].train_dataset[f"ref_{answer}_logps"])
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=1e-4)
        margin = margin + sign * (log_p(after_one, tokenizer, pairs, answer) - expected)
    # the reference is the model itself
    expected = [math.log(2), -torch.nn.functional.logsigmoid(0.3 * margin).mean().item()]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[1] < losses[0] - 0.05
    assert (given.pad_token, given.padding_side) == (
        hostile(tokenizer, how).pad_token,
        hostile(tokenizer, how).padding_side,
    )


class After(transformers.TrainerCallback):
    """The weights after a step."""

    def __init__(self, step: int, kept: dict) -> None:
        self.step, self.kept = step, kept

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == self.step:
            self.kept.update({name: value.clone() for name, value in model.state_dict().items()})


def test_the_head_of_preference_training_runs_only_where_an_answer_is_predicted(
    llama, tokenizer, monkeypatch
):
    """For the reference and for the step; afterwards TRL decides by the device again."""
    pairs, n_read = uneven(), []
    decides, kernel = trl_utils._use_triton, trl_utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *rest):
            n_read.append(len(hidden))
            return kernel.apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    train_dpo(llama, tokenizer, pairs, SFTConfig(max_steps=1, batch_size=len(pairs)))
    answers = [pair[answer] for pair in pairs for answer in ("chosen", "rejected")]
    n_answered = sum(len(answer.split()) + 1 for answer in answers)  # each with its end
    assert n_read == [n_answered] * 2
    assert trl_utils._use_triton is decides


TEXTS = [("w3 w4", "w5", "w6 w7"), ("w3 w4 ", " w5", "w6"), (" w3", "", "w6 "), ("w3", "w4 w5", "")]


def assert_encoded(
    tokenizer: PreTrainedTokenizerBase,
    pair: dict[str, str],
    batch: dict[str, Tensor],
    rows: dict[str, int],
) -> None:
    for answer, row in rows.items():
        (expected,) = tokens.encode(tokenizer, [pair["prompt"]], [pair[answer]], 99)
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == expected["input_ids"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        marked = [
            token
            for token, mark in zip(
                batch["input_ids"][row], batch["completion_mask"][row], strict=True
            )
            if mark
        ]
        assert marked == [label for label in expected["labels"] if label != IGNORED]
        assert marked[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("texts", TEXTS)
def test_token_ids_are_those_of_supervised_training(llama, tokenizer, how, texts):
    """Also where a prompt ends in a space, and where nothing but the end is answered."""
    tokenizer = hostile(tokenizer, how)
    pair = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    batch = batch_of_pairs(list(tokens_of_pairs(llama, tokenizer, [pair] * 2)))
    assert_encoded(tokenizer, pair, batch, {"chosen": 0, "rejected": 2})


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_an_answer_that_is_cut_has_no_end_as_in_supervised_training(llama, tokenizer, n):
    pair = PAIRS[0] | {"chosen_tokens": n}
    (row,) = tokens_of_pairs(llama, tokenizer, [pair])
    (expected,) = tokens.encode(tokenizer, [pair["prompt"]], [pair["chosen"]], n)
    assert row["prompt_ids"] + row["chosen_ids"] == expected["input_ids"]
    (whole,) = tokens.encode(tokenizer, [pair["prompt"]], [pair["rejected"]], 99)
    assert row["prompt_ids"] + row["rejected_ids"] == whole["input_ids"]
    assert len(whole["input_ids"]) == 7 and row["rejected_ids"][-1] == tokenizer.eos_token_id


def test_these_token_ids_are_trained_on(llama, tokenizer, trainers):
    tokenizer = hostile(tokenizer, "begins every text")
    train_dpo(llama, tokenizer, [PAIRS[0]] * 4, SFTConfig(max_steps=1, batch_size=2))
    batch = next(iter(trainers[0].get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 4
    assert_encoded(tokenizer, PAIRS[0], batch, {"chosen": 1, "rejected": 3})


def test_no_pair_is_cut_or_dropped(tokenizer, trainers):
    """Longer than any default of TRL."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    pairs = [
        {"prompt": "w3 " * n, "chosen": "w4 " * m, "rejected": "w5"}
        for n, m in ((1100, 2), (3, 1500), (1500, 500), (1, 1))
    ]
    train_dpo(model, tokenizer, pairs, SFTConfig(max_steps=1, batch_size=1))
    found = trainers[0].train_dataset
    assert [len(ids) for ids in found["prompt_ids"]] == [1100, 3, 1500, 1]
    assert [len(ids) for ids in found["chosen_ids"]] == [3, 1501, 501, 2]
    batch = next(iter(trainers[0].get_train_dataloader()))
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


WRONG_PAIRS = {
    "pair 1 has no text 'rejected'": [PAIRS[0], {"prompt": "w3", "chosen": "w4"}],
    "pair 0 has no text 'prompt'": [{"chosen": "w3", "rejected": "w4"}],
    "pair 0 has no text 'chosen'": [{"prompt": "w3", "chosen": None, "rejected": "w4"}],
    "pair 2 has no text 'prompt'": [
        *PAIRS[:2],
        PAIRS[2] | {"prompt": [{"role": "user", "content": "w3"}]},
    ],
    "nothing to prefer": [pair | {"rejected": pair["chosen"]} for pair in PAIRS],
    "nothing to prefer: the chosen": [
        {"prompt": "w3", "chosen": "w4 w5", "rejected": "w4 w6"}
        | {"chosen_tokens": 1, "rejected_tokens": 1}
    ],
    "pair 1 has 70 tokens, but the model has 64 positions": [
        PAIRS[0],
        PAIRS[0] | {"rejected": "w4 " * 66},
    ],
    "pair 0 has 65 tokens, but the model has 64 positions": [
        {"prompt": "w3 " * 62, "chosen": "w4 w5", "rejected": ""}
    ],
    "pair 1 has rejected_tokens = 0": [PAIRS[0], PAIRS[1] | {"rejected_tokens": 0}],
    "pair 0 has chosen_tokens = '3'": [PAIRS[0] | {"chosen_tokens": "3"}],
    "the list of pairs is empty": [],
}


@pytest.mark.parametrize("message", WRONG_PAIRS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pairs_that_cannot_be_trained_on(tokenizer, name, message):
    model = tiny_model(name)
    before = parameters_of(model)
    with pytest.raises(ValueError, match=message) as raised:
        train_dpo(model, tokenizer, WRONG_PAIRS[message], SFTConfig(max_steps=1))
    assert "\n" not in str(raised.value)
    assert same_parameters(model, before)


def test_one_pair_of_equal_answers_says_nothing_and_does_no_harm(llama, tokenizer, trainers):
    pairs = [*PAIRS[:3], PAIRS[3] | {"rejected": PAIRS[3]["chosen"]}]
    train_dpo(llama, tokenizer, pairs, SFTConfig(max_steps=1, batch_size=4))
    assert len(trainers[0].train_dataset) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_examples_beyond_the_positions_are_named(tokenizer, name):
    examples = [*examples_of(2), {"input_ids": [3] * 65, "labels": [IGNORED] * 60 + [3] * 5}]
    with pytest.raises(ValueError, match="example 2 has 65 tokens, but the model has 64 positions"):
        train_sft(tiny_model(name), tokenizer, examples, SFTConfig(max_steps=1))
    examples[2] = {"input_ids": [3] * 64, "labels": [IGNORED] * 60 + [3] * 4}
    assert len(train_sft(tiny_model(name), tokenizer, examples, SFTConfig(max_steps=1))) == 1


def test_a_batch_of_pairs_is_the_one_of_trl(llama, tokenizer):
    """Their collator, where padding tokens allow it."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = list(tokens_of_pairs(llama, tokenizer, uneven()))
    expected = DataCollatorForPreference(pad_token_id=tokenizer.eos_token_id)(rows)
    found = batch_of_pairs(rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_the_configurations_of_the_model_are_as_before(tokenizer, train):
    """TRL writes the tokenizer's tokens into them; and dropout is as the checkpoint has it."""
    model = tiny_model("gpt2")
    model.config.pad_token_id = model.generation_config.pad_token_id = 7
    before = copy.deepcopy(
        (model.config.to_dict(), model.generation_config.to_dict(), model.transformer.drop.p)
    )
    data: Tensor | list = {"train_sft": examples_of(8), "train_dpo": PAIRS}[train]
    getattr(training, train)(model, tokenizer, data, SFTConfig(max_steps=1, batch_size=4))
    assert (
        model.config.to_dict(),
        model.generation_config.to_dict(),
        model.transformer.drop.p,
    ) == before
