"""What would train some units wrongly or not at all: optimizers of other parameters, and models in
other shapes.
"""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from ssah_utils import adapters, attribution, guards, precision, training
from ssah_utils.training import SFTConfig, evaluation_copy, train_dpo, train_sft
from ssah_utils.unit_training import freezing, training_only
from tests.conftest import parameters_of, same_parameters, tiny_model
from tests.test_training import PAIRS, examples_of
from tests.test_unit_training import (
    assert_exactly_frozen,
    batches,
    every,
    parts_of,
    scattered,
    trainable_entries,
)

BEFORE = "made before some units were chosen trains none of them: make it inside the block"
AFTER = "used after their block was left"
IDLE = "holds only parameters that are not trained here: make it inside the block"


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.float32)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: nn.Module, *optimizers, n: int = 2) -> None:
    for ids in batches(n):
        loss = model(ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(
                *(
                    [lambda loss=loss: loss.detach()]
                    if isinstance(optimizer, torch.optim.LBFGS)
                    else []
                )
            )
            optimizer.zero_grad()


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=1.0, max_iter=1),
    "accelerate": (
        lambda parameters: Accelerator(cpu=True).prepare(torch.optim.AdamW(parameters, lr=1e-2))
    ),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": [one]} for one in parameters], lr=1e-2
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("context", [training_only, freezing])
def test_an_optimizer_made_before_is_refused_at_its_first_step(llama, make, context):
    early, before = make(list(llama.parameters())), parameters_of(llama)
    with pytest.raises(ValueError, match=BEFORE) as raised, context(llama, scattered(llama)):
        step(llama, early)
    assert "\n" not in str(raised.value)
    assert same_parameters(llama, before)
    step(llama, early)  # outside, it is as good as ever
    assert not same_parameters(llama, before)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_made_inside_trains_and_is_refused_afterwards(llama, make):
    chosen, before = scattered(llama), parameters_of(llama)
    with freezing(llama, chosen):
        late = make(trained(llama))
        step(llama, late, n=4)
    others = ~chosen
    assert_exactly_frozen(llama, before, trainable_entries(llama, others, rest=True))
    with pytest.raises(ValueError, match=AFTER):
        step(llama, late)
    with training_only(llama, scattered(llama, seed=1)), pytest.raises(ValueError, match=AFTER):
        step(llama, late)


