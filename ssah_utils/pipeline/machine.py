"""How fast this machine is, beside the one whose minutes are written down.

Knows matrix products only.
"""

import time
from functools import cache

import torch


@cache
def gflops(dtype: torch.dtype, device: str = "cpu", seconds: float = 2.0) -> float:
    """Speed of a product of large matrices, in GFLOP/s.

    The fastest of those done in ``seconds`` counts: other programs slow some of them down.
    """
    n = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    taken: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(taken) < 3:
        started = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return 2 * n**3 / min(taken) / 1e9


def slowdown(reference: dict, dtype: torch.dtype, device: str = "cpu") -> float:
    """How many times longer than on the ``reference`` machine the same work takes here.

    ``reference``: ``gflops``, the speed of its matrix product in its ``dtype``, and ``beside``, the
    seconds that training spends beside every GFLOP of products. These differ little between
    machines: so one that multiplies ten times as fast is not ten times as fast.
    """

    def seconds(speed: float) -> float:
        return 1 / speed + reference["beside"]

    return seconds(gflops(dtype, device)) / seconds(reference["gflops"])
