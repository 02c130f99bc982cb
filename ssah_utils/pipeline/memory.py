"""How much memory a computation takes beside the weights, found by shapes alone.

The computation is run by torch's fake tensors: every operation tells the shape of its result, none
is computed and no memory is taken. What is alive at each moment is added up. Not seen are a
library's own buffers and what an allocator keeps without using it. Knows models by their
configurations. Reads no weights.
"""

import copy
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache, PretrainedConfig

from ssah_utils import activations, models
from ssah_utils.display import first_line
from ssah_utils.loading import auto_class, without_weights

Work = Callable[[nn.Module], object]
SHALLOW = (2, 4)  # blocks of the models that are run in place of deeper ones
ADAM = 2  # moments that AdamW keeps of each trained number


class Alive(TorchDispatchMode):
    """Bytes of all tensors that are alive inside the block, ``now`` and at their ``peak``.

    Storage that was there before, such as weights, counts nothing.
    """

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in (*before.parameters(), *before.buffers()):
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            n_bytes = storage.nbytes()
            self.known[storage] = True
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, n_bytes)

    def _forget(self, n_bytes: int) -> None:
        self.now -= n_bytes


@dataclass(frozen=True)
class Shapes:
    """A model by its shapes: what it holds, and what its work takes.

    * ``dtype``: in which it computes.
    * ``attention``: its implementation; empty: what transformers chooses.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    attention: str = ""

    def peak(self, work: Work, is_autocast: bool = False) -> int:
        """Bytes that ``work(model)`` takes at most, beside weights that are there already.

        Two shallow models of the same shapes tell what a block adds, as blocks are alike.
        ``ValueError`` in one line for a model whose computation depends on values.
        """
        if self.dtype == torch.float32 and models.shape_of(without_weights(self.config)).n_experts:
            # torch tells the shapes of grouped products in bfloat16 alone
            return 2 * replace(self, dtype=torch.bfloat16).peak(work, is_autocast)
        n_layers = self.config.get_text_config(decoder=True).num_hidden_layers
        few = [n for n in SHALLOW if n < n_layers]
        if len(few) < len(SHALLOW):
            return self._peak(n_layers, work, is_autocast)
        one, other = (self._peak(n, work, is_autocast) for n in few)
        return other + (other - one) * (n_layers - few[1]) // (few[1] - few[0])

    def _peak(self, n_layers: int, work: Work, is_autocast: bool) -> int:
        around = torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext()
        config = with_layers(self.config, n_layers)
        try:
            with FakeTensorMode() as mode:
                model = auto_class(config).from_config(config, dtype=self.dtype).eval()
                if self.attention:
                    model.set_attn_implementation(self.attention)
            with mode, Alive(model) as alive, around:
                work(model)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise ValueError(
                f"the memory of '{self.config.model_type}' cannot be told from shapes:"
                f" {first_line(error)}"
            ) from error
        return alive.peak


def with_layers(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """A configuration of the same shapes with fewer blocks."""
    found = copy.deepcopy(config)
    text = found.get_text_config(decoder=True)
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    return found


# --------------------------------------------------------------------------------- kinds of work


def _ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long)


def reading_prompts(batch: int, length: int, n_new: int = 0) -> Work:
    """Read prompts into a KV cache and answer by ``n_new`` tokens, as ``PromptCache.answer``."""

    @torch.no_grad()
    def work(model: nn.Module) -> object:
        cache = DynamicCache()  # which keeps all, as ``PromptCache`` does
        kept = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=_ids(batch, length + max(0, n_new - 1)), **kept).logits
        if n_new:
            logits = model(input_ids=_ids(batch, 1), **kept).logits
        return logits.float(), cache

    return work


def reading_openings(batch: int, length: int, n_read: int) -> Work:
    """Openings side by side after prompts, as ``PromptCache.log_probabilities``."""

    @torch.no_grad()
    def work(model: nn.Module) -> object:
        cache = DynamicCache()  # which keeps all, as ``PromptCache`` does
        kept = {"past_key_values": cache, "use_cache": True}
        first = model(input_ids=_ids(batch, length), logits_to_keep=1, **kept).logits.float()
        mask = torch.zeros(batch, 1, n_read, length + n_read, dtype=model.dtype)
        places = _ids(batch, n_read)
        inputs = {"input_ids": places, "position_ids": places, "attention_mask": mask}
        logits = model(**inputs, **kept).logits
        row = torch.cat([first[0].float(), logits[0].float()])
        return row.log_softmax(-1), cache

    return work


def scoring_responses(batch: int, length: int, n_kept: int) -> Work:
    """The loss of responses: ``evaluation.response_nll``."""

    @torch.no_grad()
    def work(model: nn.Module) -> object:
        logits = model(
            input_ids=_ids(batch, length), use_cache=False, logits_to_keep=n_kept
        ).logits[:, :-1]
        flat = logits.flatten(0, 1)
        chosen = flat.index_select(0, torch.zeros(len(flat), dtype=torch.long)).float()
        return nn.functional.cross_entropy(chosen, _ids(1, len(chosen))[0], reduction="none")

    return work


def choosing(batch: int, length: int) -> Work:
    """Texts of which every position is scored in float32, as lm-evaluation-harness does."""

    @torch.no_grad()
    def work(model: nn.Module) -> object:
        logits = model(input_ids=_ids(batch, length)).logits
        return nn.functional.log_softmax(logits, dim=-1, dtype=torch.float32)

    return work


def taking_moments(batch: int, length: int, n_marked: int) -> Work:
    """``activations.channel_moments`` of one batch, ``n_marked`` positions looked at."""

    @torch.no_grad()
    def work(model: nn.Module) -> object:
        def hook(module, args) -> None:
            rows = torch.zeros(n_marked, dtype=torch.long)
            stream = activations.StreamingMoments()
            stream.update(args[0].flatten(0, -2).index_select(0, rows))

        with unset_fake_temporarily():  # which channels a writer has is read from numbers
            found = [writer.module for writer in models.writers(model)]
            # what fused experts see of their tokens is in no module's input, and no more than it
            modules = [module for module in found if isinstance(module, nn.Module)]
        with models.hooking() as handles:
            for module in modules:
                handles.append(module.register_forward_pre_hook(hook))
            return models.backbone_of(model)(input_ids=_ids(batch, length), use_cache=False)

    return work


def taking_gradients(batch: int, length: int, n_labels: int) -> Work:
    """A backward pass to activations alone, as ``activations.gradient_activation``."""

    def work(model: nn.Module) -> None:
        model.requires_grad_(False)
        track = lambda module, args, output: output.requires_grad_()  # noqa: E731
        model.get_input_embeddings().register_forward_hook(track)
        _loss(model, batch, length, n_labels).backward()

    return work


def training(batch: int, length: int, n_labels: int, trains_rest: bool) -> Work:
    """Forward and backward pass of one step, without the gradients of blocks.

    Each of these is dropped as soon as it is there, so that what is left are activations, and with
    ``trains_rest`` the gradients of the head, which come first, and of the embedding. What is held
    of weights, gradients and moments is ``Trained``'s.
    """

    def work(model: nn.Module) -> None:
        model.train()
        for part in models.blocks_of(model) if trains_rest else [model]:
            for parameter in part.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        _loss(model, batch, length, n_labels).backward()

    return work


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(model: nn.Module, batch: int, length: int, n_labels: int) -> Tensor:
    hidden = models.backbone_of(model)(
        input_ids=_ids(batch, length), use_cache=False
    ).last_hidden_state
    states = hidden.flatten(0, 1).index_select(0, torch.zeros(n_labels, dtype=torch.long))
    logits = models.logits_of(model, states)
    return nn.functional.cross_entropy(logits.float(), _ids(1, n_labels)[0], reduction="sum")


@dataclass(frozen=True)
class Trained:
    """How many numbers of a model are trained, and in how many bytes each is held.

    A trained number is float32, as blocks are (``partial_parameters``), and AdamW keeps two moments
    of it. ``n_frozen`` are the others, in ``dtype``.
    """

    n_trained: int
    n_frozen: int
    dtype: torch.dtype

    @classmethod
    def units_of(
        cls, config: PretrainedConfig, fraction: float, train_rest: bool, dtype: torch.dtype
    ) -> "Trained":
        """A share of the units, and with ``train_rest`` all that belongs to none."""
        everything, owned = n_numbers(config), n_owned(config)
        n_trained = round(fraction * owned) + (everything - owned) * train_rest
        return cls(n_trained, everything - n_trained, dtype)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.n_trained * torch.float32.itemsize + self.n_frozen * self.dtype.itemsize

    @property
    def gradients(self) -> int:
        """Bytes of all gradients, at the end of a backward pass."""
        return self.n_trained * torch.float32.itemsize

    @property
    def moments(self) -> int:
        """Bytes of AdamW's state."""
        return ADAM * self.n_trained * torch.float32.itemsize

    def peak(self, activations: int) -> int:
        """Bytes at most in a step with such activations.

        As gradients come, activations go: either is there as a whole, but not both.
        """
        return self.weights + self.moments + max(activations, self.gradients)


def n_numbers(config: PretrainedConfig) -> int:
    """How many numbers the weights of a model are; those that two modules share count once."""
    return sum(parameter.numel() for parameter in without_weights(config).parameters())


def n_owned(config: PretrainedConfig) -> int:
    """How many of them belong to units: the columns of writers, and the rows of their readers."""
    model = without_weights(config)
    shape, places = models.shape_of(model), {}
    for writer in models.writers(model):
        for module, name, dimensions, own in models.owned_entries(writer, shape):
            parameter = getattr(module, name)
            found = places.setdefault(id(parameter), (parameter, dimensions, set()))
            found[2].update(own.tolist())
    return sum(
        len(own) * parameter.numel() // math.prod(parameter.shape[one] for one in dimensions)
        for parameter, dimensions, own in places.values()
    )
