"""What is remembered is found again under exactly what it depends on; what looks at anything else
is refused.
"""

import copy
import dataclasses
import inspect
import json
import linecache
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import cache, defences, evaluation, interventions, models, training, units
from ssah_utils.cache import cache_key, cached, closure, code_of, identity_of
from ssah_utils.experiments import measured_training, panel
from ssah_utils.per_unit import KINDS, PerUnit
from tests.conftest import tiny_model

CALLS: list[object] = []
# fields that the walk through the inputs of a measured training varies
N_FIELDS = {"Panel": 9, "TaskProbe": 4, "MarginProbe": 4, "TransferProbe": 3}


def notebook(source: str, **values) -> types.ModuleType:
    """Functions as a notebook defines them: in ``__main__``, whose other variables they can see."""
    folder = Path(values.pop("folder"))
    path = folder / f"cell{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    module = types.ModuleType("__main__")
    module.__dict__.update(values)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@pytest.fixture
def cells(tmp_path):
    (tmp_path / "cells").mkdir()
    return lambda source, **values: notebook(
        source, folder=tmp_path / "cells", calls=CALLS.append, **values
    )


# ----------------------------------------------------------------------------------------- identity


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float
    steps: int = 3


TABLE = pd.DataFrame({"id": ["a", "b"], "prompt": ["one", "two"], "n": [1, 2]})
VALUES = {
    "none": [None],
    "numbers": [0, 1, 1.0, True, False, 0.1, 0.1 + 2**-56, float("nan"), -1],
    "texts": ["", "a", "A", "ü", "1"],
    "lists": [[], [1], [1, 2], [2, 1], [[1], 2], [1, [2]], ["1", "2"]],
    "dicts": [{}, {"a": 1}, {"a": 2}, {"b": 1}, {1: "a"}],
    "sets": [set(), {1}, {1, 2}],
    "configs": [
        Config(0.1),
        Config(0.2),
        Config(0.1, 4),
        training.SFTConfig(),
        training.SFTConfig(seed=1),
    ],
    "tensors": [
        torch.zeros(4),
        torch.zeros(5),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int64),
        torch.eye(4)[3],
        torch.tensor([True, False, False, False]),
        torch.zeros(4, dtype=torch.bfloat16),
    ],
    "values per unit": [
        PerUnit(values)
        for values in (
            {"mlp": torch.zeros(2, 3)},
            {"attention": torch.zeros(2, 3)},
            {"mlp": torch.zeros(3, 2)},
            {"mlp": torch.ones(2, 3)},
            {"mlp": torch.zeros(2, 3) > 0},
            {"mlp": torch.zeros(2, 3), "attention": torch.zeros(2, 3)},
        )
    ],
    "types": [torch.float32, torch.bfloat16],
    "tables": [
        TABLE,
        TABLE.assign(n=[1, 3]),
        TABLE.assign(prompt=["one", "Two"]),
        TABLE[::-1],
        TABLE.rename(columns={"n": "m"}),
        TABLE.assign(n=[1.0, 2.0]),
        TABLE[:1],
        TABLE.set_index("id", drop=False),
    ],
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_difference_is_seen_and_nothing_else(kind):
    found = [json.dumps(identity_of(value)) for value in VALUES[kind]]
    assert len(set(found)) == len(found)
    assert found == [json.dumps(identity_of(copy.deepcopy(value))) for value in VALUES[kind]]


def test_views_arrays_and_scalars_are_what_they_hold():
    rows = torch.arange(12.0).reshape(3, 4)
    assert identity_of(rows.T) == identity_of(rows.T.contiguous()) != identity_of(rows)
    assert identity_of(np.array([1, 2])) == identity_of([1, 2]) and identity_of(
        np.float64(0.5)
    ) == identity_of(0.5)


