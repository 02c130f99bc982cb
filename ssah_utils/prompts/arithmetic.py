"""Short arithmetic word problems with one right answer, made from a seed, and how one is marked."""

import re

import numpy as np
import pandas as pd

NAMES = tuple(
    (
        "Ana Ben Chen Dina Emil Fatou Goran Hana Ivo Jun Kofi Lena Mara Nils Olga Pablo Rosa Samir"
        " Tara Yusuf"
    ).split()
)
THINGS = tuple(
    (
        "apples books buttons candles coins cookies cups eggs flowers keys marbles nails oranges"
        " pens plates shells stamps stickers stones tickets"
    ).split()
)


def _gains(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = rng.integers(3, 40, 2).tolist()
    text = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
    return text, f"{a} + {b}", a + b


def _loses(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a = int(rng.integers(10, 60))
    b = int(rng.integers(2, a - 1))
    text = (
        f"There are {a} {things} on the table. {name} takes {b} away. How many {things} are left?"
    )
    return text, f"{a} - {b}", a - b


def _packs(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = rng.integers(2, 12, 2).tolist()
    text = f"{name} buys {a} packs of {things}, {b} in each pack. How many {things} is that?"
    return text, f"{a} x {b}", a * b


def _shares(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = rng.integers(2, 12, 2).tolist()
    shared = f"{name} shares {a * b} {things} equally among {a} children."
    return f"{shared} How many does each child get?", f"{a * b} / {a}", b


def _two_steps(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b, c = rng.integers(2, 20, 3).tolist()
    found = f"{name} finds {a} {things} on Monday and {b} on Tuesday, then gives {c} to a friend."
    return f"{found} How many {things} remain?", f"{a} + {b} - {c}", a + b - c


PROBLEM_KINDS = {
    "gain": _gains,
    "loss": _loses,
    "packs": _packs,
    "share": _shares,
    "two-steps": _two_steps,
}


def problems(n: int, seed: int = 0) -> pd.DataFrame:
    """``n`` different problems: prompt, response, category.

    The response is the calculation and its result, the category one of ``PROBLEM_KINDS``.
    """
    rng = np.random.default_rng(seed)
    kinds = list(PROBLEM_KINDS)
    rows: dict[str, dict] = {}
    while len(rows) < n:
        kind = kinds[len(rows) % len(kinds)]
        name, things = str(rng.choice(NAMES)), str(rng.choice(THINGS))
        text, calculation, result = PROBLEM_KINDS[kind](name, things, rng)
        if result > 0:
            response = f"{calculation} = {result}."
            rows.setdefault(text, {"prompt": text, "response": response, "category": kind})
    return pd.DataFrame(rows.values())


def final_number(text: str) -> float | None:
    """The last number in an answer, which is how GSM8K is marked; None if there is none.

    >>> final_number("12 + 8 = 20, so Ana has 1,020.")
    1020.0
    """
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


def is_correct(answer: str, response: str) -> bool:
    """Whether an answer ends in the number in which the reference response ends."""
    expected = final_number(response)
    return expected is not None and final_number(answer) == expected
