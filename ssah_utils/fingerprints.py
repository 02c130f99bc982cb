"""Tell models apart by what they compute.

Knows weights and configurations. Does not know prompts or results.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ssah_utils import placement, quantised
from ssah_utils.files import sha256_of
from ssah_utils.models import architecture_of
from ssah_utils.weights import gathered
from ssah_utils.wrappers import plain_name

# What of a configuration does not change what a model computes or learns, given its weights.
COSMETIC = set(
    (
        "architectures dtype torch_dtype transformers_version vocab_size tie_word_embeddings"
        " use_cache attn_implementation output_attentions output_hidden_states return_dict"
        " torchscript tokenizer_class id2label label2id num_labels problem_type pretraining_tp"
        " auto_map initializer_range task_specific_params"
    ).split()
)


def fingerprint(model: nn.Module) -> str:
    """Short hash of what a model computes: its weights, rounded to bfloat16, and configuration.

    Equal for a float32 model and its bfloat16 copy, in any wrapper (``unwrapped``), saved and
    loaded, tied or not, and with untrained rows added to its vocabulary. Another one while units
    are held or multiplied (``interventions``). Of a quantised model, codes and scales count, or the
    numbers they stand for where kernels repack them.
    """
    plain = gathered(model)
    architecture_of(plain)
    config = {
        key: value
        for key, value in plain.config.to_diff_dict().items()
        if key not in COSMETIC and not key.endswith("_token_id") and not key.startswith("_")
    }
    both = (plain.get_input_embeddings(), plain.get_output_embeddings())
    tables = [table for table in both if not quantised.is_quantised(table)]
    vocabulary = {table.weight.data_ptr() for table in tables}
    repacked = {
        name: module
        for name, module in quantised.quantised_modules(plain)
        if not quantised.codes_stay(module)
    }
    tensors = {
        plain_name(part): value
        for name, tensor in plain.state_dict().items()
        if name.rpartition(".")[0] not in repacked or name.endswith(".bias")
        for part, value in quantised.plain_tensors(name, tensor.detach())
    }
    # tied tensors are hashed once; what a device map keeps elsewhere has no place in memory
    places = {
        name: (
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_meta * name,
        )
        for name, tensor in tensors.items()
    }
    distinct = {places[name]: (name, tensor) for name, tensor in tensors.items()}

    def hash_of(named: tuple[str, Tensor]) -> str:
        name, tensor = named
        is_table = tensor.data_ptr() in vocabulary
        if tensor.is_meta:
            owner = plain.get_submodule(name.rpartition(".")[0])
            is_table = any(owner is table for table in tables)
            tensor = placement.value_of(owner, name.rpartition(".")[2]).detach()
        return _hash_of_values(trained_rows(tensor) if is_table else tensor)

    with ThreadPoolExecutor() as pool:  # neither rounding nor hashing needs the interpreter
        hashes = dict(zip(distinct, pool.map(hash_of, distinct.values()), strict=True))
    held = [
        [plain_name(name), *map(_hash_of_values, hook_values(hook))]
        for name, module in plain.named_modules()
        for hook in module._forward_pre_hooks.values()
        if hook_values(hook)
    ]
    by_name = {name: hashes[place] for name, place in places.items()}
    for name, module in repacked.items():  # one at a time: as numbers they may not all fit
        weight = quantised.weight_of(module, plain.dtype)
        by_name[f"{plain_name(name)}.weight"] = _hash_of_values(weight)
    return sha256_of([plain.config.model_type, config, by_name, held])[:16]


def hook_values(hook: object) -> tuple[Tensor, ...]:
    """The numbers of a hook that holds or multiplies units; none of any other hook."""
    values = getattr(hook, "values", None)
    return values if isinstance(values, tuple) else ()


def _hash_of_values(tensor: Tensor) -> str:
    """Of a tensor's shape and of every entry; floating-point numbers are rounded to bfloat16."""
    values = tensor.contiguous()
    if tensor.is_floating_point():
        values = tensor.to(torch.bfloat16).contiguous().view(torch.int16)
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(values.cpu().numpy().data)
    return digest.hexdigest()


def trained_rows(table: Tensor) -> Tensor:
    """An embedding or a head's matrix without untrained rows at its end: (n, d_model), a view.

    ``resize_token_embeddings`` appends rows that are the mean of the others, up to noise of 3e-5 of
    their spread; more of them do not move the mean, and training moves them away from it. Allowed
    are that noise and what rounding to bfloat16 adds.
    """
    mean, spread = table.mean(0, dtype=torch.float32), table[:1024].float().std(0)
    near = mean.abs() / 2**8 + spread / 10**3
    n = len(table)
    while n > 1 and bool(((table[n - 1].float() - mean).abs() <= near).all()):
        n -= 1
    return table[:n]