def test_models_are_told_by_every_entry_and_precision(llama):
    first = identity_of(llama)
    assert (
        identity_of(copy.deepcopy(llama)) == first != identity_of(copy.deepcopy(llama).bfloat16())
    )
    assert (
        identity_of(torch.compile(llama, backend="eager"))
        == identity_of(torch.nn.DataParallel(llama))
        == first
    )
    other_end, other_attention = copy.deepcopy(llama), copy.deepcopy(llama)
    other_end.generation_config.eos_token_id = [2, 5]
    other_attention.set_attn_implementation("eager")
    assert (
        len(
            {
                json.dumps(identity_of(model))
                for model in (llama, other_end, other_attention, copy.deepcopy(llama).train())
            }
        )
        == 4
    )
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[5, 7] += 0.5
    assert identity_of(llama) != first


def test_a_tokenizer_is_the_same_however_it_was_called_last(tokenizer):
    before = identity_of(tokenizer)
    calls = (
        {"padding": True},
        {"padding": "max_length", "max_length": 9},
        {"truncation": True, "max_length": 1},
        {},
    )
    for how in calls:
        tokenizer(["w3", "w4 w5"], **how)
        assert identity_of(tokenizer) == before


def test_tokenizers_are_told_by_template_special_tokens_and_vocabulary(tokenizer):
    def changed(change) -> str:
        other = copy.deepcopy(tokenizer)
        change(other)
        return json.dumps(identity_of(other))

    found = [
        changed(change)
        for change in (
            lambda t: None,
            lambda t: setattr(t, "chat_template", "{{ messages }}"),
            lambda t: setattr(t, "eos_token", "<pad>"),
            lambda t: t.add_tokens(["new"]),
        )
    ]
    assert len(set(found)) == 4 and found[0] == json.dumps(identity_of(tokenizer))


def test_files_are_told_by_what_they_hold(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    paths = [tmp_path / "model", tmp_path / "model" / "weights"]
    first = [identity_of(path) for path in paths]
    (tmp_path / "model" / "weights").write_text("2")
    assert all(identity_of(path) != before for path, before in zip(paths, first, strict=True))


@pytest.mark.parametrize(
    "value", [object(), iter([1]), {"deep": [lambda: 0, open]}, torch.Generator()]
)
def test_what_has_no_identity_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match=r"argument 'data' is a|no plain function"):
        identity_of(value, "data")


# --------------------------------------------------------------------------------------------- code


def test_the_code_behind_a_measurement_is_all_that_it_imports():
    behind = closure("ssah_utils.evaluation").keys()
    modules = ("judge.rules", "prompts.datasets", "prompt_cache", "judge", "prompts")
    assert {f"ssah_utils.{name}" for name in modules} <= behind
    assert {"refusals.json", "utility_cloze.jsonl"} <= behind
    assert not any(
        name.startswith(("ssah_utils.pipeline", "ssah_utils.figures")) for name in behind
    )
    assert not {"claims.yaml", "paper_tables.yaml"} & behind
    assert {"ssah_utils.unit_training", "ssah_utils.models"} <= closure(
        "ssah_utils.training"
    ).keys()


def test_the_package_stands_for_all_that_can_be_reached_through_it(tmp_path):
    everything = closure("ssah_utils").keys()
    assert (
        closure("ssah_utils.evaluation").keys() | closure("ssah_utils.search").keys() < everything
    )
    written = tmp_path / "user.py"
    written.write_text("import ssah_utils as ssah\ndef measure(x):\n    return ssah.load(x)\n")
    space: dict = {"__name__": "__main__"}
    exec(compile(written.read_text(), str(written), "exec"), space)
    linecache.checkcache(str(written))
    assert everything < code_of(space["measure"]).keys()


def test_the_code_behind_every_module_is_there_whatever_way_it_is_imported(tmp_path):
    """A package that grew folders once had modules that no key saw."""
    for path in cache.PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(cache.PACKAGE.parent).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        assert name in closure(name)
    written = tmp_path / "user.py"
    written.write_text(
        "from ssah_utils.judge import rules as r\nimport ssah_utils.prompts.chat\n"
        "def late():\n    from ssah_utils.stats import bootstrap_interval\n"
    )
    found = set(cache._imports(written))
    assert {"ssah_utils.judge.rules", "ssah_utils.prompts.chat", "ssah_utils.stats"} <= found


