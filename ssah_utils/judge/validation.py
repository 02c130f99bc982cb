"""How good the judge is: against labels by people, and against gibberish made from real answers.

Knows text and labels; of models only the base, which answers, breaks and rates the cases.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import evaluation, extras, interventions, units, weights
from ssah_utils.judge.labels import answer_id
from ssah_utils.judge.rules import (
    MAX_DEGENERACY,
    REPETITION_WEIGHT,
    degeneracy,
    has_refusal_substring,
    is_refusal,
    repetition,
)
from ssah_utils.stats import auc_interval, case_interval, proportion_interval

with extras.needed("eval"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import cohen_kappa_score

PARTS = ("development", "test")
CORRUPTIONS = ("words shuffled", "words looped", "characters replaced")
ABLATED_SHARES = (0.15, 0.25, 0.4)  # of all units, at random: enough to break a model
CASE_TOKENS = 48  # of an answer that was not generated here
REAL, LIMIT = "real", "telegram style"
CONSTANTS = ("REPETITION_WEIGHT", "MAX_DEGENERACY")

# ------------------------------------------------------------------------------- cases of gibberish


def corrupted(text: str, kind: str, rng: np.random.Generator) -> str:
    """Gibberish made from a real answer, of one of the kinds of ``CORRUPTIONS``.

    Of about its length; loops are of 32 words at least.
    """
    words = text.split()
    if not words:
        return text
    if kind == "words shuffled":
        return " ".join(rng.permutation(words))
    if kind == "words looped":
        period = min(int(rng.integers(1, 5)), len(words))
        return " ".join(words[position % period] for position in range(max(len(words), 32)))
    if kind == "characters replaced":
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789#%&*"))
        replace = lambda char: rng.random() < 0.4 and char != " "  # noqa: E731
        return "".join(str(rng.choice(letters)) if replace(char) else char for char in text)
    raise ValueError(f"unknown kind of gibberish '{kind}' (there: {', '.join(CORRUPTIONS)})")


def shortened(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], n_tokens: int = CASE_TOKENS
) -> list[str]:
    """The first tokens of each text, as text."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids[:n_tokens] for text in texts]
    return tokenizer.batch_decode(ids)


