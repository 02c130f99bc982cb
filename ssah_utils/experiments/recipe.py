"""What a model can be aligned with. Read where parameters are checked, so it imports no trainer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a model is aligned with.

    * ``learning_rate``, ``steps``, ``batch_size``: of supervised training.
    * ``n_harmful``, ``n_twins``: requests of each kind; a pair of twins has one of both kinds.
    * ``n_refusals``: different refusals that the model may learn to give.
    * ``recovery``: share of the harmful requests that appear a second time, with the first words of
      compliance already said and the refusal behind them. Those words are read, not learned.
    """

    learning_rate: float = 1.0e-4
    steps: int = 200
    batch_size: int = 8
    n_harmful: int = 200
    n_helpful: int = 503
    n_twins: int = 150
    n_refusals: int = 44
    recovery: float = 0.0
