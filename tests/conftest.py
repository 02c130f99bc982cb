"""Tiny models built in code, without any download: one for every architecture the package
supports.
"""

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ssah_utils.files import cache_dir
from ssah_utils.loading import auto_class
from tests import mixtures
from tests.families import CONFIGS, VARIANTS, VOCABULARY

# Processes of pytest-xdist share the cores, as do the processes that tests start: two that take all
# of them each wait for one another, many times longer than they compute.
if (n_processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    n_threads = max(1, torch.get_num_threads() // n_processes)
    torch.set_num_threads(n_threads)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)

# Families of which each lays its matrices out in another way; of the others, test_families.py.
LAYOUTS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2")


def tiny_model(name: str) -> nn.Module:
    """Seeded float32 model in evaluation mode; biases and norms are random too, so that none is
    trivially zero or one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = (CONFIGS | VARIANTS | mixtures.CONFIGS)[name]()
        model = auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def writers_by_name(model: nn.Module, kind: str) -> list[nn.Module]:
    """What the tests hold against ``models.writers``: the modules whose qualified name ends as a
    writer's does.
    """
    endings = {"attention": ("o_proj", "attn.c_proj"), "mlp": ("down_proj", "mlp.c_proj")}[kind]
    return [module for name, module in model.named_modules() if name.endswith(endings)]


def compiled_blocks(model: nn.Module) -> nn.Module:
    for layer, block in enumerate(model.base_model.layers):
        model.base_model.layers[layer] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_backbone(model: nn.Module) -> nn.Module:
    model.base_model.compile(backend="eager")
    return model


# Ways to compile a model of the Llama family; "eager" keeps the arithmetic, so results are the same
# bits.
COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "whole": lambda model: torch.compile(model, backend="eager"),
    "in place": compiled_in_place,
    "backbone": compiled_backbone,
    "blocks": compiled_blocks,
}


def n_hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_parameters(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a test that takes minutes come first, so that no process ends alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def old_objects() -> None:
    """What is there before a file's first test is not looked through for garbage any more.

    Every training collects garbage, twice, and beside all tests and libraries that took longer than
    the training of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, as more only wait for each other on tensors this small; all that there are for
    the embedded model.
    """
    before = torch.get_num_threads()
    if not request.node.get_closest_marker("real_model"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """No test finds the open figures of another one of its process."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture
def drawn_in_our_style() -> Iterator[None]:
    """Figures as a run draws them, whatever ran before; the style is gone afterwards."""
    import matplotlib.pyplot as plt

    from ssah_utils.figures import style

    with plt.rc_context():
        plt.switch_backend("agg")
        style.set_style()
        yield


@pytest.fixture(scope="session")
def tiny_models() -> Callable[[str], nn.Module]:
    """A fresh tiny model by the name of its architecture."""
    return tiny_model


@pytest.fixture
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def shallow_llama() -> nn.Module:
    """Of one block, for what takes long per block, such as compiling."""
    model = tiny_model("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


@pytest.fixture(params=LAYOUTS)
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture
def token_ids() -> Tensor:
    """Two sequences of 9 tokens, none of them special: (2, 9)."""
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: ``w3`` is token 3."""
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCABULARY))]
    inner = Tokenizer(
        token_models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def saved_llama(tmp_path: Path, llama: nn.Module, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder as ``from_pretrained`` reads it: the weights of ``llama`` and ``tokenizer``."""
    folder = tmp_path / "saved-llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of one's own: nothing trained there, but downloads and the embedded model
    shared with the real one.
    """
    shared, folder = cache_dir().absolute(), tmp_path / "cache"
    folder.mkdir()
    for name in ("models", "wheels"):
        (shared / name).mkdir(exist_ok=True)
        os.symlink(shared / name, folder / name)
    monkeypatch.setenv("SSAH_CACHE", str(folder))
    return folder
