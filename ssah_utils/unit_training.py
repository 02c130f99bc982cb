"""Train some units of a model and leave every other entry exactly as it is.

A unit owns its writer column and the matching reader rows (``models``). The trainable entries of a
matrix become one small parameter, the *block*; the rest of the matrix is no parameter at all. So
frozen entries can have no gradient, no optimizer state and no decay, whatever loop, optimizer or
precision is used, and they stay bit-identical. What cannot be trained so, ``guards`` refuses. A
plain ``{kind: tensor}`` will do for a set of units. Does not know how a model is trained, or on
what.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssah_utils import guards, models, partial_experts, wrappers
from ssah_utils.experts import ExpertsWriter
from ssah_utils.per_unit import PerUnit

PADDING = 64  # sizes of blocks are rounded up to a multiple of it
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def training_only(
    model: nn.Module, trainable: Mapping[str, Tensor], train_rest: bool = False
) -> Iterator[nn.Module]:
    """Inside the block only the given units are parameters; leaving it returns the model, trained.

    Use any loop that takes the model's parameters: Hugging Face ``Trainer``, TRL, accelerate, plain
    torch. Checkpoints written inside are ordinary checkpoints of the whole model.

        with training_only(model, partition.units("redundant")):
            optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
            ...

    ``train_rest`` decides about what belongs to no unit: query and key rows, norms, embeddings,
    language-model head, output biases. Under grouped-query attention, a value row that several
    channels share is trainable only if all of them are. A block is kept in float32 also where the
    model is in bfloat16.

    Make optimizers inside the block, and use them only there: the first step of one made before
    raises ``ValueError``, as does one used afterwards. ``model`` may come in ``torch.compile``,
    ``DataParallel`` or ``DistributedDataParallel``, or be wrapped inside. Under the last, frozen
    entries are sent at every forward, as buffers are: ``forward_sync_buffers=False`` saves that.

    Raises ``ValueError`` for a sharded model (FSDP, DeepSpeed ZeRO-3, tensor parallelism), also
    when it is sharded inside; for a set that is not of the model's shape, leaves nothing to train,
    or is everything; and for a matrix that is shared, quantised or no plain linear map. Raises
    ``TypeError`` for a set of numbers.
    """
    guards.refuse_sharded(model)
    guards.refuse_quantised(model)
    plain = wrappers.unwrapped(model)
    trainable = _checked(plain, trainable)
    if not trainable.any() and not train_rest:
        raise ValueError("nothing to train: the set of trainable units is empty")
    if trainable.all() and train_rest:
        raise ValueError("nothing is frozen: train the model as it is")
    required = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    replaced: list[tuple[nn.Module, str, PartialLinear]] = []  # parent, name there, what is there
    mixtures: list[nn.Module] = []
    pairs: list[tuple[Tensor, nn.Parameter]] = []  # replaced, and by which
    uses = Counter(id(parameter) for _, parameter in plain.named_parameters(remove_duplicate=False))
    watch = None
    try:
        for parameter in plain.parameters():
            parameter.requires_grad_(train_rest)
            parameter.grad = None  # an optimizer would follow it
        for experts, chosen in _mixtures(plain, trainable):
            partial_experts.check_parameters(experts, uses)
            mixtures.append(experts)
            pairs += partial_experts.train_part(experts, chosen)
        for parent, name, trained, dimension in _parts(plain, trainable, train_rest):
            linear = getattr(parent, name)
            _check_matrix(linear, name, uses)
            # All of a float32 matrix needs no block. In a lower precision, only a block keeps small
            # updates.
            if not trained.any() or (trained.all() and linear.weight.dtype == torch.float32):
                linear.weight.requires_grad_(bool(trained.any()))
                if dimension == 0 and linear.bias is not None:
                    linear.bias.requires_grad_(bool(trained.any()))
            else:
                module = PartialLinear(linear, trained, dimension)
                replaced.append((parent, name, module))
                setattr(parent, name, module)
        guards.follow_parameters(model)
        pairs += [pair for _, _, module in replaced for pair in module.replaced()]
        watch = guards.Watch(plain, dict(pairs))
        yield model
        sharded_inside = any(guards.is_sharded(module) for module in plain.modules())
    finally:
        if watch is not None:
            watch.close()
        for parent, name, module in replaced:
            setattr(parent, name, module.merged())
        for experts in mixtures:
            partial_experts.merge(experts)
        # by name: some parameters may have been exchanged inside
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))
        guards.follow_parameters(model)
    if sharded_inside:
        raise ValueError(
            f"{guards.SHARDED}; it was sharded inside the block,"
            " and the units are as in the last forward pass"
        )


@contextmanager
def freezing(
    model: nn.Module, frozen: Mapping[str, Tensor], train_rest: bool = True
) -> Iterator[nn.Module]:
    """Inside the block everything but the given units is trained: ``training_only`` for the others.

    with freezing(model, partition.units("safety")):
        train_sft(model, tokenizer, examples, config)
    """
    guards.refuse_sharded(model)
    guards.refuse_quantised(model)
    frozen = _checked(wrappers.unwrapped(model), frozen)
    if not frozen.any():
        raise ValueError(
            "nothing is frozen: the set of frozen units is empty; train the model as it is"
        )
    if frozen.all() and not train_rest:
        raise ValueError("nothing to train: every unit is frozen")
    with training_only(model, ~frozen, train_rest):
        yield model


def _checked(model: nn.Module, units: Mapping[str, Tensor]) -> PerUnit:
    """The set; ``ValueError`` when it cannot be trained or frozen on the model.

    ``TypeError`` when it is no set.
    """
    if is_partial(model):
        raise ValueError(
            "some units of this model are being trained already: leave that block first"
        )
    return models.check_per_unit(model, units).as_set()


def _check_matrix(linear: nn.Module, name: str, uses: dict[int, int]) -> None:
    """``ValueError`` unless a matrix is a plain linear map with weights of its own.

    ``uses``: how many modules hold each parameter, by its id.
    """
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    parameters = [one for one in (weight, bias) if one is not None]
    if any(uses[id(parameter)] > 1 for parameter in parameters):
        raise ValueError(
            f"the weights of '{name}' are shared with another module,"
            " which would be trained along: untie them"
        )
    is_plain = models.is_linear_map(linear) and "forward" not in vars(linear)
    if not is_plain or not all(isinstance(parameter, nn.Parameter) for parameter in parameters):
        raise ValueError(
            f"'{name}' is a {type(linear).__name__} that computes its output or its weights"
            " in a way of its own: take off what does"
            " (an adapter, a quantiser, a parametrization, a device map) first"
        )


def is_partial(model: nn.Module) -> bool:
    """Whether some units of the model are being trained, inside a block."""
    kinds = (PartialLinear, partial_experts.PartialExperts)
    return any(isinstance(module, kinds) for module in model.modules())


def count_trainable(model: nn.Module) -> int:
    """Entries that an optimizer would change now."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _parts(
    model: nn.Module, trainable: PerUnit, train_rest: bool
) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
    """Every matrix that units own: its parent, its name, its trained entries, their dimension.

    Rows are dimension 0, columns 1.
    """
    shape, architecture = models.shape_of(model), models.architecture_of(model)
    rows_of: dict[tuple[int, str], Tensor] = {}  # trained rows, by block and path of the matrix
    blocks = models.blocks_of(model)
    for writer in models.writers(model):
        if isinstance(writer.module, ExpertsWriter):
            continue
        block, chosen = writer.block, _chosen(trainable, writer)
        parent, _, name = architecture.writers[writer.kind].rpartition(".")
        yield block.get_submodule(parent), name, chosen, 1
        for reader in architecture.readers[writer.kind]:
            n_rows = len(models.column_weight(block.get_submodule(reader.path)))
            none = torch.full((n_rows,), train_rest)
            trained = rows_of.setdefault((writer.layer, reader.path), none)
            rows = reader.rows(shape)
            trained[rows] = models.owned_rows(rows, chosen, n_rows)[rows]
    for (layer, path), trained in rows_of.items():
        parent, _, name = path.rpartition(".")
        yield blocks[layer].get_submodule(parent), name, trained, 0