def test_the_code_of_a_notebook_function_holds_helpers_defaults_and_the_package(cells):
    source = (
        "from ssah_utils import evaluation\n"
        "def helper(x, n=N):\n    return x + n\n"
        "def measure(x):\n    return evaluation, helper(x)\n"
    )
    first, same, other_default = (code_of(cells(source, N=n).measure) for n in (1, 1, 2))
    assert first == same != other_default
    assert {"helper", "measure", "ssah_utils.judge.rules", "ssah_utils.evaluation"} <= first.keys()
    assert code_of(cells(source.replace("x + n", "x - n"), N=1).measure) != first


def test_changed_rules_of_the_judge_change_the_key(cells, monkeypatch):
    source = (
        "from ssah_utils import evaluation\ndef measure(x):\n    return"
        " evaluation.refusal_margin(x)\n"
    )
    first = cache_key(cells(source).measure, x=1)
    hashes = cache.sha256_of_file
    for name in ("rules.py", "refusals.json", "datasets.py"):
        cache._source.cache_clear()
        monkeypatch.setattr(
            cache,
            "sha256_of_file",
            lambda path, name=name: "changed" if path.name == name else hashes(path),
        )
        assert cache_key(cells(source).measure, x=1) != first, name
    monkeypatch.setattr(cache, "sha256_of_file", hashes)
    cache._source.cache_clear()
    assert cache_key(cells(source).measure, x=1) == first


def test_precision_and_versions_are_in_the_key(cells, monkeypatch):
    measure = cells("def measure(x):\n    return x\n").measure
    keys = []
    for dtype in ("float32", "bfloat16"):  # whichever this machine would choose
        monkeypatch.setenv("SSAH_DTYPE", dtype)
        keys.append(cache_key(measure, x=1))
    versions = cache.installed_versions(cache.LIBRARIES)
    for library in cache.LIBRARIES:
        changed = versions | {library: "0"}
        monkeypatch.setattr(cache, "installed_versions", lambda names, found=changed: found)
        keys.append(cache_key(measure, x=1))
    assert len(set(keys)) == 2 + len(cache.LIBRARIES)


# ------------------------------------------------------------------------------------------- purity


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def measure(x):\n    return x + n_task\n", "'n_task'"),
        (
            "def helper(x):\n    return x + n_task\ndef measure(x):\n    return helper(x)\n",
            "helper uses 'n_task'",
        ),
        ("def measure(x):\n    return [(lambda y: y + n_task)(z) for z in x]\n", "'n_task'"),
        (
            "def measure(x):\n    def inner():\n        return n_task\n    return inner()\n",
            "'n_task'",
        ),
        (
            (
                "def make(n):\n    def measure(x):\n        return x + n\n    return"
                " measure\nmeasure = make(n_task)\n"
            ),
            "'n'",
        ),
    ],
)
def test_a_function_that_looks_at_the_notebook_is_refused(cells, source, names):
    with pytest.raises(ValueError, match=names):
        cached(cells(source, n_task=5).measure, x=1)


def test_arguments_modules_functions_and_builtins_are_free(cells, own_cache):
    source = (
        "import numpy as np\ndef twice(x):\n    return 2 * x\ndef measure(x, y=1):\n"
        "    return [twice(float(np.sqrt(z))) + y for z in sorted(x)]\n"
    )
    assert cached(cells(source).measure, x=[4, 1]) == [3.0, 5.0]


def test_something_else_than_a_function_is_refused(own_cache):
    with pytest.raises(ValueError, match="no plain function"):
        cached(len, x=1)


# ------------------------------------------------------------------------------------------- memory

MEASURE = (
    "def measure(data, rate=0.1, progress=None):\n    calls(data)\n    return [{'n': len(data),"
    " 'rate': rate, 'why': 'ü'}]\n"
)


