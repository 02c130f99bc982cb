"""What one can do to keep safety while a model is fine-tuned, each in a few lines.

A *defence* is its settings alone, so that it can be part of a cache key. ``hooks_of`` makes of it
what it does in one training (``hooked_training``): to the examples of a batch, the loss, the
gradient, after a step, or to the weights that are kept. All else is as without a defence; one of
strength 0 trains the same model. Besides the caller's models, a defence keeps at most two copies of
what is trained. Elsewhere: frozen units (``unit_training``), adapters (``adapters``).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, logsigmoid

from ssah_utils import sequences, weights
from ssah_utils.hooked_training import HookedTrainer, Hooks, State
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts.tokens import IGNORED
from ssah_utils.sequences import Example
from ssah_utils.settings import SFTConfig, without_dropout

FIRST_TOKENS = 5  # of a response, that ``ConstrainedTokens`` holds more tightly
PIECE = 2**22  # entries of a tensor that are turned into float64 at a time
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer will change."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ----------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Mixed:
    """Some examples are replaced by others, such as refusals, in the order in which they are seen.

    Bianchi et al. (2309.07875): 3% of safety examples suffice for many models, and over-refusal
    rises with more. So many examples are seen as without it, in as many steps, and ``share`` of
    those that are *seen* are replaced, at least one, evenly spread; short trainings see a part of
    their data only. Share 0 replaces none.
    """

    share: float
    examples: list[Example]

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        total = n_seen(len(data), config)
        n = max(1, round(self.share * total)) if self.share else 0
        places = {(2 * row + 1) * total // (2 * n): row for row in range(n)}
        seen = 0

        def batch(examples: list[Example]) -> list[Example]:
            nonlocal seen
            numbers = range(seen, seen + len(examples))
            seen += len(examples)
            return [
                self.examples[places[number] % len(self.examples)] if number in places else one
                for number, one in zip(numbers, examples, strict=True)
            ]

        return Hooks(batch=batch)


def n_seen(n_examples: int, config: SFTConfig) -> int:
    """How many examples a training sees, one that comes again counted again."""
    if config.max_steps <= 0:
        return round(config.epochs * n_examples)
    per_epoch = -(-n_examples // config.batch_size)
    epochs, steps = divmod(config.max_steps, per_epoch)
    return epochs * n_examples + min(steps * config.batch_size, n_examples)


# ----------------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class ConstrainedTokens:
    """Constrained supervised fine-tuning: the first tokens of a response may change least.

    Qi et al. (2406.05946), whose loss has the gradient of the cross-entropy of token t times
    2 (1 - sigmoid(b_t (log p - log p0))), where p0 is the model before training; as in their code,
    at least 1e-3. b_t is ``strength`` (0.1 there), times ``early`` (20) on the first five tokens
    and times ``first`` (5) on the very first. A token that has become likelier is pulled less.
    Strength 0 is the ordinary loss. Keeps a copy of the model.
    """

    strength: float = 0.1
    early: float = 20.0
    first: float = 5.0

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        before = copy.deepcopy(model).eval().requires_grad_(False)

        @torch.no_grad()
        def token_weights(trainer, inputs: dict[str, Tensor], losses: Tensor) -> Tensor:
            logits, labels = trainer.response_logits(before, inputs)
            risen = cross_entropy(logits, labels, reduction="none") - losses
            strengths = self.strengths(token_numbers(inputs["labels"]))
            return token_weight(strengths, risen)

        return Hooks(token_weights=token_weights)

    def strengths(self, numbers: Tensor) -> Tensor:
        """b_t of response tokens, by their numbers from 0."""
        found = torch.full(numbers.shape, self.strength, device=numbers.device)
        found[numbers < FIRST_TOKENS] *= self.early
        found[numbers == 0] = self.strength * self.first
        return found


def token_weight(strengths: Tensor, risen: Tensor) -> Tensor:
    """max(2 (1 - sigmoid(b (log p - log p0))), 1e-3); ``risen``: log p - log p0 of each token."""
    return (2 * logsigmoid(-strengths * risen).exp()).clamp(min=1e-3)


def token_numbers(labels: Tensor) -> Tensor:
    """The number of every label in its response, from 0, in the order of ``response_logits``."""
    is_label = labels[:, 1:] != IGNORED
    return (is_label.cumsum(1) - 1)[is_label]


# ------------------------------------------------------------------------------------- the gradient


@dataclass(frozen=True)
class PulledToStart:
    """The loss plus r/2 |w - w0|^2: L2 regularisation to where training began.

    The proximal term of Huang et al. (Lisa, 2405.18641); the earliest is L2-SP, Li et al.
    (1802.01483). ``units``: of their own entries only, so that what they may turn into is
    *controlled* and not ruled out as by freezing; None pulls everything that is trained. A value
    row that several units share counts once, where any is in the set. Keeps a copy of what is
    pulled.
    """

    strength: float
    units: PerUnit | None = None

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        if self.units is not None:
            return Hooks(gradient=self._pull_of_units(model, self.units))
        return Hooks(gradient=_pull(trained_of(model), self.strength))

    def _pull_of_units(self, model: nn.Module, units: PerUnit) -> Callable[[object], None]:
        pulled = [
            (parameter, view, places, view(parameter.detach())[places].clone())
            for parameter, view, places in weights.unit_entries(model, units)
        ]

        @torch.no_grad()
        def gradient(trainer: object) -> None:
            for parameter, view, places, before in pulled:
                if parameter.grad is not None:
                    moved = view(parameter.detach())[places] - before
                    view(parameter.grad).index_put_(places, self.strength * moved, accumulate=True)

        return gradient


def _pull(
    trained: list[nn.Parameter], strength: float, importance: list[Tensor] | None = None
) -> Callable[[object], None]:
    """Adds strength x importance x (w - w0) to the gradients; w0 is what is there now."""
    start = [parameter.detach().clone() for parameter in trained]

    @torch.no_grad()
    def gradient(trainer: object) -> None:
        for number, (parameter, before) in enumerate(zip(trained, start, strict=True)):
            if parameter.grad is None:
                continue
            moved = parameter.detach() - before
            if importance is not None:
                moved *= importance[number]
            parameter.grad.add_(moved, alpha=strength)

    return gradient


@dataclass(frozen=True)
class ElasticWeights:
    """Elastic weight consolidation: the loss plus l/2 sum F_i (w_i - w0_i)^2.

    Kirkpatrick et al. (1612.00796); for safety, 2512.10150. F is the diagonal of the Fisher
    information on ``examples``, refusals (``fisher``), over its mean, so that ``strength`` is on
    the scale of ``PulledToStart``, which has F = 1 everywhere. Keeps two copies.
    """

    strength: float
    examples: list[Example]

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        trained = trained_of(model)
        found = fisher(model, self.examples)
        n_entries = sum(one.numel() for one in found)
        mean = sum(one.double().sum() for one in found).item() / n_entries
        for one in found:
            one /= mean
        return Hooks(gradient=_pull(trained, self.strength, found))


def fisher(model: nn.Module, examples: list[Example]) -> list[Tensor]:
    """Diagonal of the empirical Fisher information: the mean over examples of the squared gradient
    of log P(response | prompt). One tensor for each of ``trained_of``.
    """
    trained = trained_of(model)
    found = [torch.zeros_like(parameter) for parameter in trained]
    with without_dropout(model):
        for example in examples:
            model.zero_grad()
            batch = sequences.batch_of_examples([example])
            _log_likelihood(model, batch).backward()
            for total, parameter in zip(found, trained, strict=True):
                if parameter.grad is not None:
                    total.addcmul_(parameter.grad, parameter.grad, value=1 / len(examples))
    model.zero_grad()
    return found


def _log_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    marked = labels != IGNORED
    return -cross_entropy(logits[marked], labels[marked], reduction="sum")


@dataclass(frozen=True)
class GradientSurgery:
    """Where the gradient of the task works against that of refusing, that part of it is taken out.

    SafeGrad (2508.07172), after PCGrad (2001.06782): if g_task . g_safe < 0, g_task becomes
    g_task - (g_task . g_safe / |g_safe|^2) g_safe. Every step looks at ``batch_size`` refusals
    (0: at none), one after the other from the first, so it takes about twice as long. Keeps a copy.
    """

    examples: list[Example]
    batch_size: int = 4

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        if not self.batch_size:
            return Hooks()
        trained, begun = trained_of(model), 0

        def gradient(trainer: HookedTrainer) -> None:
            nonlocal begun
            numbers = range(begun, begun + self.batch_size)
            chosen = [self.examples[number % len(self.examples)] for number in numbers]
            begun += self.batch_size
            task = [parameter.grad for parameter in trained]
            model.zero_grad(set_to_none=True)
            trainer.add_gradient(sequences.batch_of_examples(chosen))
            without_conflict(trained, task)

        return Hooks(gradient=gradient)


@torch.no_grad()
def without_conflict(trained: list[nn.Parameter], task: list[Tensor | None]) -> None:
    """Put the gradients of the task in the place of those that are there, less what works against
    them.
    """
    pairs = [(one, parameter.grad) for one, parameter in zip(task, trained, strict=True)]
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    product = sum(_dot(one, other) for one, other in both)
    squared = sum(_dot(other, other) for _, other in both)
    factor = min(0.0, product / squared) if squared else 0.0
    for parameter, one in zip(trained, task, strict=True):
        if one is not None and parameter.grad is not None and factor:
            one.add_(parameter.grad, alpha=-factor)
        parameter.grad = one


def _dot(one: Tensor, other: Tensor) -> float:
    pieces = zip(one.flatten().split(PIECE), other.flatten().split(PIECE), strict=True)
    return sum(float(torch.dot(a.double(), b.double())) for a, b in pieces)


# ----------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class MovingAverage:
    """What is kept is a moving average of the weights, b w' + (1 - b) average after every step.

    2508.12531. It begins at the model before training. b = 1 keeps the last weights. Keeps a copy.
    """

    share: float

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        average = {name: one.clone() for name, one in _numbers(model.state_dict()).items()}

        @torch.no_grad()
        def step() -> None:
            state = model.state_dict()
            for name, one in average.items():
                one.lerp_(state[name].to(one.dtype), self.share)

        return Hooks(step=step, weights=lambda state: average)


@dataclass(frozen=True)
class SafetyVector:
    """RESTA: w + g (w0 - wu) after training, where wu is an unaligned version of the model.

    Bhardwaj et al. (2402.11746). ``drop``: with DARE (2311.03099), which first drops that share of
    the entries of what was learned, w - w0, and scales the others by 1 / (1 - drop). ``is_random``:
    the control, a vector with the same entries in other places of each matrix. Strength 0 with
    nothing dropped keeps the weights. Keeps two copies.
    """

    strength: float
    unaligned: nn.Module
    drop: float = 0.0
    is_random: bool = False

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        generator = torch.Generator().manual_seed(config.seed)
        before = {name: one.clone() for name, one in _numbers(model.state_dict()).items()}
        vector = difference(before, self.unaligned.state_dict())
        if self.is_random:
            for name, one in vector.items():
                places = torch.randperm(one.numel(), generator=generator).to(one.device)
                vector[name] = one.flatten()[places].view_as(one)
        start = before if self.drop else {}
        del before

        def kept(state: State) -> State:
            found = {}
            draws = torch.Generator().manual_seed(config.seed)
            for name, safety in vector.items():
                now = state[name]
                if self.drop:
                    is_kept = torch.rand(now.shape, generator=draws) >= self.drop
                    learned = (now - start[name]) * is_kept.to(now.device) / (1 - self.drop)
                    now = start[name] + learned
                found[name] = now + self.strength * safety
            return found

        return Hooks(weights=kept)


def _numbers(state: State) -> State:
    """Parameters in floating point, each once: one that is tied has the first of its names."""
    numbers = {name: one.detach() for name, one in state.items() if one.is_floating_point()}
    first = {one.data_ptr(): name for name, one in reversed(numbers.items())}
    return {name: one for name, one in numbers.items() if first[one.data_ptr()] == name}


def difference(aligned: State, unaligned: State) -> State:
    """w0 - wu, by name; ``ValueError`` where the unaligned version is none of this model."""
    for name, one in aligned.items():
        if name not in unaligned or unaligned[name].shape != one.shape:
            raise ValueError(f"the unaligned version has no '{name}' of shape {tuple(one.shape)}")
    return {name: one - unaligned[name].to(one) for name, one in aligned.items()}


@dataclass(frozen=True)
class SafeLoRA:
    """LoRA whose layers are projected on the direction of alignment, where they leave it.

    Hsu et al. (2405.16833): with V = w0 - wu of a layer and P = V V^T / |V|_F, B becomes P B where
    cos(P B A, B A) is at most ``threshold``. P as published is no projection: it is not idempotent,
    and its size is that of V, so a layer that is "projected" by a small V nearly vanishes. At -1.1
    no layer is. For a model with LoRA of ``adapters``; wu is the ``unaligned`` version.
    """

    threshold: float
    unaligned: nn.Module

    def hooks(self, model: nn.Module, data: list[Example], config: SFTConfig) -> Hooks:
        unaligned = self.unaligned.state_dict()
        layers = [name for name in model.state_dict() if name.endswith(LORA_B)]
        if not layers:
            raise ValueError("SafeLoRA needs a model with LoRA: give the adapter 'lora'")

        def kept(state: State) -> State:
            found = {}
            for name in layers:
                layer = name.removesuffix(LORA_B)
                plain = layer.removeprefix("base_model.model.")
                vector = state[f"{layer}.base_layer.weight"] - unaligned[f"{plain}.weight"].to(
                    state[name]
                )
                if vector.shape[0] != len(state[name]):  # GPT-2's matrices are (in, out)
                    vector = vector.T
                found[name] = safe_b(state[name], state[f"{layer}{LORA_A}"], vector, self.threshold)
            return found

        return Hooks(weights=kept)


@torch.no_grad()
def safe_b(b: Tensor, a: Tensor, vector: Tensor, threshold: float) -> Tensor:
    """B of a LoRA layer (d_out, r), or P B where cos(P B A, B A) is at most ``threshold``."""
    projected = vector @ (vector.T @ b) / vector.norm()
    before, after = (b @ a).flatten(), (projected @ a).flatten()
    cosine = cosine_similarity(before, after, dim=0)
    return projected if cosine <= threshold else b


# ---------------------------------------------------------------------------------------- together


@dataclass(frozen=True)
class Together:
    """Several defences in one training, in this order."""

    parts: tuple["Defence", ...]


Defence = (
    Mixed
    | ConstrainedTokens
    | PulledToStart
    | ElasticWeights
    | GradientSurgery
    | MovingAverage
    | SafetyVector
    | SafeLoRA
    | Together
)


def hooks_of(
    defence: Defence | None, model: nn.Module, data: list[Example], config: SFTConfig
) -> list[Hooks]:
    """What a defence does in a training of ``model``, as it stands, on ``data``.

    Called where everything that is to be frozen or added is so already. ``TypeError`` for what is
    not of this module, whose code no cache key would know.
    """
    if defence is None:
        return []
    if not isinstance(defence, Defence):
        raise TypeError(f"a {type(defence).__name__} is no defence: write it in {__name__}")
    if isinstance(defence, Together):
        return [one for part in defence.parts for one in hooks_of(part, model, data, config)]
    return [defence.hooks(model, data, config)]
