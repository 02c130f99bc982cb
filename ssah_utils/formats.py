"""Rows of JSONL, CSV, text and YAML files, each with the number of its line, and errors that name it.

Knows file formats. Does not know data sets or where files come from.
"""

import csv
import io
import json

import yaml


def parse(text: str, suffix: str, where: str) -> list[dict]:
    """Rows of a file, each with the number of its line as ``_line``."""
    lines = [(number, line) for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        rows = [_json_line(line, number, where) for number, line in lines]
    elif suffix == ".csv":
        rows = _csv_rows(text.removeprefix("\ufeff"), where)
    elif suffix == ".txt":
        rows = [{"_line": number, "prompt": line.strip()} for number, line in lines]
    else:  # PyRIT's YAML
        rows = [{"_line": number} | seed for number, seed in enumerate(yaml.load(text, Loader=yaml.CSafeLoader)["seeds"], 1)]
    if not rows:
        raise ValueError(f"{where} is empty")
    return rows


def _json_line(line: str, number: int, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {number}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}, line {number}: expected an object with named columns, found {type(row).__name__}")
    return {"_line": number} | row


def _csv_rows(text: str, where: str) -> list[dict]:
    lines = io.StringIO(text, newline="")
    skipped = 0
    while text.startswith("#"):  # PyRIT begins its files with a version comment
        lines.readline()
        text, skipped = text.partition("\n")[2], skipped + 1
    reader, rows = csv.DictReader(lines), []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{where}, line {reader.line_num + skipped}: {len(reader.fieldnames or [])} columns expected (quote commas)"
            )
        rows.append({"_line": reader.line_num + skipped} | row)
    return rows