PARTS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {
    "one matrix": lambda model: [model.model.layers[0].mlp.down_proj.weight],
    "a bias among norms": lambda model: [
        model.model.layers[0].self_attn.v_proj.bias,
        model.model.norm.weight,
    ],
    "the last block": lambda model: list(model.model.layers[2].parameters()),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_of_the_model_held_from_before_is_refused(tiny_models, part):
    model = tiny_models("qwen2")
    early = torch.optim.SGD(part(model), lr=1e-2)
    with (
        pytest.raises(ValueError, match=BEFORE),
        training_only(model, scattered(model), train_rest=True),
    ):
        step(model, early)


def test_frozen_parameters_alone_are_refused_at_the_second_step(llama):
    """Made before, of what the block freezes: nothing is replaced, and nothing is trained."""
    early = torch.optim.SGD([llama.model.norm.weight, llama.lm_head.weight], lr=1e-2)
    with pytest.raises(ValueError, match=IDLE), training_only(llama, scattered(llama)):
        step(llama, early)
    with freezing(llama, scattered(llama)):  # here, they are trained
        step(llama, early)


# ---------------------------------------------------------------------------------- no false alarms


def test_parts_made_inside_are_let_alone(llama):
    """Matrices and the rest in two optimizers, of which the second has nothing to do."""
    before, chosen = parameters_of(llama), scattered(llama)
    with training_only(llama, chosen):
        matrices = torch.optim.SGD([p for p in llama.parameters() if p.ndim > 1], lr=1e-2)
        rest = torch.optim.AdamW([p for p in llama.parameters() if p.ndim == 1], lr=1e-2)
        step(llama, matrices, rest, n=4)
        step(llama, rest, matrices, n=4)
    assert_exactly_frozen(llama, before, trainable_entries(llama, chosen, rest=False))


def test_groups_added_later_are_let_alone(llama):
    early = torch.optim.SGD(llama.parameters(), lr=1e-2)
    with training_only(llama, scattered(llama)):
        early.add_param_group(
            {
                "params": [
                    p
                    for p in trained(llama)
                    if all(p is not q for q in early.param_groups[0]["params"])
                ]
            }
        )
        step(llama, early)


def test_steps_that_move_nothing_are_let_alone(llama):
    """Warm-up from learning rate 0, steps without gradients, a schedule alone, and a resumed
    state.
    """
    with training_only(llama, scattered(llama)):
        optimizer = torch.optim.AdamW(trained(llama), lr=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.0)
        step(llama, optimizer)
        optimizer.step()
        schedule.step()
        resumed = torch.optim.AdamW(trained(llama), lr=0.0)
        resumed.load_state_dict(optimizer.state_dict())
        step(llama, resumed)
        for ids in batches(3):  # accumulated
            llama(ids, labels=ids).loss.backward()
        resumed.step()
    early = torch.optim.SGD(llama.parameters(), lr=1e-2)
    with training_only(llama, scattered(llama)):
        torch.optim.lr_scheduler.ConstantLR(early)


def test_other_models_are_let_alone(llama, tiny_models, tokenizer):
    other = tiny_models("gpt2")
    wrapped = adapters.with_adapter(tiny_models("qwen2"), "lora", tokenizer)
    optimizers = [torch.optim.SGD(trained(model), lr=1e-2) for model in (other, wrapped)]
    before = parameters_of(other)
    with (
        training_only(llama, scattered(llama)),
        training_only(tiny_models("phi3"), scattered(tiny_models("phi3"))),
    ):
        for model, optimizer in zip((other, wrapped), optimizers, strict=True):
            step(model, optimizer)
    assert not same_parameters(other, before)


def test_nothing_is_held_once_it_is_over(llama):
    gc.collect()  # other tests of this process may have failed models still in their tracebacks
    before = len(guards.STAND_INS), len(guards.OPEN)
    with training_only(llama, scattered(llama)):
        step(llama, torch.optim.SGD(trained(llama), lr=1e-2))
        assert len(guards.STAND_INS) > before[0] and len(guards.OPEN) == before[1] + 1
    gc.collect()
    assert len(guards.STAND_INS) <= before[0] and len(guards.OPEN) <= before[1]


# ----------------------------------------------------------------------------------------- wrappers

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("context", [training_only, freezing])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_trained_through_its_wrapper(
    llama, tiny_models, token_ids, wrap, context
):
    torch._dynamo.reset()
    reference, chosen, wrapped = tiny_models("llama"), scattered(llama), wrap(llama)
    with torch.no_grad():
        wrapped(token_ids)  # so that there is code for the model as it was
    with context(reference, chosen):
        step(reference, torch.optim.SGD(trained(reference), lr=1e-2))
    with context(wrapped, chosen) as inside:
        assert inside is wrapped
        step(wrapped, torch.optim.SGD(trained(wrapped), lr=1e-2))
    for found, expected in zip(llama.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not same_parameters(llama, parameters_of(tiny_model("llama")))
    with torch.no_grad():  # nothing stale
        torch.testing.assert_close(
            wrapped(token_ids).logits, reference(token_ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("name", "when", "rest"),
    [
        ("llama", "before", False),
        ("llama", "inside", True),
        ("gpt2", "before", True),
        ("gpt2", "inside", False),
    ],
)
def test_compiled_without_a_break(tiny_models, token_ids, name, when, rest):
    """Forward and backward, each in one graph."""
    torch._dynamo.reset()
    model, reference, chosen = tiny_models(name), tiny_models(name), scattered(tiny_models(name))
    model.loss_type = (  # else transformers itself breaks the graph, to say that it takes this one
        "ForCausalLM"
    )

    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    wrapped = compiled(model) if when == "before" else model
    if when == "before":
        wrapped(token_ids, labels=token_ids).loss.backward()
    with training_only(reference, chosen, rest):
        step(reference, torch.optim.SGD(trained(reference), lr=1e-2))
    with training_only(wrapped, chosen, rest):
        fast = wrapped if when == "before" else compiled(wrapped)
        step(fast, torch.optim.SGD(trained(model), lr=1e-2))
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrap", [*WRAPPERS.values(), lambda model: model], ids=[*WRAPPERS, "plain"]
)
@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_trainers_take_wrappers_off(llama, tiny_models, tokenizer, wrap, train):
    data = {"train_sft": examples_of(8), "train_dpo": PAIRS}[train]
    config = SFTConfig(1e-2, max_steps=2, batch_size=4, warmup_steps=0)
    reference = tiny_models("llama")
    expected = getattr(training, train)(reference, tokenizer, data, config)
    assert getattr(training, train)(wrap(llama), tokenizer, data, config) == expected
    assert same_parameters(llama, parameters_of(reference))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_copies_and_adapters_take_wrappers_off(llama, tokenizer, token_ids, wrap):
    twin = evaluation_copy(wrap(llama), torch.float64)
    assert type(twin) is type(llama)
    assert twin.dtype == torch.float64
    adapted = adapters.with_adapter(wrap(llama), "lora", tokenizer)
    assert adapted.get_base_model() is llama


def test_models_with_an_adapter_are_refused_in_one_line(llama, tokenizer, token_ids):
    import peft

    chosen, injected = scattered(llama), tiny_model("llama")
    injected.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    for model in (adapters.with_adapter(llama, "lora", tokenizer), injected):
        for use in (
            lambda model=model: training_only(model, chosen).__enter__(),
            lambda model=model: freezing(model, chosen).__enter__(),
            lambda model=model: train_dpo(model, tokenizer, PAIRS, SFTConfig(max_steps=1)),
            lambda model=model: attribution.unit_gradients(model, []),
            lambda model=model: adapters.with_adapter(model, "lora", tokenizer),
        ):
            with pytest.raises(ValueError, match="carries a PEFT adapter") as raised:
                use()
            assert "\n" not in str(raised.value)


def test_an_adapter_starts_from_its_seed_alone(tokenizer):
    def start(seed: int = 0, before: int = 0) -> list[Tensor]:
        torch.manual_seed(before)
        model = adapters.with_adapter(tiny_model("llama"), "lora", tokenizer, seed)
        return [parameter for name, parameter in model.named_parameters() if "lora_A" in name]

    first = start()
    assert all(torch.equal(a, b) for a, b in zip(first, start(before=5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, start(seed=1), strict=True))


@pytest.mark.parametrize("n_more", [7, -3])
def test_a_resized_model_is_trained(any_model, tokenizer, n_more):
    any_model.resize_token_embeddings(97 + n_more, mean_resizing=False)
    chosen, before = scattered(any_model), parameters_of(any_model)
    with training_only(any_model, chosen):
        optimizer = torch.optim.SGD(trained(any_model), lr=1e-2, momentum=0.9)
        for ids in batches(4):
            any_model(ids.clamp(max=90), labels=ids.clamp(max=90)).loss.backward()
            optimizer.step()
    assert_exactly_frozen(any_model, before, trainable_entries(any_model, chosen, rest=False))


# --------------------------------------------------------------------------- other shapes of models


def shared_matrix(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def shared_module(model: nn.Module) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


def tied_to_another(model: nn.Module) -> None:
    model.more = nn.Linear(70, 42, bias=False)
    model.more.weight = model.model.layers[1].mlp.down_proj.weight


def parametrized(model: nn.Module) -> None:
    weight_norm(model.model.layers[0].mlp.down_proj)


def pruned(model: nn.Module) -> None:
    prune.random_unstructured(model.model.layers[0].mlp.down_proj, "weight", 0.1)


def of_another_class(model: nn.Module) -> None:
    class Scaled(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            return 2 * super().forward(values)

    model.model.layers[0].mlp.gate_proj = Scaled(42, 70, bias=False)


def patched(model: nn.Module) -> None:
    """As device maps do it."""
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda values: 2 * nn.Linear.forward(linear, values)


def offloaded(model: nn.Module) -> None:
    model.model.layers[2].to("meta")


SHAPES = {
    shared_matrix: "'down_proj' are shared with another module",
    shared_module: "shared with another module",
    tied_to_another: "'down_proj' are shared with another module",
    parametrized: "'down_proj' is a ParametrizedLinear that computes",
    pruned: "'down_proj' is a Linear that computes",
    of_another_class: "'gate_proj' is a Scaled that computes",
    patched: "'up_proj' is a Linear that computes",
    offloaded: "sharded .* or offloaded",
}


@pytest.mark.parametrize("change", SHAPES, ids=lambda change: change.__name__)
def test_matrices_that_cannot_be_trained_in_part_are_refused(llama, token_ids, change):
    change(llama)
    modules = list(llama.modules())
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    expected = None if change is offloaded else llama(token_ids).logits
    with (
        pytest.raises(ValueError, match=SHAPES[change]) as raised,
        training_only(llama, scattered(llama)),
    ):
        raise AssertionError("entered")
    assert "\n" not in str(raised.value)
    assert list(llama.modules()) == modules
    assert [parameter.requires_grad for parameter in llama.parameters()] == flags
    assert expected is None or torch.equal(llama(token_ids).logits, expected)


@pytest.mark.parametrize("mark", ["device_mesh", "ds_id"])
def test_partitioned_parameters_are_refused(llama, mark):
    """As DTensor and DeepSpeed mark them; both are tried on two ranks or not at hand."""
    setattr(llama.model.norm.weight, mark, 0)
    with pytest.raises(ValueError, match="the model is sharded"), freezing(llama, scattered(llama)):
        raise AssertionError("entered")


@pytest.mark.parametrize("context", [training_only, freezing])
def test_partitioning_inside_is_said_at_the_first_step_and_at_the_end(token_ids, context):
    """As DeepSpeed does it: values that are elsewhere are not put together, and not lost."""
    first, second = tiny_model("llama"), tiny_model("llama")
    with (
        pytest.raises(ValueError, match="is sharded by FSDP 1, DeepSpeed ZeRO-3") as at_step,
        context(first, scattered(first)),
    ):
        for parameter in first.parameters():
            parameter.ds_id = 0
        first(token_ids)
    with (
        pytest.raises(ValueError, match="was sharded inside the block in a way") as at_end,
        context(second, scattered(second)),
    ):
        held = parameters_of(second)
        for parameter in second.parameters():
            parameter.ds_id = 0
    assert same_parameters(second, held)
    assert "\n" not in f"{at_step.value}{at_end.value}"


# ------------------------------------------------------------------------------- changes on the way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_another_precision_inside(tiny_models, name, dtype):
    """Frozen entries are rounded, as ``to`` does; what is trained is kept in float32 at least, and
    goes on being trained.
    """
    model, chosen = tiny_models(name), scattered(tiny_models(name))
    rounded = parameters_of(tiny_models(name).to(dtype))
    with training_only(model, chosen):
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        step(model, optimizer)
        model.to(dtype)
        blocks = [part.block for part in parts_of(model)]
        assert {block.dtype for block in blocks} == {torch.promote_types(dtype, torch.float32)}
        kept = [block.detach().clone() for block in blocks]
        step(model, optimizer)
        assert not any(torch.equal(block, old) for block, old in zip(blocks, kept, strict=True))
    for key, mask in trainable_entries(model, chosen, rest=False).items():
        assert model.get_parameter(key).dtype == dtype
        assert torch.equal(model.get_parameter(key)[~mask], rounded[key][~mask])


def test_assigned_weights_keep_their_flags(llama, tiny_models):
    other = {name: value + 0.1 for name, value in tiny_models("llama").state_dict().items()}
    llama.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    with training_only(llama, scattered(llama)):
        llama.load_state_dict(other, assign=True)
        assert not llama.model.norm.weight.requires_grad
    assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == flags
    assert all(torch.equal(parameter, other[name]) for name, parameter in llama.named_parameters())


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_activation_checkpointing(llama, tiny_models, when, reentrant, rest):
    reference, chosen = tiny_models("llama").train(), scattered(llama)
    llama.train()
    with training_only(reference, chosen, rest):
        step(reference, torch.optim.SGD(trained(reference), lr=1e-2))
    for at in ("before", "inside"):
        if at == "inside":
            context = training_only(llama, chosen, rest)
            context.__enter__()
        if when == at:
            llama.activation_checkpointing_enable({"use_reentrant": reentrant})
    step(llama, torch.optim.SGD(trained(llama), lr=1e-2))
    context.__exit__(None, None, None)
    for found, expected in zip(llama.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not same_parameters(llama, parameters_of(tiny_model("llama")))


def test_gradients_of_units_are_refused_inside(llama):
    with training_only(llama, every(llama)), pytest.raises(ValueError, match="no response token"):
        attribution.unit_gradients(llama, [])
    with (
        training_only(llama, scattered(llama)),
        pytest.raises(ValueError, match="before entering that block"),
    ):
        attribution.unit_gradients(llama, [])


def test_the_copy_made_inside_trains_by_itself(llama):
    """It stays a model of which some units are trained; its optimizer is its own."""
    with training_only(llama, scattered(llama)):
        twin = copy.deepcopy(llama)
        step(twin, torch.optim.SGD(trained(twin), lr=1e-2))
    before = parameters_of(llama)
    train_sft(twin, None, examples_of(8), SFTConfig(max_steps=1, batch_size=4))
    assert same_parameters(llama, before)