def test_measured_once_for_each_input(cells, own_cache):
    CALLS.clear()
    measure = cells(MEASURE).measure
    first = cached(measure, data=TABLE)
    assert (
        first == cached(measure, data=TABLE.copy(), rate=0.1) == [{"n": 2, "rate": 0.1, "why": "ü"}]
    )
    assert cached(measure, data=TABLE, progress=print) == first and len(CALLS) == 1
    assert cached(measure, data=TABLE.assign(prompt=["other", "data"])) == first and len(CALLS) == 2
    assert cached(measure, data=TABLE, rate=0.2)[0]["rate"] == 0.2 and len(CALLS) == 3
    assert len(list((own_cache / "measured").iterdir())) == 3


@pytest.mark.parametrize(
    "source",
    ["def measure(x):\n    raise OSError('disk full')\n", "def measure(x):\n    return {1, 2}\n"],
)
def test_a_failed_measurement_leaves_nothing(cells, own_cache, source):
    with pytest.raises((OSError, TypeError)):
        cached(cells(source).measure, x=1)
    assert not list((own_cache / "measured").glob("*"))


def test_freezing_is_measured_again_for_other_requests_pairs_and_bases(llama, tokenizer):
    """Every input of a measured training, and of everything that looks at the model on its way."""
    other_model = copy.deepcopy(llama)
    with torch.no_grad():
        other_model.model.norm.weight[0] += 1
    sets = {"harmful": TABLE}
    frozen = PerUnit({"attention": torch.zeros(3, 60) > 0, "mlp": torch.ones(3, 70) > 0})
    groups = PerUnit({"attention": torch.zeros(3, 60), "mlp": torch.zeros(3, 70)})
    batch = {"input_ids": torch.ones(1, 3), "positions": torch.ones(1, 3)}
    asked = panel.Panel(llama, tokenizer, sets, 16, tasks=("cloze",), n_items=4)
    task = measured_training.TaskProbe(tokenizer, TABLE)
    margin = measured_training.MarginProbe(tokenizer, ["one"])
    moved = measured_training.TransferProbe(
        units.UnitPartition(groups), {"harmful": [batch]}, {"safety_fraction": 0.1}
    )
    change = dataclasses.replace
    panels = [
        change(asked, base=other_model),
        change(asked, requests={"harmful": TABLE.assign(prompt="other")}),
        change(asked, new_tokens=24),
        change(asked, system_prompt="be kind"),
        change(asked, kept_answers={"harmful": ["one", "two"]}),
        change(asked, tasks=()),
        change(asked, n_items=5),
        change(asked, arithmetic=TABLE),
    ]
    probes = [
        (task,),
        (margin,),
        (task, moved),
        (change(task, pairs=TABLE[:1]), margin),
        (change(task, system_prompt="be kind"), margin),
        (change(task, numeric=True), margin),
        (task, change(margin, requests=["two"])),
        (task, change(margin, system_prompt="be kind")),
        (task, change(margin, name=measured_training.FRESH)),
        (task, change(moved, before=units.UnitPartition(groups + 1.0))),
        (task, change(moved, sample={"harmful": [batch | {"positions": torch.zeros(1, 3)}]})),
        (task, change(moved, fractions={"safety_fraction": 0.2})),
    ]
    arguments = {
        "aligned": (llama, other_model),
        "place": ("a", "b"),
        "dtype": (torch.float32, torch.bfloat16),
        "tokenizer": (tokenizer,),
        "examples": ([{"input_ids": [1], "labels": [1]}], []),
        "config": (training.SFTConfig(), training.SFTConfig(seed=1)),
        "steps": ([5], [6]),
        "probes": ((task, margin), *probes),
        "at_end": (asked, None, *panels),
        "frozen": (frozen, ~frozen, frozen.empty_set(), None),
        "adapter": ("", "lora"),
        "defence": (
            None,
            defences.Mixed(0.1, []),
            defences.Mixed(0.2, []),
            defences.Mixed(0.1, [{"input_ids": [1], "labels": [1]}]),
            defences.SafetyVector(0.5, llama),
            defences.SafetyVector(0.5, other_model),
            defences.PulledToStart(1.0),
            defences.PulledToStart(1.0, frozen),
        ),
    }
    function = measured_training.train_and_measure
    assert arguments.keys() == inspect.signature(function).parameters.keys()
    for one in (asked, task, margin, moved):
        assert len(dataclasses.fields(one)) == N_FIELDS[type(one).__name__], "vary the new one, too"
    first = {name: values[0] for name, values in arguments.items()}
    keys = [cache_key(function, **first)]
    for name, values in arguments.items():
        keys += [cache_key(function, **first | {name: other}) for other in values[1:]]
    assert len(set(keys)) == len(keys) == 1 + sum(len(values) - 1 for values in arguments.values())
    behind = (
        "judge.rules",
        "judge.learned",
        "defences",
        "hooked_training",
        "evaluation",
        "unit_training",
        "adapters",
        "experiments.panel",
        "experiments.transfer",
        "units",
    )
    assert {f"ssah_utils.{name}" for name in behind} <= code_of(function).keys()


