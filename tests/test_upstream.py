"""What a notebook takes over from earlier ones."""

import json

import pytest

from ssah_utils import fingerprints
from ssah_utils.pipeline import upstream
from ssah_utils.pipeline.runs import Run


@pytest.mark.parametrize(
    ("model", "places", "expected"),
    [
        ("org/name", {"base": "x", "aligned": "x"}, "org/name"),
        ("org/name", {"base": "x", "aligned": "y"}, "org/name, aligned by 01_alignment"),
        ("{folder}/mine", {"base": "x", "aligned": "x"}, "mine"),
        ("{folder}/mine", {"base": "x", "aligned": "y"}, "mine, aligned by 01_alignment"),
    ],
)
def test_the_aligned_model_is_described_by_whose_it_is(tmp_path, llama, model, places, expected):
    (tmp_path / "01_alignment").mkdir()
    (tmp_path / "01_alignment" / "models.json").write_text(json.dumps(places), encoding="utf-8")
    run = Run("03_units", tmp_path / "03_units", {"model": model.format(folder=tmp_path)})
    found = upstream.describe_model(run, llama)
    assert (found.id, found.fingerprint) == (expected, fingerprints.fingerprint(llama))
    assert list(run.inputs) == ["01_alignment/models.json"]