def _mixtures(model: nn.Module, trainable: PerUnit) -> Iterator[tuple[nn.Module, Tensor]]:
    """The fused experts of every block, and their trained units."""
    for writer in models.writers(model, "mlp"):
        if isinstance(writer.module, ExpertsWriter):
            yield writer.module.experts, _chosen(trainable, writer)


def _chosen(units: PerUnit, writer: models.Writer) -> Tensor:
    """Which of a writer's channels are in a set: (n_channels,) bool."""
    return units[writer.kind][writer.layer, writer.channels].cpu()


class PartialLinear(nn.Module):
    """y = x W^T + b where only some rows (``dimension`` 0) or columns (1) of W are trained.

    ``block`` holds the trained entries: (n_trained, in) for rows, (n_trained, out) for columns.
    ``whole`` is W with the trained dimension first, so that either way the block's entries are rows
    of it in memory.
    """

    whole: Tensor
    trained: Tensor  # indices of the trained rows or columns
    gathered: Tensor
    whole_bias: Tensor

    def __init__(self, linear: nn.Linear, trained: Tensor, dimension: int) -> None:
        """``linear``: an ``nn.Linear``, or GPT-2's ``Conv1D`` in its place."""
        super().__init__()
        # In a list, so that it is no submodule: its parameters are not this model's any more.
        self.linear = [linear]
        self.dimension = dimension
        self.is_stored_whole = models.is_transposed(linear) == (dimension == 1)
        weight, bias = linear.weight.detach(), linear.bias
        whole = weight if self.is_stored_whole else weight.T.contiguous()
        trained = trained.nonzero().squeeze(1).to(weight.device)
        self.register_buffer("whole", whole, persistent=False)
        self.register_buffer("trained", trained, persistent=False)
        block = whole[trained].to(torch.promote_types(weight.dtype, torch.float32))
        self.block = nn.Parameter(block)
        # Gathering columns of activations costs more than it saves when most of them are wanted.
        self.is_minor = len(trained) < len(whole) / 2
        # One size for all blocks of about the same size: matrix kernels are made once per shape,
        # and are fastest for even sizes.
        gathered = nn.functional.pad(trained, (0, -len(trained) % PADDING))
        self.register_buffer("gathered", gathered, persistent=False)
        self.autocast_copy: Tensor | None = None  # the whole weight in the precision of autocast
        self.writer_bias: Tensor | None = None
        self.bias_block: nn.Parameter | None = None
        if bias is not None and dimension == 0:
            self.register_buffer("whole_bias", bias.detach(), persistent=False)
            self.bias_block = nn.Parameter(bias.detach()[trained].to(block.dtype))
        elif bias is not None:
            self.writer_bias = bias  # it belongs to no unit
        for name in HOOKS:  # keep the hooks registered on the original module
            setattr(self, name, getattr(linear, name))
        if not self.is_stored_whole:
            linear.weight.data = weight.new_empty(0)  # one copy is enough

    def replaced(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """The parameters that are replaced inside the block, each with its stand-in."""
        yield self.linear[0].weight, self.block
        if self.bias_block is not None:
            yield self.linear[0].bias, self.bias_block

    @property
    def out_features(self) -> int:
        """Rows of the whole weight as ``nn.Linear`` has it."""
        return self.whole.shape[self.dimension]

    @property
    def in_features(self) -> int:
        """Columns of the whole weight as ``nn.Linear`` has it."""
        return self.whole.shape[1 - self.dimension]

    @property
    def weight(self) -> Tensor:
        """The weight as it stands, (out, in)."""
        whole = self._current(self.whole.dtype)
        return whole if self.dimension == 0 else whole.T

    @property
    def bias(self) -> Tensor | None:
        """The bias as it stands, (out,)."""
        if self.bias_block is None:
            return self.writer_bias
        own = self.bias_block.to(self.whole_bias.dtype)
        return self.whole_bias.index_copy(0, self.trained, own)

    def _current(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in a precision, with the block written into it.

        At every forward: fused optimizers change parameters without counting it in ``_version``, so
        nobody could tell whether a copy is out of date; and autocast casts at every forward, too.
        """
        whole = self.whole
        if dtype != whole.dtype:
            copy = self.autocast_copy
            if copy is None or copy.dtype != dtype or copy.device != whole.device:
                with torch.inference_mode(False):  # it is written to outside of that mode, too
                    copy = self.autocast_copy = whole.to(dtype)
            whole = copy
        with torch.no_grad():
            return whole.index_copy_(0, self.trained, self.block.detach().to(dtype))

    def forward(self, values: Tensor) -> Tensor:
        if guards.is_sharded(self):
            raise ValueError(guards.SHARDED)
        device = values.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else self.whole.dtype
        result = _PartialProduct.apply(values.to(dtype), self.block, self._current(dtype), self)
        if self.bias_block is not None:
            own = self.bias_block.to(dtype)
            result = result + self.whole_bias.to(dtype).index_copy(0, self.trained, own)
        return result if self.writer_bias is None else result + self.writer_bias.to(dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The ordinary module again: the block's entries in their places, all others untouched."""
        linear = self.linear[0]
        is_sharded = guards.is_sharded(self)  # then nobody can read the block here
        whole = self.whole if is_sharded else self._current(self.whole.dtype)
        linear.weight.data = whole if self.is_stored_whole else whole.T.contiguous()
        if self.bias_block is not None:
            bias = self.whole_bias
            if not is_sharded:
                bias.index_copy_(0, self.trained, self.bias_block.to(bias.dtype))
            linear.bias.data = bias
        return linear

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """``to``, ``half`` and the like change frozen entries; the block stays float32 at least."""
        blocks = [block for block in (self.block, self.bias_block) if block is not None]
        before = [block.data for block in blocks]
        super()._apply(fn, recurse)
        for block, data in zip(blocks, before, strict=True):
            block.data = data.to(block.device, torch.promote_types(self.whole.dtype, torch.float32))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """As the ordinary module's, in the block's precision, so that resuming loses nothing."""
        if guards.is_sharded(self):
            raise ValueError(guards.SHARDED)
        dtype = self.block.dtype
        whole = self.whole.to(dtype).index_copy(0, self.trained, self.block.detach())
        destination[prefix + "weight"] = whole if self.is_stored_whole else whole.T.contiguous()
        if self.bias_block is not None:
            bias = self.whole_bias.to(dtype).index_copy(0, self.trained, self.bias_block.detach())
            destination[prefix + "bias"] = bias
        elif self.writer_bias is not None:
            bias = self.writer_bias if keep_vars else self.writer_bias.detach()
            destination[prefix + "bias"] = bias

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        targets: dict[str, tuple[Tensor, Tensor | None]] = {"weight": (self.whole, self.block)}
        if self.bias_block is not None:
            targets["bias"] = (self.whole_bias, self.bias_block)
        elif self.writer_bias is not None:
            targets["bias"] = (self.writer_bias, None)
        ours = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        unexpected += [prefix + name for name in ours if name not in targets]
        for name, (whole, block) in targets.items():
            if prefix + name not in state_dict:
                missing.append(prefix + name)
                continue
            value = state_dict[prefix + name]
            value = value.T if name == "weight" and not self.is_stored_whole else value
            if value.shape != whole.shape:
                shapes = f"{tuple(value.shape)} against {tuple(whole.shape)}"
                errors.append(f"size mismatch for {prefix + name}: {shapes}")
                continue
            whole.copy_(value)
            if block is not None:
                block.copy_(value[self.trained.to(value.device)])
        self.autocast_copy = None

    def extra_repr(self) -> str:
        what = "rows" if self.dimension == 0 else "columns"
        return f"{len(self.trained)} of {len(self.whole)} {what} trained"


class _PartialProduct(torch.autograd.Function):
    """x W^T with the gradient of W for the block alone.

    Of x, only what that gradient needs is kept for the way back.
    """

    @staticmethod
    def forward(ctx, values: Tensor, block: Tensor, whole: Tensor, module: PartialLinear) -> Tensor:
        ctx.module, ctx.whole, ctx.block_dtype = module, whole, block.dtype
        by_columns = module.dimension == 1
        kept = values[..., module.gathered] if by_columns and module.is_minor else values
        # The weight is not saved through autograd: another forward writes the same block into it,
        # which autograd would take for a change.
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None)
        return values @ (whole if by_columns else whole.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (kept,) = ctx.saved_tensors
        module, whole = ctx.module, ctx.whole
        by_columns = module.dimension == 1
        of_values = of_block = None
        if ctx.needs_input_grad[0]:
            of_values = gradient @ (whole.T if by_columns else whole)
        if kept is not None:
            left = kept if by_columns else gradient  # (..., trained dimension)
            right = gradient if by_columns else kept
            if not by_columns and module.is_minor:
                left = left[..., module.gathered]
            product = left.flatten(0, -2).T @ right.flatten(0, -2)
            n_trained = len(module.trained)
            is_minor = module.is_minor
            own = product[:n_trained] if is_minor else product.index_select(0, module.trained)
            of_block = own.to(ctx.block_dtype)
        return of_values, of_block, None, None