def test_public_functions_of_the_package_can_be_remembered(llama, tokenizer):
    def key(n: int) -> str:
        inputs = {"model": llama, "tokenizer": tokenizer, "prompts": ["w5"], "max_new_tokens": n}
        return cache_key(evaluation.generate, **inputs)

    assert key(3) == key(3) != key(4)


def test_code_edited_while_a_process_runs_is_not_what_it_runs(monkeypatch):
    """Results of the old code were once stored under the key of the new one."""
    before = closure("ssah_utils.stats")
    monkeypatch.setattr(cache, "sha256_of_file", lambda path: f"edited {path.name}")
    assert closure("ssah_utils.stats") == before
    assert closure("ssah_utils.prompts.datasets")["refusals.json"] == "edited refusals.json", (
        "data are read when they are asked for"
    )


def test_a_users_own_module_and_classes_are_code(cells, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for body in ("n + 1", "n + 2"):
        (tmp_path / "users_helper.py").write_text(f"def score(n):\n    return {body}\n")
        for module in ("users_helper",):
            cache.sys.modules.pop(module, None)
        by_module = "import users_helper\ndef measure(n):\n    return users_helper.score(n)\n"
        by_name = "from users_helper import score\ndef measure(n):\n    return score(n)\n"
        keys.append([cache_key(cells(source).measure, n=1) for source in (by_module, by_name)])
    assert all(a != b for a, b in zip(*keys, strict=True))


def test_tied_weights_rotary_precision_and_hooks_are_part_of_a_model(llama):
    first = identity_of(llama)
    rounded = copy.deepcopy(llama)
    for module in rounded.modules():
        if "inv_freq" in module._buffers:
            module.inv_freq = module.inv_freq.bfloat16()
    assert identity_of(rounded) != first
    untied = copy.deepcopy(llama)
    with torch.no_grad():
        untied.lm_head.weight = torch.nn.Parameter(untied.model.embed_tokens.weight.clone())
    tied = copy.deepcopy(untied)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert identity_of(tied)["model"] == identity_of(untied)["model"] and identity_of(
        tied
    ) != identity_of(untied)
    handle = llama.model.layers[0].register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="has a hook of"):
        identity_of(llama, "subject")
    handle.remove()
    assert identity_of(llama) == first


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_a_model_whose_units_are_changed_is_another_model(name):
    """Its fingerprint counts what they are held at, or multiplied by."""
    model = tiny_model(name)
    shape = models.shape_of(model)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    chosen = PerUnit(
        {kind: torch.arange(n).repeat(m, 1) % 3 == 0 for kind, (m, n) in sizes.items()}
    )
    found = [identity_of(model)["model"]]
    for changed in (
        interventions.ablated(model, chosen),
        interventions.multiplied(model, chosen, 0.5),
        interventions.multiplied(model, chosen, 2.0),
    ):
        with changed:
            found.append(identity_of(model)["model"])
    assert len(set(found)) == 4
    assert identity_of(model)["model"] == found[0]
