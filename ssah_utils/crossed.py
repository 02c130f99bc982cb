"""The mean over seeds and requests from what every seed stored: interval, p-value, power.

Every seed answers the same requests: the design is crossed. Write the value of seed s on request r
as ``mean + seed_s + request_r + rest_sr``. The mean over k seeds and n requests then varies by
``var(seed) / k + var(request) / n + var(rest) / (k n)``. The spread of the seeds' means, ``S``,
estimates the first and the third term as ``S**2 / k``. A seed's own standard error over requests,
``SE``, holds ``(var(request) + var(rest)) / n``. So

    variance of the mean = S**2 / k + c * SE**2,

c being the share of ``SE**2`` that seeds have in common. This is the variance of two-way clusters
(Cameron, Gelbach and Miller 2011, Journal of Business & Economic Statistics 29, 238). Without
single answers c is unknown; it is taken as 1, its upper bound. More seeds then never shrink what
comes of the choice of requests, and the interval is too wide rather than too narrow. Where every
answer is at hand, as within a run, ``c * SE**2`` is the squared standard error of the requests'
means over seeds (``stats.hierarchical_interval``).

The two parts have different degrees of freedom, so each has its quantile and the half-widths add in
squares (Howe 1974, Journal of the American Statistical Association 69, 789):

    half**2 = (t(k - 1) * S)**2 / k + (z * SE)**2.

``SE`` may differ downward and upward, as half-widths of a Wilson interval do (Zou and Donner 2008,
Statistics in Medicine 27, 1693). With one seed the interval is that seed's own.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from ssah_utils import extras

with extras.needed("eval"):
    from scipy import optimize, special

Z = float(-special.ndtri(0.025))  # of the intervals that are stored
SMALLEST_P = 1e-12
MOST = 100_000  # a design that needs more requests or seeds than this is out of reach


@dataclass(frozen=True)
class CrossedMean:
    """A mean over seeds and requests with what it varies by.

    * ``below``, ``above``: standard error over requests, downward and upward; NaN: not known.
    * ``sd``: standard deviation of the seeds' values; 0 for one seed.
    """

    mean: float
    below: float
    above: float
    sd: float
    n_seeds: int

    @classmethod
    def of(cls, values: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> "CrossedMean":
        """From each seed's value and its own 95% interval (NaN where it has none): all (n_seeds,).

        Raises ``ValueError`` for no value.
        """
        values, lows, highs = (np.asarray(one, dtype=float) for one in (values, lows, highs))
        if len(values) == 0:
            raise ValueError("no values to average")
        if not np.isfinite(values).all():
            return cls(float(values.mean()), math.nan, math.nan, math.nan, len(values))
        sd = values.std(ddof=1) if np.ptp(values) else 0.0
        sides = (_root_mean_square((values - lows) / Z), _root_mean_square((highs - values) / Z))
        return cls(float(values.mean()), *sides, float(sd), len(values))

    @property
    def has_interval(self) -> bool:
        """Whether anything is known of how it varies."""
        return math.isfinite(self.below) or (self.n_seeds > 1 and math.isfinite(self.sd))

    @cached_property
    def of_requests(self) -> float:
        """Standard error over requests, both sides taken together; 0 where it is not known."""
        sides = [side for side in (self.below, self.above) if math.isfinite(side)]
        return _root_mean_square(np.array(sides)) if sides else 0.0

    def interval(
        self, confidence: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
    ) -> tuple[float, float]:
        """Its ends; NaN where nothing is known of how it varies.

        The point itself where all seeds have the same value and none its own interval. An end
        beyond ``bounds`` is put there: no true value lies beyond, so none is lost.
        """
        if not self.has_interval:
            return math.nan, math.nan
        tail = (1 - confidence) / 2
        low, high = (
            half_width(tail, side, self.sd, self.n_seeds) for side in (self.below, self.above)
        )
        low, high = np.clip((self.mean - low, self.mean + high), *bounds)
        return float(low), float(high)

    def p_above(self, null: float = 0.0) -> float:
        """Two-sided p-value of a mean above ``null``; 1 where it is not above.

        Twice the tail at which the interval's lower end reaches ``null``, so it is below 0.05 where
        the 95% interval lies above. NaN where there is no interval.
        """
        if not self.has_interval:
            return math.nan
        excess = self.mean - null
        if excess <= 0:
            return 1.0

        def reach(log_p: float) -> float:
            return half_width(math.exp(log_p) / 2, self.below, self.sd, self.n_seeds) - excess

        if reach(math.log(SMALLEST_P)) <= 0:
            return SMALLEST_P
        return math.exp(optimize.brentq(reach, math.log(SMALLEST_P), 0.0))

    def p_other(self, null: float = 0.0) -> float:
        """Two-sided p-value of a mean other than ``null``, as that of ``p_above``."""
        if self.mean >= null:
            return self.p_above(null)
        mirrored = replace(self, mean=-self.mean, below=self.above, above=self.below)
        return mirrored.p_above(-null)

    # ------------------------------------------------------------------------------------ designs

    def power(self, requests: float = 1.0, n_seeds: int = 0, effect: float | None = None) -> float:
        """Chance that the 95% interval leaves out 0, were the mean as it was found.

        ``requests``: how many times as many as now; ``n_seeds``: 0 means as many as now;
        ``effect``: another mean. The values of seeds and the means over requests are taken as
        normal. NaN where nothing is known of how the mean varies.
        """
        if not self.has_interval:
            return math.nan
        effect = self.mean if effect is None else effect
        k, error = n_seeds or self.n_seeds, self.of_requests / math.sqrt(requests)
        scale = math.hypot(self.sd / math.sqrt(k), error)
        if scale == 0:
            return float(effect != 0)
        if k == 1 or self.sd == 0:
            halves = np.array([half_width(0.025, error, 0.0, 1)])
        else:  # the found spread of k seeds is a scaled chi, whatever their mean
            halves = np.hypot(_quantile(0.025, k) * self.sd * _chi(k) / math.sqrt(k), Z * error)
        right, left = (effect - halves) / scale, (-effect - halves) / scale
        return float((special.ndtr(right) + special.ndtr(left)).mean())

    def smallest_effect(self, power: float = 0.8) -> float:
        """The smallest mean that is seen with this power with the present sizes."""
        if not self.has_interval or not math.isfinite(self.sd):
            return math.nan
        scale = math.hypot(self.sd, self.of_requests)
        if scale == 0:
            return 0.0
        return optimize.brentq(lambda size: self.power(effect=size) - power, 0.0, 100 * scale)

    def requests_needed(self, power: float = 0.8) -> float:
        """How many times as many requests as now see the mean with this power, with these seeds;
        infinite where no number of them does.
        """
        if not self.has_interval or self.of_requests == 0:
            return math.nan
        if self.power(requests=MOST) < power:
            return math.inf
        if self.power(requests=1 / MOST) >= power:
            return 0.0
        return math.exp(
            optimize.brentq(
                lambda log: self.power(requests=math.exp(log)) - power,
                -math.log(MOST),
                math.log(MOST),
            )
        )

    def seeds_needed(self, power: float = 0.8) -> float:
        """How many seeds see the mean with this power on the present requests; infinite where no
        number of them does, NaN where there is one seed: its spread is not known.
        """
        if not self.has_interval or self.n_seeds < 2:
            return math.nan
        if self.power(n_seeds=MOST) < power:
            return math.inf
        few, enough = 1, 2
        while self.power(n_seeds=enough) < power:
            few, enough = enough, 2 * enough
        while enough - few > 1:
            middle = (few + enough) // 2
            few, enough = (few, middle) if self.power(n_seeds=middle) >= power else (middle, enough)
        return float(enough)


def half_width(tail: float, of_requests: float, sd: float, n_seeds: int) -> float:
    """Of the interval that leaves ``tail`` on a side, by the formula above."""
    over_seeds = 0.0
    if n_seeds > 1 and sd > 0:
        over_seeds = _quantile(tail, n_seeds) * sd / math.sqrt(n_seeds)
    over_requests = 0.0 if math.isnan(of_requests) else -special.ndtri(tail) * of_requests
    return math.hypot(over_seeds, over_requests)


def combined(sides: np.ndarray) -> float:
    """Half-width of a sum of independent parts: squares add. NaN where no part has one."""
    sides = np.asarray(sides, dtype=float)
    known = sides[np.isfinite(sides)]
    return float(np.sqrt((known**2).sum())) if len(known) else math.nan


def _root_mean_square(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.sqrt((known**2).mean())) if len(known) else math.nan


def _quantile(tail: float, n_seeds: int) -> float:
    return float(-special.stdtrit(n_seeds - 1, tail))


@cache
def _chi(n_seeds: int) -> np.ndarray:
    """Found over true standard deviation of k normal values, at 400 quantiles of equal weight."""
    at = (np.arange(400) + 0.5) / 400
    return np.sqrt(special.chdtri(n_seeds - 1, 1 - at) / (n_seeds - 1))
