"""Short arithmetic word problems with one right answer, made from a seed, and how an answer is
marked.

Knows numbers and sentences. Does not know models.
"""

import re

import numpy as np
import pandas as pd

NAMES = (
    "Ana",
    "Ben",
    "Chen",
    "Dina",
    "Emil",
    "Fatou",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mara",
    "Nils",
    "Olga",
    "Pablo",
    "Rosa",
    "Samir",
    "Tara",
    "Yusuf",
)
THINGS = (
    "apples",
    "books",
    "buttons",
    "candles",
    "coins",
    "cookies",
    "cups",
    "eggs",
    "flowers",
    "keys",
    "marbles",
    "nails",
    "oranges",
    "pens",
    "plates",
    "shells",
    "stamps",
    "stickers",
    "stones",
    "tickets",
)


def _gains(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = rng.integers(3, 40, 2).tolist()
    return (
        f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        f"{a} + {b}",
        a + b,
    )


def _loses(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a = int(rng.integers(10, 60))
    b = int(rng.integers(2, a - 1))
    return (
        f"There are {a} {things} on the table. {name} takes {b} away. How many {things} are left?",
        f"{a} - {b}",
        a - b,
    )


def _packs(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = rng.integers(2, 12, 2).tolist()
    return (
        f"{name} buys {a} packs of {things}, {b} in each pack. How many {things} is that?",
        f"{a} x {b}",
        a * b,
    )


def _shares(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = rng.integers(2, 12, 2).tolist()
    return (
        f"{name} shares {a * b} {things} equally among {a} children. How many does each child get?",
        f"{a * b} / {a}",
        b,
    )


def _two_steps(name: str, things: str, rng: np.random.Generator) -> tuple[str, str, int]:
    a, b, c = rng.integers(2, 20, 3).tolist()
    text = (
        f"{name} finds {a} {things} on Monday and {b} on Tuesday, then gives {c} to a friend. How"
        f" many {things} remain?"
    )
    return text, f"{a} + {b} - {c}", a + b - c


PROBLEM_KINDS = {
    "gain": _gains,
    "loss": _loses,
    "packs": _packs,
    "share": _shares,
    "two-steps": _two_steps,
}


def problems(n: int, seed: int = 0) -> pd.DataFrame:
    """``n`` different problems: prompt, response (the calculation and its result), category (the
    kind of problem).
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, dict] = {}
    while len(rows) < n:
        kind = list(PROBLEM_KINDS)[len(rows) % len(PROBLEM_KINDS)]
        text, calculation, result = PROBLEM_KINDS[kind](
            str(rng.choice(NAMES)), str(rng.choice(THINGS)), rng
        )
        if result > 0:
            rows.setdefault(
                text, {"prompt": text, "response": f"{calculation} = {result}.", "category": kind}
            )
    return pd.DataFrame(rows.values())


def final_number(text: str) -> float | None:
    """The last number in an answer, as GSM8K is marked; None if there is none."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


def is_correct(answer: str, response: str) -> bool:
    """Whether an answer ends in the number the reference response ends in."""
    expected = final_number(response)
    return expected is not None and final_number(answer) == expected
