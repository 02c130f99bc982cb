"""Rows of JSONL, CSV, text and YAML files, each with its line's number, and errors that name it.

Does not know data sets or where files come from.
"""

import csv
import io
import json
from pathlib import Path

import yaml

SUFFIXES = (".jsonl", ".csv")  # of a user's file


def read_file(path: Path) -> list[dict]:
    """Rows of a user's .jsonl or .csv file.

    Names of columns count without outer spaces and in lower case. Raises ``OSError`` for a path
    that cannot be read, ``ValueError`` with the line for content that cannot be used.
    """
    if path.exists() and path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"data file '{path}': needed is a .jsonl file (one JSON object a line)"
            " or a .csv file (with commas)"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data file '{path}' does not exist") from error
    except OSError as error:
        raise type(error)(f"data file '{path}' cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 text (byte {error.start}): save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}, line {line}: a NUL character, so this is no UTF-8 text:"
            " save the file as UTF-8"
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    rows = parse_rows(text, path.suffix.lower(), str(path))
    plain = [_with_plain_names(row, str(path)) for row in rows]
    if not any("prompt" in row for row in plain):
        header = "".join(rows[0])
        sign = next((sign for sign in ";\t|" if sign in header), "")
        hint = f"; it is separated by {sign!r}, not by commas" if sign else ""
        raise ValueError(
            f"{path}, line {rows[0]['_line']}: no column 'prompt'"
            f" (found: {names_of(rows[0])}){hint}"
        )
    return plain


def parse_rows(text: str, suffix: str, where: str, header: tuple[str, ...] = ()) -> list[dict]:
    """Rows of a file, each with the number of the line where it begins as ``_line``.

    ``header``: names of the columns of a .csv file that does not begin with them.
    """
    text = text.removeprefix("\ufeff")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        rows = [_json_line(line, number, where) for number, line in lines]
    elif suffix == ".csv":
        rows = _csv_rows(text, where, list(header) or None)
    elif suffix == ".txt":
        rows = [{"_line": number, "prompt": line.strip()} for number, line in lines]
    else:  # PyRIT's YAML
        seeds = yaml.load(text, Loader=yaml.CSafeLoader)["seeds"]
        rows = [{"_line": number} | seed for number, seed in enumerate(seeds, 1)]
    if not rows:
        but = ", but for one line of names of columns" if lines else ""
        raise ValueError(f"{where} is empty{but}")
    return rows


def names_of(row: dict) -> str:
    """The names of a row's columns for a message: one line, however many and long they are."""
    names = [" ".join(name.split())[:60] for name in row if name != "_line"]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def has_a_sign(text: str) -> bool:
    """Whether a text shows anything at all."""
    return any(char.isprintable() and not char.isspace() for char in text)


def damage_of(text: str) -> str:
    """What a text holds that no tokenizer or file takes; empty if nothing."""
    if "\0" in text:
        return "a NUL character"
    half = next((char for char in text if "\ud800" <= char <= "\udfff"), "")
    return f"half of a surrogate pair (U+{ord(half):04X})" if half else ""


def _with_plain_names(row: dict, where: str) -> dict:
    pairs = [(name.strip().lower(), value) for name, value in row.items()]
    plain = _unique(pairs, f"{where}, line {row['_line']}: ")
    return {name: value for name, value in plain.items() if name}


def _unique(pairs: list[tuple[str, object]], start: str = "") -> dict:
    """A dictionary of pairs; ``ValueError`` where a name comes twice: Python keeps the last."""
    unique: dict[str, object] = {}
    for name, value in pairs:
        if name and name in unique:
            raise ValueError(f"{start}two columns are named '{name}': keep one")
        unique[name] = value
    return unique


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON: write null")


def _json_line(line: str, number: int, where: str) -> dict:
    try:
        row = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        is_syntax = isinstance(error, json.JSONDecodeError)
        reason = f"not JSON ({error.msg})" if is_syntax else str(error)
        raise ValueError(
            f"{where}, line {number}: {reason}; every line holds one whole JSON object"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}, line {number}: expected an object with named columns on every line,"
            f" found {type(row).__name__}"
        )
    return row | {"_line": number}


def _csv_rows(text: str, where: str, header: list[str] | None = None) -> list[dict]:
    lines = io.StringIO(text, newline="")
    skipped = 0
    while text.startswith("#"):  # PyRIT begins its files with a version comment
        lines.readline()
        text, skipped = text.partition("\n")[2], skipped + 1
    # one limit for the whole process, by default 131,072 characters
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader, rows = csv.reader(lines, strict=True), []
        while True:
            line = reader.line_num + skipped + 1  # where a row begins; its cells may hold lines
            place = f"{where}, line {line}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{place}: {error} (is a quote opened here and not closed?)"
                ) from error
            if cells is None:
                return rows
            if header is None and cells:
                header = cells
                _unique([(name, None) for name in header], f"{place}: ")
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(
                        f"{place}: {len(header)} columns expected, {len(cells)} found"
                        " (quote commas)"
                    )
                named = list(zip(header, cells, strict=True))
                if any(cell.strip() for name, cell in named if not name.strip()):
                    raise ValueError(f"{place}: a value in a column without a name")
                rows.append(dict(named) | {"_line": line})
    finally:
        csv.field_size_limit(limit)
