"""What a notebook takes over from earlier ones."""

import gc
import json
import shutil

import pytest
import torch

from ssah_utils import embedded, fingerprints, interventions, loading
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline import upstream
from ssah_utils.pipeline.runs import Run
from ssah_utils.prompts import chat, datasets
from ssah_utils.weights import squared_column_norms

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


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


# ------------------------------------------------------------------------------------ which model


def run_with(tmp_path, places: dict, **parameters) -> Run:
    folder = tmp_path / "01_alignment"
    folder.mkdir(exist_ok=True)
    (folder / "models.json").write_text(json.dumps(places), encoding="utf-8")
    given = {"chat_template": "", "system_prompt": "", "start_model": ""}
    return Run("07_redundant_units", tmp_path / "07_redundant_units", given | parameters)


def test_two_names_of_one_model_share_weights_but_not_hooks(tmp_path, saved_llama, token_ids):
    place = str(saved_llama)
    run = run_with(tmp_path, {"base": place, "aligned": place}, model=place)
    base, subject = (upstream.load_model(run, name) for name in ("base", "aligned"))
    assert subject is not base
    for one, other in zip(subject.parameters(), base.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    intact = base(token_ids).logits
    everything = PerUnit(
        {kind: torch.ones(values.shape) > 0 for kind, values in squared_column_norms(base).items()}
    )
    with interventions.ablated(subject, everything):
        assert torch.equal(base(token_ids).logits, intact)
        assert not torch.equal(subject(token_ids).logits, intact)
    assert torch.equal(subject(token_ids).logits, intact)


def test_a_model_that_is_not_in_use_any_more_is_loaded_again(tmp_path, saved_llama):
    place = str(saved_llama)
    run = run_with(tmp_path, {"base": place, "aligned": place}, model=place)
    first = upstream.load_model(run, "base")
    with torch.no_grad():
        first.lm_head.weight.add_(1.0)
    spoilt = first.lm_head.weight.clone()
    del first
    gc.collect()
    assert not torch.equal(upstream.load_model(run, "base").lm_head.weight, spoilt)


@pytest.mark.parametrize(
    ("places", "start_model", "expected"),
    [
        ({"base": "mine", "aligned": "/trained"}, "", "mine"),
        ({"base": "org/chat", "aligned": "org/chat"}, "", embedded.DEFAULT),
        ({"base": "org/chat", "aligned": "org/chat"}, "org/base", "org/base"),
        ({"base": "mine", "aligned": "/trained"}, "org/base", "org/base"),
    ],
)
def test_what_is_aligned_does_not_come_aligned(tmp_path, places, start_model, expected):
    run = run_with(tmp_path, places, start_model=start_model)
    assert upstream.place_to_align(run) == expected


def test_a_base_without_a_chat_template_gets_that_of_its_chat_version_or_a_plain_one(
    tmp_path, saved_llama
):
    chat_version, base = str(saved_llama), tmp_path / "base"
    shutil.copytree(saved_llama, base)
    tokenizer = loading.load_tokenizer(chat_version)
    tokenizer.chat_template = template = TEMPLATE
    tokenizer.save_pretrained(chat_version)
    run = run_with(tmp_path, {}, model=chat_version)
    assert upstream.load_tokenizer(run, str(base)).chat_template == template
    tokenizer.chat_template = None
    tokenizer.add_tokens(["w999"])
    tokenizer.save_pretrained(base)
    plain = upstream.load_tokenizer(run, str(base))
    assert chat.render(plain, ["w3"])[0].endswith("User: w3\n\nAssistant:")
    assert plain("User: w3", add_special_tokens=False).input_ids  # spoken in its own words


# ----------------------------------------------------------------------------------- which requests


def ids(splits: dict, part: str) -> dict[str, list[str]]:
    return {name: table["id"].tolist() for name, table in splits[part].items()}


@pytest.mark.parametrize("came_aligned", [True, False])
def test_the_seed_draws_calibration_where_no_training_of_ours_does(tmp_path, came_aligned):
    places = {"base": "x", "aligned": "x" if came_aligned else "y"}
    data = {"harmful_data": "advbench", "other_harmful_data": "harmbench"}
    data["helpful_data"] = "helpful"
    first, other, again = (
        upstream.study_splits(run_with(tmp_path, places, seed=seed, **data)) for seed in (0, 1, 1)
    )
    stored = datasets.study_splits(*data.values())
    for part in stored:
        assert ids(first, part) == ids(stored, part), "seed 0 is what is stored"
        assert ids(other, part) == ids(again, part)
    assert ids(other, "evaluation") == ids(first, "evaluation"), "all seeds answer the same"
    assert (ids(other, "calibration") != ids(first, "calibration")) == came_aligned


@pytest.mark.parametrize("stage", upstream.WITHOUT_01)
def test_a_notebook_that_does_not_follow_01_asks_nothing_of_it(tmp_path, stage):
    data = {"harmful_data": "advbench", "other_harmful_data": "harmbench"}
    run = Run(stage, tmp_path / stage, data | {"helpful_data": "helpful", "seed": 1})
    assert ids(upstream.study_splits(run), "calibration") and not run.inputs
