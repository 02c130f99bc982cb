"""The paper's claims against stored results: what the claims file says, which numbers it points at,
which verdict follows.

Knows tables and claims only. Loads no model and measures nothing.

A claim of ``data/claims.yaml`` names its numbers by selectors into stored tables and decides by two
expressions over them. They are arithmetic and comparisons of named numbers, nothing else: what else
is written there is refused when it is read.
"""

import ast
import datetime
import difflib
import math
import operator
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import yaml

from ssah_utils import paper
from ssah_utils.files import DATA
from ssah_utils.pipeline.stored import Stored

FILE = DATA / "claims.yaml"
CLAIM_VERDICTS = ("replicated", "partly", "not replicated", "not measured")
AGGREGATES = ("mean", "min", "max")
DRAWS = ("seed", "draw")  # columns that count draws of the same thing
SHARES = ("asr", "coherent_asr", "refused", "complied", "degenerate", "accuracy")  # metrics
STORED_FIELDS = (
    *("id", "claim", "source", "paper", "ours", "ci_low", "ci_high", "control", "n_seeds"),
    *("verdict", "experiment", "unit", "ours_seeds", "note", "toward"),
    *("runs", "runs_agree", "tested", "p", "p_holm", "p_bh", "changed"),
)
OURS = frozenset({"ours", "low", "high"})  # names of our number and its interval in a rule
Tables = dict[str, Stored]
ARITHMETIC = (  # what a rule may consist of
    *(ast.Expression, ast.Name, ast.Load, ast.Constant),
    *(ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div),
)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda above, below: above / below if below else math.nan,
}
COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Selector:
    """One number of a stored table: the column ``value`` of the row where ``where`` holds. Several
    rows need an ``aggregate``.

    ``min`` and ``max`` take one row with its interval, ``mean`` has the interval of the mean
    (``selecting.estimate``). ``last``: only rows with the largest value of that column. ``scale``
    multiplies. ``otherwise``: the value where the rows hold none.
    """

    stage: str
    table: str
    value: str
    low: str = ""
    high: str = ""
    where: dict = field(default_factory=dict)
    last: str = ""
    aggregate: str = ""
    scale: float = 1.0
    otherwise: float | None = None

    @property
    def has_interval(self) -> bool:
        return bool(self.low and self.high) or self.aggregate == "mean"

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which values it must lie: shares from 0 to 1, their differences from -1 to 1."""
        if self.where.get("metric") not in SHARES:
            return -math.inf, math.inf
        return (-self.scale if self.value == "difference" else 0.0), self.scale


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, where its numbers are and the rules that decide it. When these were
    written is said at the head of the claims file.
    """

    id: str
    experiment: str
    claim: str
    source: str
    paper: str
    ours: Selector
    replicated: str
    partly: str = ""
    unit: str = ""
    control: Selector | float | None = None
    numbers: dict[str, Selector] = field(default_factory=dict)
    n_seeds: Selector | int = 1
    given: dict[str, dict] = field(default_factory=dict)  # by stage, what the claim speaks of
    only_if: str = ""  # a rule without which the claim is not measured: its positive control
    requests: str = ""  # the parameter of its stage that says over how many requests it goes
    added: str = ""  # the date on which the claim was written down, where it is a later one
    changed: tuple[str, ...] = ()  # "DATE: reason" of each change after a result was seen

    @property
    def stage(self) -> str:
        """The notebook whose result our number is."""
        return self.ours.stage

    @property
    def selectors(self) -> dict[str, Selector | float]:
        """Everything a rule may name, by name."""
        return {
            "ours": self.ours,
            **({} if self.control is None else {"control": self.control}),
            **self.numbers,
        }


# ------------------------------------------------------------------------------------------ reading