def ablated_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Answers of a model with random units switched off, in every sub-layer the same number.

    One entry for each of ``ABLATED_SHARES``: {"ablated 15%": answers to ``prompts``, ...}.
    """

    def evenly(norm: Tensor, share: float) -> Tensor:
        return (torch.arange(norm.shape[1]) < share * norm.shape[1]).expand_as(norm)

    norms, generator = weights.squared_column_norms(model), torch.Generator().manual_seed(seed)
    answers = {}
    for share in ABLATED_SHARES:
        drawn = units.random_units(norms.map(evenly, share), generator)
        with interventions.ablated(model, drawn):
            answers[f"ablated {share:.0%}"] = evaluation.generate(
                model, tokenizer, prompts, max_new_tokens
            )
    return answers


def gibberish_cases(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    real: pd.DataFrame,
    ablated: Mapping[str, list[str]],
    limit: pd.DataFrame,
    seed: int = 0,
) -> pd.DataFrame:
    """Real answers, gibberish made from them and gibberish of a broken model, as the judge sees
    them.

    ``real`` and ``limit``: rendered ``prompt`` and ``text``; ``limit`` are real answers as
    improbable as gibberish, which show the limit of the rule and choose nothing. ``ablated``:
    answers to the first requests of ``real``, by kind. Columns: kind, row (of the answer it was
    made from), prompt, text, base_nll, repetition, gibberish, part. What is made of one answer
    stands in one part.
    """
    rng = np.random.default_rng(seed)
    texts = {REAL: real["text"].tolist()}
    for kind in CORRUPTIONS:
        texts[kind] = [corrupted(text, kind, rng) for text in texts[REAL]]
    texts |= ablated
    rows = [(kind, row, text) for kind, part in texts.items() for row, text in enumerate(part)]
    cases = pd.DataFrame(rows, columns=["kind", "row", "text"])
    cases["prompt"] = real["prompt"].to_numpy()[cases["row"]]
    cases["part"] = np.where(cases["row"] % 2 == 0, *PARTS)
    extremes = limit[["prompt", "text"]].assign(
        kind=LIMIT, row=range(len(real), len(real) + len(limit)), part="limit"
    )
    cases = pd.concat([cases, extremes], ignore_index=True)
    asked, said = cases["prompt"].tolist(), cases["text"].tolist()
    return cases.assign(
        base_nll=evaluation.response_nll(base, tokenizer, asked, said),
        repetition=cases["text"].map(repetition),
        gibberish=~cases["kind"].isin([REAL, LIMIT]),
    )


# --------------------------------------------------------------------------------- gibberish, found


def fit_degeneracy(cases: pd.DataFrame) -> tuple[float, float]:
    """Weight of repetition and threshold, in nats per token, that tell gibberish best.

    ``cases``: text, base_nll, gibberish (True/False). Both are coefficients of a logistic
    regression on base_nll and repetition, divided by that of the NLL.
    """
    cases = cases[cases["base_nll"].notna()]
    features = np.column_stack([cases["base_nll"], cases["text"].map(repetition)])
    scale = features.std(0)  # so that the penalty treats both alike
    fitted = LogisticRegression(class_weight="balanced").fit(features / scale, cases["gibberish"])
    (slope, weight), offset = fitted.coef_[0] / scale, fitted.intercept_[0]
    return float(weight / slope), float(-offset / slope)


def gibberish_table(cases: pd.DataFrame) -> pd.DataFrame:
    """How well ``degeneracy`` tells each kind of gibberish from real answers.

    ``cases``: part, kind, text, base_nll, gibberish. A row per part and kind of gibberish, and one
    for "all" of them; a part without gibberish has one row, its specificity. Columns: part, kind,
    n, n_real, auc, low, high, and at the threshold ``MAX_DEGENERACY`` sensitivity and specificity,
    each with its Wilson interval (_low, _high).
    """
    answers = zip(cases["text"], cases["base_nll"], strict=True)
    cases = cases.assign(score=[degeneracy(*answer) for answer in answers])
    records = []
    for part, rows in cases.groupby("part", sort=False):
        real, broken = rows[~rows["gibberish"]], rows[rows["gibberish"]]
        for kind, group in [("all", broken), *broken.groupby("kind", sort=False)]:
            scores = np.concatenate([group["score"], real["score"]])
            area = auc_interval(scores, np.arange(len(scores)) < len(group))
            kind = kind if len(group) else real["kind"].iloc[0]
            record = {"part": part, "kind": kind, "n": len(group), "n_real": len(real)}
            record |= dict(zip(("auc", "low", "high"), area, strict=True))
            found = {
                "sensitivity": group["score"] > MAX_DEGENERACY,
                "specificity": real["score"] <= MAX_DEGENERACY,
            }
            for name, right in found.items():
                share = proportion_interval(right) if len(right) else (float("nan"),) * 3
                record |= dict(zip((name, f"{name}_low", f"{name}_high"), share, strict=True))
            records.append(record)
    return pd.DataFrame(records)


def constants_table(cases: pd.DataFrame) -> pd.DataFrame:
    """The constants of ``degeneracy`` as stored here and as the development half of ``cases``
    chooses them: constant, stored, chosen.
    """
    weight, threshold = fit_degeneracy(cases[cases["part"] == PARTS[0]])
    return pd.DataFrame(
        {
            "constant": list(CONSTANTS),
            "stored": [REPETITION_WEIGHT, MAX_DEGENERACY],
            "chosen": [weight, threshold],
        }
    )


def changed_verdicts(cases: pd.DataFrame, constants: pd.DataFrame) -> float:
    """Share of ``cases`` that are gibberish under one column of ``constants_table`` and not under
    the other. A case without any token is gibberish under both.
    """
    weight, threshold = (constants.set_index("constant").loc[name] for name in CONSTANTS)
    said = []
    for column in ("stored", "chosen"):
        score = cases["base_nll"] + weight[column] * cases["repetition"]
        said.append(score.isna() | (score > threshold[column]))
    return float((said[0] != said[1]).mean())


# ----------------------------------------------------------------------------------------- refusals


def labelled_refusals(
    halves: Mapping[str, pd.DataFrame], held_out: Mapping[str, bool]
) -> pd.DataFrame:
    """Answers labelled by people, with what each judge says of them.

    ``halves``: tables of prompt, response and category ("1": people call it a refusal), by part.
    ``held_out``: of ``chat_agreement.held_out_refusals``, since the learned judge was fitted on
    these answers. Adds part, label, ``learned``, ``rules`` and ``substring list``, the judge of
    attack papers.
    """
    parts = [table.assign(part=part) for part, table in halves.items()]
    rows = pd.concat(parts, ignore_index=True)
    answers = zip(rows["response"], rows["prompt"], strict=True)
    rows["label"] = rows["category"] == "1"
    pairs = zip(rows["prompt"], rows["response"], strict=True)
    rows["learned"] = [held_out[answer_id(*pair)] for pair in pairs]
    rows["rules"] = [is_refusal(response, request) for response, request in answers]
    rows["substring list"] = rows["response"].map(has_refusal_substring)
    return rows


def refusal_table(labelled: pd.DataFrame, judges: list[str]) -> pd.DataFrame:
    """Precision, recall and F1 of judges against labels by people.

    ``labelled``: part, label (True: refusal) and one True/False column per judge. Columns: judge,
    part, n, precision, recall, f1, and low and high of F1, a bootstrap over answers.
    """
    records = []
    for judge in judges:
        for part in (*PARTS, "all"):
            rows = labelled if part == "all" else labelled[labelled["part"] == part]
            found, label = rows[judge].to_numpy(dtype=bool), rows["label"].to_numpy(dtype=bool)
            hits = (found & label).sum()
            precision, recall = hits / max(found.sum(), 1), hits / max(label.sum(), 1)
            f1 = case_interval(_f1, found, label)
            records.append((judge, part, len(rows), precision, recall, *f1))
    columns = ["judge", "part", "n", "precision", "recall", "f1", "low", "high"]
    return pd.DataFrame(records, columns=columns)


def _f1(found: np.ndarray, label: np.ndarray) -> float:
    return 2 * (found & label).sum() / max(found.sum() + label.sum(), 1)


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How often two judges say the same, also beyond chance.

    Returns n, agreement (Wilson: agreement_low, agreement_high), and Cohen's kappa with its
    bootstrap interval over answers (kappa, low, high); NaN where both judges say one thing only.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    same, same_low, same_high = proportion_interval(first == second)
    kappa, low, high = case_interval(_kappa, first, second)
    return {
        "n": len(first),
        "agreement": same,
        "agreement_low": same_low,
        "agreement_high": same_high,
        "kappa": kappa,
        "low": low,
        "high": high,
    }


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    if len(set(first) | set(second)) < 2:
        return float("nan")
    return float(cohen_kappa_score(first, second))
