"""Rows of JSONL, CSV, text and YAML files, each with the number of its line, and errors that name
it.

Knows file formats. Does not know data sets or where files come from.
"""

import csv
import io
import json
from pathlib import Path

import yaml

SUFFIXES = (".jsonl", ".csv")  # of a user's file


def read_file(path: Path) -> list[dict]:
    """Rows of a user's .jsonl or .csv file; names of columns count without outer spaces and in
    lower case.

    Raises ``OSError`` for a path that cannot be read and ``ValueError`` with the line for content
    that cannot be used.
    """
    if path.exists() and path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"data file '{path}': needed is a .jsonl file (one JSON object a line) or a .csv file"
            " (with commas)"
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
            f"{path}, line {line}: a NUL character, so this is no UTF-8 text: save the file as"
            " UTF-8"
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    rows = parse_rows(text, path.suffix.lower(), str(path))
    plain = [_with_plain_names(row, str(path)) for row in rows]
    if not any("prompt" in row for row in plain):
        other = next(
            (
                f"; it is separated by {sign!r}, not by commas"
                for sign in ";\t|"
                if sign in "".join(rows[0])
            ),
            "",
        )
        raise ValueError(
            f"{path}, line {rows[0]['_line']}: no column 'prompt' (found:"
            f" {names_of(rows[0])}){other}"
        )
    return plain


def parse_rows(text: str, suffix: str, where: str) -> list[dict]:
    """Rows of a file, each with the number of the line where it begins as ``_line``."""
    text = text.removeprefix("\ufeff")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        rows = [_json_line(line, number, where) for number, line in lines]
    elif suffix == ".csv":
        rows = _csv_rows(text, where)
    elif suffix == ".txt":
        rows = [{"_line": number, "prompt": line.strip()} for number, line in lines]
    else:  # PyRIT's YAML
        rows = [
            {"_line": number} | seed
            for number, seed in enumerate(yaml.load(text, Loader=yaml.CSafeLoader)["seeds"], 1)
        ]
    if not rows:
        raise ValueError(
            f"{where} is empty" + (", but for one line of names of columns" if lines else "")
        )
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
    plain = _unique(
        [(name.strip().lower(), value) for name, value in row.items()],
        f"{where}, line {row['_line']}: ",
    )
    return {name: value for name, value in plain.items() if name}


def _unique(pairs: list[tuple[str, object]], start: str = "") -> dict:
    """A dictionary of pairs; ``ValueError`` where a name comes twice, of which Python would keep
    the last.
    """
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
        reason = (
            f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
        )
        raise ValueError(
            f"{where}, line {number}: {reason}; every line holds one whole JSON object"
        ) from error
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ValueError(
            f"{where}, line {number}: expected an object with named columns on every line, found"
            f" {kind}"
        )
    return row | {"_line": number}


def _csv_rows(text: str, where: str) -> list[dict]:
    lines = io.StringIO(text, newline="")
    skipped = 0
    while text.startswith("#"):  # PyRIT begins its files with a version comment
        lines.readline()
        text, skipped = text.partition("\n")[2], skipped + 1
    limit = csv.field_size_limit(
        len(text) + 1
    )  # one for the whole process, by default 131,072 characters
    try:
        reader, rows, header = csv.reader(lines, strict=True), [], None
        while True:
            line = (
                reader.line_num + skipped + 1
            )  # where the row begins; a quoted cell may hold several lines
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{where}, line {line}: {error} (is a quote opened here and not closed?)"
                ) from error
            if cells is None:
                return rows
            if header is None and cells:
                header = cells
                _unique([(name, None) for name in header], f"{where}, line {line}: ")
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where}, line {line}: {len(header)} columns expected, {len(cells)} found"
                        " (quote commas)"
                    )
                if any(
                    cell.strip()
                    for name, cell in zip(header, cells, strict=True)
                    if not name.strip()
                ):
                    raise ValueError(f"{where}, line {line}: a value in a column without a name")
                rows.append(dict(zip(header, cells, strict=True)) | {"_line": line})
    finally:
        csv.field_size_limit(limit)