def load_claims(path: Path = FILE) -> list[Claim]:
    """The claims of a file; ``ValueError`` has one line per claim that is not valid: file, claim,
    field, what to write.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must be a list of claims, each with {', '.join(required(Claim))}")
    claims, problems = [], []
    for position, entry in enumerate(content, 1):
        name = entry.get("id") if isinstance(entry, dict) else None
        name = name or f"number {position}"
        try:
            if any(claim.id == name for claim in claims):
                raise ValueError("field 'id': used twice")
            claims.append(read_claim(entry))
        except ValueError as error:
            problems.append(f"{Path(path).name}, claim '{name}', {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return claims


def read_claim(entry: object) -> Claim:
    """A claim from its YAML mapping; ``ValueError`` begins with the field that is wrong."""
    values = dict(checked(entry, Claim, ""))
    try:
        values["paper"] = paper.fill(values["paper"])
    except LookupError as error:
        raise ValueError(f"field 'paper': {error.args[0]}") from error
    values["ours"] = read_selector(values["ours"], "ours")
    numbers = values.get("numbers", {})
    if not isinstance(numbers, dict):
        raise ValueError("field 'numbers': a mapping of names to selectors is needed")
    given = values.get("given", {})
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise ValueError(
            f"field 'given': a mapping of stages to their parameters is needed, not {given!r}"
        )
    values["numbers"] = {
        name: read_selector(number, f"numbers.{name}") for name, number in numbers.items()
    }
    for name in ("control", "n_seeds"):
        if isinstance(values.get(name), dict):
            values[name] = read_selector(values[name], name)
        elif values.get(name) is None:  # left out or empty
            values.pop(name, None)
        elif not isinstance(values[name], (int, float)):
            raise ValueError(
                f"field '{name}': a selector or a number is needed, not {values[name]!r}"
            )
    values["changed"] = tuple(read_change(one) for one in read_list(values, "changed"))
    if "added" in values:
        values["added"] = read_date(values["added"], "added")
    claim = Claim(**values)
    for name in ("replicated", "partly", "only_if"):
        check_rule(getattr(claim, name), known_numbers(claim), name)
    return claim


def read_list(values: dict, name: str) -> list:
    found = values.get(name, [])
    if not isinstance(found, list):
        raise ValueError(f"field '{name}': a list is needed, not {found!r}")
    return found


def read_change(entry: object) -> str:
    """``DATE: reason`` of one change of a rule; ``ValueError`` says what is wrong with it."""
    names = {"date", "reason"}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ValueError(
            f"field 'changed': mappings with date and reason are needed, not {entry!r}"
        )
    reason = entry["reason"]
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(f"field 'changed.reason': text is needed, not {reason!r}")
    return f"{read_date(entry['date'], 'changed.date')}: {reason.strip()}"


def read_date(value: object, name: str) -> str:
    """A date in the form 2026-11-26; ``ValueError`` names the field where it is none."""
    try:
        found = datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        found = ""
    if found != str(value):
        raise ValueError(f"field '{name}': a date such as 2026-11-26 is needed, not {str(value)!r}")
    return found


def required(kind: type) -> list[str]:
    return [
        one.name
        for one in fields(kind)
        if one.default is MISSING and one.default_factory is MISSING
    ]


def checked(entry: object, kind: type, inside: str) -> dict:
    """``entry`` if it is a mapping with the fields of a dataclass, texts where texts belong."""
    prefix = f"{inside}." if inside else ""
    if not isinstance(entry, dict):
        raise ValueError(
            f"field '{inside or 'id'}': a mapping with {', '.join(required(kind))} is needed, not"
            f" {entry!r}"
        )
    names = [one.name for one in fields(kind)]
    for name in entry:
        if name not in names:
            raise ValueError(f"field '{prefix}{name}': unknown{nearest(name, names)}")
    for one in fields(kind):
        if one.name not in entry and one.name in required(kind):
            raise ValueError(f"field '{prefix}{one.name}': missing")
        if one.type is str and one.name != "added" and not isinstance(entry.get(one.name, ""), str):
            raise ValueError(
                f"field '{prefix}{one.name}': text is needed, not {entry[one.name]!r} (put it in"
                " quotes)"
            )
    return entry


def read_selector(entry: object, name: str) -> Selector:
    """A selector as it stands in the file; ``ValueError`` names the field that is wrong."""
    selector = Selector(**checked(entry, Selector, name))
    if not isinstance(selector.where, dict):
        raise ValueError(
            f"field '{name}.where': a mapping of columns to values is needed, not"
            f" {selector.where!r}"
        )
    if selector.aggregate not in ("", *AGGREGATES):
        raise ValueError(
            f"field '{name}.aggregate': one of {', '.join(AGGREGATES)} is needed, not"
            f" '{selector.aggregate}'"
        )
    if bool(selector.low) != bool(selector.high):
        raise ValueError(f"field '{name}': low and high belong together")
    if not isinstance(selector.scale, (int, float)):
        raise ValueError(f"field '{name}.scale': a number is needed, not {selector.scale!r}")
    return selector


def known_numbers(claim: Claim) -> list[str]:
    """Names a claim's rules may use: ours, control and further numbers, ends of their intervals
    where they have one.
    """
    names = []
    for name, selector in claim.selectors.items():
        names.append(name)
        if isinstance(selector, Selector) and selector.has_interval:
            names += ["low", "high"] if name == "ours" else [f"{name}_low", f"{name}_high"]
    return names


def check_rule(rule: str, known: list[str], name: str) -> None:
    """Refuse an expression that is not arithmetic over known numbers."""
    if not rule:
        return
    try:
        tree = ast.parse(rule, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"field '{name}': '{rule}' is not an expression ({error.msg})") from error
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and not isinstance(node.value, (int, float))
        if is_text or not isinstance(node, ARITHMETIC):
            what = f"'{ast.unparse(node)}' is neither a number nor arithmetic nor a comparison"
            raise ValueError(f"field '{name}': {what}")
        if isinstance(node, ast.Name) and node.id not in known:
            raise ValueError(f"field '{name}': unknown number '{node.id}'{nearest(node.id, known)}")
    if not isinstance(tree.body, (ast.Compare, ast.BoolOp)):
        raise ValueError(f"field '{name}': '{rule}' compares nothing")


def nearest(name: object, known: Iterable) -> str:
    known = [str(one) for one in known]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
    if not near:
        return "; there is none"
    return f"; nearest is '{near[0]}' (there are: {', '.join(known[:12])})"


# ---------------------------------------------------------------------------------------- direction


def toward(claim: Claim) -> str:
    """Where the claim wants our number: ``more`` or ``less``, as its rule compares it; ``""`` where
    it wants neither, or a number in between.

    Found by moving ours, with its interval, in every comparison of ``replicated`` that names it.
    """
    wanted = set()
    for node in ast.walk(ast.parse(claim.replicated, mode="eval")):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for (left, right), sign in zip(pairwise(sides), node.ops, strict=True):
                wanted.add(_wanted(left, right, isinstance(sign, ast.Gt | ast.GtE)))
    wanted -= {""}
    return wanted.pop() if len(wanted) == 1 else ""


def _wanted(left: ast.AST, right: ast.AST, greater: bool) -> str:
    """Which way ours must move so that ``left > right``, or ``left < right``, becomes true."""
    before, after = (_excess(left, right, ours) for ours in (1.0, 2.0))
    if before == after:
        return ""
    return "more" if (after > before) == greater else "less"


def _excess(left: ast.AST, right: ast.AST, ours: float) -> float:
    """``left - right``, every number but ours being 1."""
    nodes = [*ast.walk(left), *ast.walk(right)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    values = dict.fromkeys(names, 1.0) | dict.fromkeys(OURS, ours)
    return evaluated(left, values) - evaluated(right, values)


def holds(rule: str, names: dict[str, float]) -> bool:
    """Whether a checked rule is true; a comparison with a missing number (NaN) is false."""
    return bool(rule) and _is_true(ast.parse(rule, mode="eval").body, names)


def _is_true(node: ast.AST, names: dict[str, float]) -> bool:
    if isinstance(node, ast.BoolOp):
        joined = all if isinstance(node.op, ast.And) else any
        return joined(_is_true(part, names) for part in node.values)
    values = [evaluated(side, names) for side in (node.left, *node.comparators)]
    pairs = zip(pairwise(values), node.ops, strict=True)
    return all(COMPARISONS[type(sign)](left, right) for (left, right), sign in pairs)


def evaluated(node: ast.AST, values: dict[str, float]) -> float:
    """Arithmetic of a checked rule over named numbers."""
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -evaluated(node.operand, values)
    left, right = (evaluated(side, values) for side in (node.left, node.right))
    return OPERATORS[type(node.op)](left, right)
