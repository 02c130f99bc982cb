"""One value per unit of a model, and sets of units: a type with arithmetic and set operators.

A unit is one input channel of the matrix through which a sub-layer writes to the residual stream:
``o_proj`` (kind ``attention``) or ``down_proj`` (kind ``mlp``). A set of units is a ``PerUnit`` of
bool: True means "in the set", never "masked".

    contrast = z_safety - z_utility
    frozen = safety | top_complex
    trained = ~frozen
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

KINDS = ("attention", "mlp")


class PerUnit(Mapping[str, Tensor]):
    """``{kind: (n_layers, n_channels)}``, kinds in the order of ``KINDS``.

    ``+ - * / < <= > >=`` work entry by entry, with a number or with another ``PerUnit``; ``& | ^
    ~`` work on sets. It is a mapping: ``values["mlp"]`` is the tensor of a kind. Raises
    ``ValueError`` for two of different shape, ``TypeError`` for a set operator on what is no set.

    >>> z = PerUnit({"attention": torch.tensor([[0.0, 2.0]]), "mlp": torch.tensor([[1.0, 3.0]])})
    >>> high = z > 1.5
    >>> high
    PerUnit(attention (1, 2), mlp (1, 2), bool, 2 chosen)
    >>> (high & ~high.only("mlp")).names()
    ['attention/0/1']
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        unknown = [kind for kind in values if kind not in KINDS]
        if unknown or not values:
            found = ", ".join(unknown) or "none"
            raise ValueError(f"values per unit are of the kinds {', '.join(KINDS)}, not {found}")
        for kind, tensor in values.items():
            if tensor.ndim != 2:
                raise ValueError(
                    f"values of kind '{kind}' have shape {tuple(tensor.shape)},"
                    " not (n_layers, n_channels)"
                )
        self._values = {kind: values[kind] for kind in KINDS if kind in values}

    @classmethod
    def of_layers(cls, rows: Mapping[str, Sequence[Tensor]]) -> "PerUnit":
        """From one row per block, on whatever devices: ``{kind: [(n_channels,), ...]}``."""
        return cls({kind: torch.stack([row.cpu() for row in own]) for kind, own in rows.items()})

    def __getitem__(self, kind: str) -> Tensor:
        return self._values[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in self.items())
        dtype = str(next(iter(self.values())).dtype).removeprefix("torch.")
        chosen = f", {self.count():,} chosen" if self.is_set else ""
        return f"PerUnit({shapes}, {dtype}{chosen})"

    # ----------------------------------------------------------------------------------- what it is

    @property
    def is_set(self) -> bool:
        """Whether every value is True or False."""
        return all(tensor.dtype == torch.bool for tensor in self.values())

    def as_set(self) -> "PerUnit":
        """This one; ``TypeError`` unless it is a set."""
        for tensor in self.values():
            if tensor.dtype != torch.bool:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise TypeError(f"a set of units is of bool, not of {dtype}")
        return self

    @property
    def n_units(self) -> int:
        """How many units there are, chosen or not."""
        return sum(tensor.numel() for tensor in self.values())

    def count(self) -> int:
        """How many units are in the set."""
        return sum(int(tensor.sum()) for tensor in self.as_set().values())

    @property
    def share(self) -> float:
        """The set's part of all units, in [0, 1]."""
        return self.count() / self.n_units

    def any(self) -> bool:
        """Whether some unit is in the set."""
        return any(bool(tensor.any()) for tensor in self.values())

    def all(self) -> bool:
        """Whether every unit is in the set."""
        return all(bool(tensor.all()) for tensor in self.values())

    def require_finite(self, what: str) -> "PerUnit":
        """This one; ``ValueError`` where a value is nan or infinite.

        It names the first module, in the order of the model. ``what``: the values in words, in the
        plural.
        """
        places = [
            (layer, kind, bad)
            for kind, values in self.items()
            for layer, bad in enumerate((~values.isfinite()).sum(1).tolist())
        ]
        for layer, kind, n_bad in sorted(places):  # attention comes before mlp
            if n_bad:
                raise ValueError(
                    f"{what} of {n_bad} {kind} units of block {layer} are nan or infinite: measure"
                    " them in bfloat16 or float32, or leave out the data that they come from"
                )
        return self

    def equals(self, other: "PerUnit") -> bool:
        """Whether shapes, types and all values are the same."""
        if self.keys() != other.keys():
            return False
        pairs = [(self[kind], other[kind]) for kind in self]
        return all(one.dtype == two.dtype and torch.equal(one, two) for one, two in pairs)

    # ------------------------------------------------------------------------------- entry by entry

    def map(self, function: Callable[..., Tensor], *others: "PerUnit | float") -> "PerUnit":
        """``function`` of each kind's tensor and of those of ``others``; numbers are handed on."""
        for other in others:
            self._check_like(other)

        def of_kind(kind: str) -> Tensor:
            rest = [other[kind] if isinstance(other, PerUnit) else other for other in others]
            return function(self[kind], *rest)

        return PerUnit({kind: of_kind(kind) for kind in self})

    def where(self, chosen: "PerUnit", otherwise: "PerUnit | float") -> "PerUnit":
        """These values in a set of units, ``otherwise`` elsewhere."""
        return self.map(
            lambda values, mask, rest: torch.where(mask, values, rest), chosen.as_set(), otherwise
        )

    def only(self, kind: str) -> "PerUnit":
        """The set's units of one kind alone, as a set of the same model."""
        if kind not in self:
            raise ValueError(f"there are no units of kind '{kind}' (there: {', '.join(self)})")
        none = self.as_set().empty_set()
        return PerUnit({other: (self if other == kind else none)[other] for other in self})

    def empty_set(self) -> "PerUnit":
        """No unit of the same model."""
        return self.map(lambda tensor: torch.zeros_like(tensor, dtype=torch.bool))

    def flatten(self) -> Tensor:
        """All units in one vector, kind by kind, block by block: (n_units,)."""
        return torch.cat([tensor.flatten() for tensor in self.values()])

    def unflatten(self, flat: Tensor) -> "PerUnit":
        """Values (n_units,) in the order of ``flatten``, in this one's shape."""
        if flat.shape != (self.n_units,):
            raise ValueError(f"{tuple(flat.shape)} values were given for {self.n_units} units")
        parts = flat.split([tensor.numel() for tensor in self.values()])
        pairs = zip(self.items(), parts, strict=True)
        return PerUnit({kind: part.view(like.shape) for (kind, like), part in pairs})

    def names(self) -> list[str]:
        """Every unit of the set as kind/layer/channel."""
        return [
            f"{kind}/{layer}/{channel}"
            for kind, chosen in self.items()
            for layer, channel in chosen.nonzero().tolist()
        ]

    def _check_like(self, other: "PerUnit | float") -> None:
        if isinstance(other, PerUnit) and self._shapes() != other._shapes():
            raise ValueError(
                f"values of different models: {self._shapes()} against {other._shapes()}"
            )

    def _shapes(self) -> list[tuple]:
        return [(kind, *tensor.shape) for kind, tensor in self.items()]

    def _with(self, other: object, function: Callable[..., Tensor]) -> "PerUnit":
        if not isinstance(other, PerUnit | int | float):
            return NotImplemented
        return self.map(function, other)

    def _of_sets(self, other: object, function: Callable[..., Tensor]) -> "PerUnit":
        if not isinstance(other, PerUnit):
            return NotImplemented
        return self.as_set().map(function, other.as_set())

    def __add__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.add)

    __radd__ = __add__

    def __sub__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.sub)

    def __mul__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.div)

    def __neg__(self) -> "PerUnit":
        return self.map(torch.neg)

    def __lt__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.lt)

    def __le__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.le)

    def __gt__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.gt)

    def __ge__(self, other: "PerUnit | float") -> "PerUnit":
        return self._with(other, torch.ge)

    def __and__(self, other: "PerUnit") -> "PerUnit":
        return self._of_sets(other, torch.logical_and)

    def __or__(self, other: "PerUnit") -> "PerUnit":
        return self._of_sets(other, torch.logical_or)

    def __xor__(self, other: "PerUnit") -> "PerUnit":
        return self._of_sets(other, torch.logical_xor)

    def __invert__(self) -> "PerUnit":
        return self.as_set().map(torch.logical_not)

    # Two are compared by ``equals``: like ``<``, ``==`` would have to give one value per unit.
    __eq__ = object.__eq__
    __hash__ = object.__hash__
