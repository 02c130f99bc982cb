"""README and docs/: short, whole, true to the stored results, and their code and commands run."""

import re
import shlex

import nbformat
import pytest
import torch

from ssah_utils import models, unit_files, units
from ssah_utils.files import REFERENCE, ROOT
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.pipeline import across_judges, across_models, cli, publish, run, summary
from ssah_utils.pipeline.runs import declared_parameters
from tests.conftest import writers_by_name
from tests.links import broken_in_markdown

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
WORDS = 1500
FIRST_SCREEN = 30  # lines


def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def test_readme_can_be_read_in_a_few_minutes():
    assert len(text_of(README).split()) <= WORDS  # as wc -w counts


def test_readme_shows_code_on_its_first_screen():
    before, found, code = text_of(README).partition("```python\n")
    assert found and (before + code.partition("```")[0]).count("\n") <= FIRST_SCREEN


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_relative_link_and_image_exists(path):
    assert broken_in_markdown(path) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '[a](page.md#x) ![b](gone.png) [c](https://a.b) <img src="no.png">\n'
        "```\n[d](code.md)\n```\n"
    )
    assert broken_in_markdown(page) == ["gone.png", "no.png"]


# ------------------------------------------------------------------------------------------ results


@pytest.fixture(scope="module")
def results() -> across_models.StoredResults:
    found = across_models.StoredResults(REFERENCE)
    assert not found.problems
    return found


@pytest.mark.parametrize("document", publish.DOCUMENTS)
def test_generated_parts_are_those_of_the_stored_results(document, results):
    text = text_of(ROOT / document)
    assert publish.filled(document, text, results) == (text, []), "run ssah publish"


def test_verdicts_add_up_in_readme(results):
    table = summary.claims_of(results)
    *_, last = summary.verdict_counts(results).splitlines()
    counts = [int(cell) for cell in last.strip("|").split("|")[1:]]
    assert sum(counts[:-1]) == counts[-1] == len(table)
    assert counts[0] == (table["verdict"] == "replicated").sum()


def test_headings_of_the_findings_say_what_their_verdicts_say(results):
    """The headings are typed: where one of these verdicts changes, its heading is no longer
    true.
    """
    verdicts = summary.claims_of(results).set_index("id")["verdict"]
    found = {name: [verdicts[one] for one in ids] for name, ids in summary.FINDINGS.items()}
    assert set(found["not replicated"]) == {"not replicated"}
    alone, with_some, with_all, task = found["freezing"]
    assert (alone, with_some) == ("not replicated", "partly")
    assert "replicated" not in (with_all, task)
    (carries,) = summary.FINDINGS["safety units"]
    by_model = results.by_model.set_index(["id", "model"])["verdict"][carries]
    assert by_model.pop(across_models.MAIN) == "not replicated"
    assert len(by_model) and set(by_model) == {"replicated"}


def test_what_is_said_of_refusing_and_of_helping_is_what_is_stored():
    """Without safety units no model refuses; those of vendors then help, ours mostly does not."""
    rates = across_judges.stored_rates(REFERENCE)
    assert len(rates.groupby(["model", "seed"])) >= 3
    for (model, _), part in rates.groupby(["model", "seed"]):
        by_metric = part.set_index(["metric", "condition"])
        keywords, fulfilled = by_metric.loc["keywords"], by_metric.loc["learned"]
        assert keywords["low"]["safety"] > max(
            keywords["high"]["nothing"], keywords["high"]["random, as safety"]
        )
        gained = fulfilled["mean"]["safety"] - fulfilled["mean"]["nothing"]
        assert (gained < 0.5) if model == across_models.MAIN else (gained > 0.3)


# -------------------------------------------------------------------------------- code and commands


SNIPPETS = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in DOCUMENTS
    if path.stem != "unit-files"  # tests/test_unit_files.py runs the specification's own
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text_of(path), re.M | re.S))
]


@pytest.fixture
def own_files(saved_llama, llama, tmp_path, monkeypatch) -> PerUnit:
    """A folder as a user has it: a model, the unit files of notebooks and answers to judge; the
    set of safety units.
    """
    monkeypatch.chdir(tmp_path)
    saved_llama.rename("my-model")
    shape, generator = models.shape_of(llama), torch.Generator().manual_seed(0)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    z_safety, z_utility = (
        PerUnit({kind: torch.rand(size, generator=generator) for kind, size in sizes.items()})
        for _ in range(2)
    )
    about = unit_files.ModelInfo.of(llama)
    parted = units.partition(z_safety, z_utility, 0.1, 0.1, 0.1, fingerprint=about.fingerprint)
    unit_files.save_partition("units.safetensors", parted, about)
    frozen = parted.units("safety")
    unit_files.save_set("frozen_units.safetensors", frozen, about, "safety units")
    (tmp_path / "answers.jsonl").write_text(
        '{"prompt": "Name a tree.", "response": "An oak.", "base_nll": 1.5}\n'
    )
    return parted.units("safety")


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run_as_they_stand(code, own_files, llama):
    """What they measure while units are off differs, and what they freeze stays as it was."""
    tokens = torch.arange(3, 9)[None]
    measured = []

    def train(model) -> None:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    names = {"measure": lambda model: measured.append(model(tokens).logits), "train": train}
    exec(compile(code, "<snippet>", "exec"), names)
    for logits in measured:
        assert not torch.allclose(logits, llama(tokens).logits)
    if "freezing(" in code:
        for kind in KINDS:
            writers = zip(
                writers_by_name(llama, kind), writers_by_name(names["model"], kind), strict=True
            )
            for layer, (old, new) in enumerate(writers):
                frozen = own_files[kind][layer]
                assert torch.equal(old.weight[:, frozen], new.weight[:, frozen])
                assert not torch.equal(old.weight, new.weight)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_named_is_there(path):
    text = text_of(path)
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M))
    assert set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", text, re.M)) <= targets
    assert set(re.findall(r"(?:`|^    )ssah ([a-z]+)", text, re.M)) <= set(cli.parsers()[1])
    declared = {
        name for notebook in run.NOTEBOOKS.glob("*.ipynb") for name in declared_parameters(notebook)
    }
    assert set(re.findall(r'--set "?(\w+)=', text)) <= declared
    profiles = {profile.stem for profile in (run.NOTEBOOKS / "profiles").glob("*.yaml")}
    assert set(re.findall(r"--profile ([\w.-]+)", text)) <= profiles


def commands_named() -> list:
    """Every command that runs notebooks, and every part of one that begins with an option, in
    documents and in the text of notebooks.
    """
    texts = {path: text_of(path) for path in DOCUMENTS}
    for path in sorted(run.NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        texts[path] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = {}
    for path, text in texts.items():
        for span in re.findall(
            r"(?:`|^    )(ssah (?:run|sweep)[^`\n]*|--(?:only|set) [^`\n]*)", text, re.M
        ):
            found.setdefault(span.removeprefix("ssah "), path.stem)
    return [pytest.param(one, id=f"{stem}: {one}") for one, stem in found.items()]


@pytest.mark.parametrize("command", commands_named())
def test_every_command_that_runs_notebooks_is_taken(command):
    """By the parser, and by the plan: names of notebooks, profiles and parameters, and which go
    together.
    """
    meant = re.sub(r"<[^>]*>", "mine", command).replace("NOTEBOOK", "04_ablation")
    words = shlex.split(meant, comments=True)
    name = "run" if words[0].startswith("--") else words.pop(0)
    asked = cli.parsers()[1][name].parse_args(words)
    assert run.plan(asked.profile or "laptop", asked.set or [], asked.only or "", checked=False)
