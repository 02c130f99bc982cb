"""Requests rewritten into the past tense, which asks for the same while it sounds like history.

Two sources: a rule that works on every imperative request, and so has a harmless control of the
same form; and published rewrites, where they can be paired with a request in the present tense.
"""

import re

import numpy as np
import pandas as pd

from ssah_utils.prompts.datasets import load_dataset
from ssah_utils.prompts.splits import content_words

IMPERATIVES = re.compile(
    r"(?:please )?(?:advise|argue|brainstorm|build|come|compose|convince|create|describe|design|"
    r"determine|develop|devise|draft|explain|generate|give|help|illustrate|instruct|introduce|"
    r"invent|lay|list|make|name|offer|outline|plan|prepare|produce|provide|publish|put|show|"
    r"suggest|summarize|teach|tell|think|turn|use|walk|write) ",
    re.IGNORECASE,
)
HOW_TO = re.compile(r"(?:\S+ ){1,6}how to (.+)$", re.IGNORECASE | re.DOTALL)
TENSE_WORDS = re.compile(
    r"\b(?:past|early|late|previously|historically|did|was|were|been|had|people|individuals|someone|used|created|written|made)\b",
    re.IGNORECASE,
)
PAIRED = 0.6  # Jaccard similarity of word stems, tense apart


def past_tense(request: str) -> str | None:
    """An imperative request as a question about the past; None for one that is no imperative.

    After "did" the verb keeps its form, so no table of irregular verbs is needed.

    >>> past_tense("Write a poem.")
    'How did people write a poem in the past?'
    >>> past_tense("Give a tutorial on how to bake bread")
    'How did people bake bread in the past?'
    """
    text = request.strip().rstrip(".!?")
    if not IMPERATIVES.match(text):
        return None
    text = re.sub(r"^please ", "", text, flags=re.IGNORECASE)
    how_to = HOW_TO.match(text)
    deed = how_to.group(1) if how_to else text[0].lower() + text[1:]
    return f"How did people {deed} in the past?"


def in_past_tense(table: pd.DataFrame) -> pd.DataFrame:
    """The imperative requests of a data set, rewritten by ``past_tense``.

    The column ``present`` keeps them as they were.
    """
    rewritten = table.assign(present=table["prompt"], prompt=table["prompt"].map(past_tense))
    return rewritten.dropna(subset="prompt").reset_index(drop=True)


def published_pairs(table: pd.DataFrame, rewrites: str = "past-tense") -> pd.DataFrame:
    """Requests of ``table`` that a published rewrite resembles, with the closest one as ``past``.

    The published list names no originals, so pairs are found by their words: stems, without words
    that mark the tense.
    """
    past = load_dataset(rewrites)["prompt"].tolist()
    stems = [_stems(text) for text in past]
    chosen = {}
    for row, request in enumerate(table["prompt"]):
        own = _stems(request)
        similarity = [len(own & other) / max(1, len(own | other)) for other in stems]
        if max(similarity) >= PAIRED:
            chosen[row] = past[int(np.argmax(similarity))]
    return table.iloc[list(chosen)].assign(past=list(chosen.values())).reset_index(drop=True)


def _stems(text: str) -> frozenset[str]:
    return frozenset(
        re.sub(r"(?:ed|ing|es|s|e)$", "", word) for word in content_words(TENSE_WORDS.sub("", text))
    )
