"""Which requests are nearly the same, and splits of a table that keep such requests on one side.

Only texts and tables: no data set, no tokenizer and no model.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pandas as pd

from ssah_utils import extras

STOP_WORDS = frozenset(
    (
        "a an the to of in on for and or with without how do i can you me my your is are be that it"
        " at by from as what write create give provide develop make tutorial guide instructions"
        " steps step detailed explain using someone"
    ).split()
)
NEAR_DUPLICATE = 0.6  # Jaccard similarity of content words
CHUNK = 2**22  # pairs of texts compared at once
REMEMBERED = 2**15  # texts whose words are kept: a study compares each of its own several times
# Scripts that put no spaces between words: Thai and Lao, Burmese, Khmer, Tai, Kana and Bopomofo,
# Han, Yi, Javanese.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)


def folded(text: str) -> str:
    """One form of a text, whatever its Unicode form, width, case, spaces and hidden characters."""
    return " ".join(visible(unicodedata.normalize("NFKC", text)).lower().split())


def visible(text: str) -> str:
    """A text without invisible characters.

    Zero-width ones, soft hyphens, marks of direction or of a glyph's variant.
    """
    if text.isascii():
        return text
    text = re.sub(r"[\u034f\ufe00-\ufe0f]", "", text)
    shown = [char for char in text if char.isascii() or unicodedata.category(char) != "Cf"]
    return "".join(shown)


@lru_cache(REMEMBERED)
def content_words(text: str) -> frozenset[str]:
    """The words of a text without stop words.

    Where a script puts no spaces between words, pairs of neighbouring characters stand for them.

    >>> sorted(content_words("How do I write a poem about C++?"))
    ['about', 'c_plus', 'poem']
    """
    whole = text = folded(text)
    named = lambda found: "_plus" if found[0] == "++" else "_sharp"  # noqa: E731
    text = re.sub(r"(?<=\w)(?:\+\+|#)(?!\w)", named, text)  # C++, C#
    # a combining mark belongs to its word: in Hindi or Thai it is a vowel
    is_mark = lambda char: unicodedata.category(char)[0] == "M"  # noqa: E731
    text = re.sub(r"\W", lambda found: found[0] if is_mark(found[0]) else " ", text)
    words: set[str] = set()
    for run in re.finditer(rf"([{UNSPACED}]+)|[^{UNSPACED}\s]+", text):
        if unspaced := run[1]:
            starts = range(max(1, len(unspaced) - 1))
            words |= {unspaced[start : start + 2] for start in starts}
        else:
            words.add(run[0])
    words = frozenset(word for word in words if re.search(r"\w", word)) or frozenset([whole])
    return words - STOP_WORDS or words


def near_duplicates(
    texts: list[str], others: list[str], threshold: float = NEAR_DUPLICATE
) -> np.ndarray:
    """Which text is nearly the same request as which other: (len(texts), len(others)) bool.

    By the Jaccard similarity of their content words.
    """
    found = np.zeros((len(texts), len(others)), dtype=bool)
    for start, rows in _near_rows(texts, others, threshold):
        found[start : start + len(rows)] = rows
    return found


def _near_rows(
    texts: list[str], others: list[str], threshold: float = NEAR_DUPLICATE
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of ``near_duplicates`` in turn, as many at once as ``CHUNK`` allows.

    The whole would not fit for 20,000 texts.
    """
    with extras.needed("eval"):  # not to be had, nor waited for, where nothing is compared
        from scipy.sparse import csr_array

    words = [[content_words(text) for text in side] for side in (texts, others)]
    number = {word: i for i, word in enumerate(frozenset().union(*words[0], *words[1]))}

    def counts(items: list[frozenset[str]]) -> csr_array:
        columns = [number[word] for item in items for word in item]
        ends = np.cumsum([0, *map(len, items)])
        ones = np.ones(len(columns), dtype=np.float32)
        return csr_array((ones, columns, ends), shape=(len(items), len(number)))

    left, right = map(counts, words)
    n_left, n_right = (np.diff(side.indptr).astype(np.float32) for side in (left, right))
    step = max(1, CHUNK // max(1, len(others)))
    for start in range(0, len(texts), step):
        rows = slice(start, start + step)
        shared = (left[rows] @ right.T).toarray()
        yield start, shared / (n_left[rows, None] + n_right - shared) >= threshold


def groups_of(texts: list[str]) -> np.ndarray:
    """The number of each text's group, where near duplicates are linked: (len(texts),) int.

    Also those that are linked over several steps are one group.
    """
    with extras.needed("eval"):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

    group = np.arange(len(texts))
    for start, rows in _near_rows(texts, texts):
        one, other = rows.nonzero()
        # the groups so far as a forest, and the links of these rows
        ends = np.concatenate([group, other])
        starts = np.concatenate([np.arange(len(texts)), one + start])
        ones = np.ones(len(ends), dtype=bool)
        links = coo_array((ones, (starts, ends)), shape=(len(texts), len(texts)))
        _, label = connected_components(links, directed=False)
        first = np.unique(label, return_index=True)[1]
        group = first[label]
    return np.unique(group, return_inverse=True)[1]


def split(
    table: pd.DataFrame, folds: dict[str, int], seed: int, name: str = ""
) -> dict[str, pd.DataFrame]:
    """Disjoint splits of a data set, stratified by category, none empty.

    Near-duplicate requests stay on one side. ``folds`` says how many of the equal folds each split
    gets, e.g. ``{"alignment": 5, "evaluation": 5}``; ``name`` is the data set's, for messages.
    Raises ``ValueError`` where the table is too small or too much alike.
    """
    with extras.needed("eval"):
        from sklearn.model_selection import StratifiedGroupKFold

    whose = f"data set '{name}'" if name else "a data set"
    n_folds = sum(folds.values())
    if len(table) < n_folds:
        raise ValueError(
            f"{whose} of {len(table)} requests is too small to split into {n_folds} folds"
        )
    prompts = table["prompt"].tolist()
    group = groups_of(prompts)
    sizes = np.bincount(group)
    example = " ".join(prompts[int(np.argmax(group == sizes.argmax()))].split())[:60]
    too_alike = (
        f"{whose}: its {len(table)} requests are {len(sizes)} groups of near duplicates,"
        f" too few or too uneven for {n_folds} folds"
        f" (the largest: {sizes.max()} requests like '{example}'):"
        " add requests that differ in more than a few words"
    )
    if len(sizes) < n_folds:
        raise ValueError(too_alike)
    # a category with fewer requests than folds cannot be stratified: it goes with the largest one
    category = pd.Series([str(value) for value in table["category"]], index=table.index)
    frequency = category.value_counts()
    strata = category.where(category.map(frequency) >= n_folds, frequency.index[0])
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    in_turn = [rows for _, rows in splitter.split(table, strata, group)]
    shuffle = np.random.default_rng(seed)
    # The splitter shuffles only what is alike: the largest groups come in the first folds whatever
    # the seed. What is stored was divided by seed 0, in that order.
    order = shuffle.permutation(n_folds) if seed else range(n_folds)
    fold_rows = iter([in_turn[fold] for fold in order])
    splits = {}
    for part, n_own in folds.items():
        rows = np.concatenate([next(fold_rows) for _ in range(n_own)])
        splits[part] = table.iloc[shuffle.permutation(rows)].reset_index(drop=True)
        if not len(rows):
            raise ValueError(too_alike)
    assert_disjoint(splits)
    return splits


def without_near_duplicates(
    table: pd.DataFrame, *others: pd.DataFrame, name: str = ""
) -> pd.DataFrame:
    """Rows of ``table`` that are not nearly the same request as any row of ``others``.

    ``ValueError`` where none is left; ``name`` says in its message whose rows they are.
    """
    texts, known = table["prompt"].tolist(), pd.concat(others)["prompt"].tolist()
    parts = [rows.any(1) for _, rows in _near_rows(texts, known)]
    repeats = np.concatenate(parts) if parts else np.zeros(0, dtype=bool)
    if repeats.all():
        raise ValueError(
            f"{name or 'a data set'}: nothing is left of {len(table)} requests, as all are near"
            " duplicates of requests that another part of the study uses: give another data set"
        )
    return table[~repeats].reset_index(drop=True)


def assert_disjoint(splits: dict[str, pd.DataFrame]) -> None:
    """Raise ``ValueError`` naming two near-duplicate requests that stand in different splits."""
    for (name, one), (other, two) in itertools.combinations(splits.items(), 2):
        left, right = one["prompt"].tolist(), two["prompt"].tolist()
        for start, rows in _near_rows(left, right):
            for row, column in np.argwhere(rows)[:1]:
                pair = f"{left[start + row]!r} ~ {right[column]!r}"
                raise ValueError(f"splits '{name}' and '{other}' share a request: {pair}")
