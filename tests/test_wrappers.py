"""What is measured is what the model inside a wrapper says, without dropout, in every measure there
is.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import DataParallel

from ssah_utils import activations, evaluation, wrappers
from ssah_utils.experiments import stepwise
from ssah_utils.prompts import chat
from tests.conftest import tiny_model

PROMPTS = ["w5 w6 w7", "w9", "w11 w12 w13"]
OPENINGS = (["w30 w31 w32"], ["w40 w41"])


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "data parallel": DataParallel,
    "parallel, compiled": lambda model: compiled(DataParallel(model)),
    "compiled, parallel": lambda model: DataParallel(compiled(model)),
}


def batches() -> list[dict]:
    ids = torch.arange(5, 21).reshape(2, 8)
    return [
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "positions": torch.ones_like(ids).bool(),
        }
    ]


def trajectory(model, tokenizer):
    found = stepwise.generate_and_probe(
        model, tokenizer, PROMPTS, {"": [[]] * 3}, 4, [0, 2], OPENINGS
    )[""]
    return [found.tokens, *found.refusal.values(), *found.compliance.values()]


def nll_of_trajectory(model, tokenizer):
    return stepwise.continuation_nll(
        model, {"": stepwise.Trajectory([[5], [6, 7]], [[8, 9], [10, 11]], 0, {}, {})}
    )[""]


def moments(model, tokenizer):
    found = activations.channel_moments(model, batches())
    return [*found.mean.values(), *found.variance.values()]


LANGUAGE = {
    "generate": lambda m, t: evaluation.generate(m, t, PROMPTS, 6),
    "response_nll": lambda m, t: evaluation.response_nll(m, t, PROMPTS, ["w8 w9", "w3", "w4 w5"]),
    "openings": lambda m, t: evaluation.opening_log_probabilities(
        m, t, PROMPTS, OPENINGS[0] + OPENINGS[1]
    ),
    "prefills": lambda m, t: stepwise.prefills(m, t, PROMPTS, OPENINGS[0], 6),
    "generate_and_probe": trajectory,
    "continuation_nll": nll_of_trajectory,
}
MEASURES = LANGUAGE | {
    "moments": moments,
    "gradients": lambda m, t: list(activations.gradient_activation(m, batches()).values()),
    "states": lambda m, t: activations.marked_states(m, batches()),
}


def same(found, expected) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return np.array_equal(
        np.asarray(found), np.asarray(expected), equal_nan=not isinstance(expected, (str, int))
    )


def dropping(name: str) -> nn.Module:
    """In training mode, in which every kind of dropout drops a lot."""
    model = tiny_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.5
    return model.train()


@pytest.mark.parametrize("measure", LANGUAGE)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_measured_as_the_model_inside(llama, tokenizer, wrap, measure):
    expected = LANGUAGE[measure](llama, tokenizer)
    assert same(LANGUAGE[measure](WRAPPERS[wrap](llama), tokenizer), expected)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nothing_is_dropped_out_in_training_mode_and_the_mode_is_kept(tokenizer, name, measure):
    model = dropping(name)
    model.get_output_embeddings().eval()  # a part of its own mode
    modes = [module.training for module in model.modules()]
    found = MEASURES[measure](model, tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert same(found, MEASURES[measure](model.eval(), tokenizer))


def test_the_mode_is_kept_when_a_measurement_fails(llama):
    with pytest.raises(RuntimeError), wrappers.evaluating(llama.train()):
        assert not any(module.training for module in llama.modules())
        raise RuntimeError
    assert all(module.training for module in llama.modules())


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_adapter_stays_on_and_the_ends_are_those_of_the_model_inside(llama, tokenizer, wrap):
    peft = pytest.importorskip("peft")
    llama.generation_config.eos_token_id = 7
    adapted = peft.get_peft_model(
        llama, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    assert wrappers.without_wrappers(WRAPPERS[wrap](adapted)) is adapted
    assert chat.end_tokens(WRAPPERS[wrap](adapted), tokenizer) == [2, 7]
    expected = evaluation.generate(adapted, tokenizer, PROMPTS, 5)
    assert evaluation.generate(WRAPPERS[wrap](adapted), tokenizer, PROMPTS, 5) == expected


@pytest.mark.parametrize("what", [nn.Linear(1, 1), DataParallel(nn.Linear(1, 1))])
def test_what_is_no_language_model_is_named_in_one_line(tokenizer, what):
    with pytest.raises(
        ValueError, match="a Linear is no Hugging Face language model, nor a wrapper around one"
    ):
        evaluation.generate(what, tokenizer, PROMPTS, 3)
