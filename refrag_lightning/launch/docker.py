"""Builds the image of this checkout and runs the command line in it.

    python scripts/run_docker.py -- fit --config configs/align.yaml
    python scripts/run_docker.py --gpus all -- fit --config configs/align.yaml
    python scripts/run_docker.py --jupyter
    python scripts/run_docker.py --no-build -- --exec bash
    python scripts/run_docker.py --dry-run --jupyter

What follows `--` goes to `python -m refrag_lightning` in the container; after `--exec` it is any
other command. Mounted are the checkout, so that its files count and not those in the image, its
folder runs/, and the model caches of this package and of the Hugging Face Hub. The container runs
under the caller's user id, so what it writes is the caller's.

Secrets are passed on by name: docker takes their values from the environment, and no command line
holds them. Only the standard library is needed here. The exit code is the container's; 1 where
docker is missing, 2 for a command that cannot be understood.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from refrag_lightning.launch.batch_secrets import is_secret_name, refuse_secrets
from refrag_lightning.launch.checkout import commit
from refrag_lightning.plain_text import say

WORKSPACE = "/workspace"
# The image's HF_HOME and REFRAG_CACHE.
HF_CACHE, REFRAG_CACHE = "/cache/huggingface", "/cache/refrag_lightning"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
_HOW = "export it and give `--env NAME`: docker takes the value from the environment"
# Docker's grammar of an image's name: registry, path, tag and digest. Nothing in it can be taken
# for an option.
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_HOST = (
    r"(?:[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*(?:\.[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*)*|\[[0-9a-fA-F:]+\])"
)
_IMAGE = re.compile(
    rf"(?:{_HOST}(?::\d{{1,5}})?/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?"
    r"(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_MAX_IMAGE = 400
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# By ids or names, as in /etc/passwd.
_USER = re.compile(r"[A-Za-z0-9_][\w.-]*(:[A-Za-z0-9_][\w.-]*)?", re.ASCII)


class Mount(NamedTuple):
    """A folder or file of this machine in the container.

    Attributes:
        source: The absolute path here.
        target: The absolute path there.
        read_only: Whether the container may not write to it.
        create: Whether the folder is made if it is not there; otherwise it has to be.
    """

    source: Path
    target: str
    read_only: bool = False
    create: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: The arguments; None takes those of the process.

    Returns:
        The exit code where nothing was run or the build failed. Otherwise the process becomes
        docker, whose exit code is the container's.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        words = sys.argv[1:] if arguments is None else arguments
        # Before anything can repeat a word of it.
        refuse_secrets(words, os.environ, how=_HOW)
        options = parse(words)
        mounts = [*default_mounts(options, root, os.environ), *map(parse_mount, options.mount)]
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        run = run_command(options, mounts, os.environ, terminal=terminal, commit=commit(root))
    except ValueError as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    build = build_command(options, root, os.environ)
    if options.dry_run:
        if options.build:
            say(shlex.join(build))
        say(shlex.join(run))
        return 0
    if shutil.which("docker") is None:
        say("error: there is no docker here; --dry-run prints what would be run", file=sys.stderr)
        return 1
    if options.build:
        say(shlex.join(build), file=sys.stderr, flush=True)
        if code := subprocess.run(build, check=False).returncode:
            return code
    for mount in mounts:
        if mount.create:
            # Docker would make it, but as root's.
            mount.source.mkdir(parents=True, exist_ok=True)
    say(shlex.join(run), file=sys.stderr, flush=True)
    # In this process's place, so that signals and the exit code are docker's own.
    os.execvp(run[0], run)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the options; what follows `--` is `command`.

    Args:
        arguments: The arguments.

    Raises:
        ValueError: If they cannot be understood.
    """
    words = list(arguments)
    place = words.index("--") if "--" in words else len(words)
    parser = _Parser(
        prog="run_docker.py",
        usage="run_docker.py [options] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--build", action=argparse.BooleanOptionalAction, default=True, help="build the image first"
    )
    parser.add_argument(
        "--variant", choices=("cpu", "cuda"), help="of torch (default: cuda with --gpus, else cpu)"
    )
    parser.add_argument(
        "--gpus", default="none", metavar="all|N|device=I,J|none", help="GPUs for the container"
    )
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:DST[:ro]",
        help="a folder or file of this machine, and where it is in the container",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help=f"a variable to set, or by name to pass on; {' and '.join(SECRETS)} always are",
    )
    parser.add_argument("--tag", help="the image's name (default: refrag_lightning:VARIANT)")
    parser.add_argument(
        "--shm",
        default="8g",
        metavar="SIZE",
        help="shared memory, which loader workers and several GPUs use (default: %(default)s)",
    )
    parser.add_argument("--user", metavar="UID:GID", help="the user id (default: the caller's)")
    parser.add_argument(
        "--checkout",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"mount the checkout over {WORKSPACE}; without it the image's files count",
    )
    parser.add_argument(
        "--jupyter", action="store_true", help="JupyterLab, at an address of this machine only"
    )
    parser.add_argument("--port", type=int, default=8888, help="of Jupyter (default: %(default)s)")
    parser.add_argument(
        "--build-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the build: TORCH_INDEX_URL, EXTRAS",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options, unknown = parser.parse_known_args(words[:place])
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no option; what the container shall run follows --")
    options.command = words[place + 1 :]
    if not re.fullmatch(r"none|all|[1-9]\d*|device=\w[\w,-]*", options.gpus, re.ASCII):
        raise ValueError(f"--gpus takes all, a number, device=0,1 or none, not {options.gpus!r}")
    if options.variant is None:
        options.variant = "cpu" if options.gpus == "none" else "cuda"
    if options.variant == "cpu" and options.gpus != "none":
        raise ValueError(f"--gpus {options.gpus} needs --variant cuda, not cpu")
    if options.jupyter and options.command:
        raise ValueError(f"--jupyter takes no command, and was given {options.command[0]!r}")
    if options.tag is None:
        options.tag = f"refrag_lightning:{options.variant}{'-jupyter' if options.jupyter else ''}"
    if len(options.tag) > _MAX_IMAGE or not _IMAGE.fullmatch(options.tag):
        raise ValueError(
            f"--tag takes an image's name, such as refrag_lightning:cpu, not {options.tag!r}"
        )
    if not re.fullmatch(r"[1-9]\d*[bkmg]?", options.shm, re.ASCII | re.IGNORECASE):
        raise ValueError(f"--shm takes a size such as 8g, not {options.shm!r}")
    if options.user is not None and not _USER.fullmatch(options.user):
        raise ValueError(f"--user takes UID:GID, not {options.user!r}")
    if not 1 <= options.port <= 65535:
        raise ValueError(f"--port takes 1 to 65535, not {options.port}")
    for assignment in options.build_arg:
        name, equals, _ = assignment.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise ValueError(f"--build-arg takes NAME=VALUE, not {_hidden(assignment)!r}")
    return options


def parse_mount(text: str) -> Mount:
    """Reads `SRC:DST`, `SRC:DST:ro` or `SRC:DST:rw`.

    Raises:
        ValueError: If it is none of these, `SRC` is not there, or `DST` is not absolute.
    """
    parts = text.split(":")
    if len(parts) == 2:
        parts.append("rw")
    if len(parts) != 3 or parts[2] not in ("ro", "rw") or not parts[0]:
        raise ValueError(f"--mount takes SRC:DST or SRC:DST:ro, not {text!r}")
    source = Path(parts[0]).expanduser().resolve()
    if not source.exists():
        raise ValueError(f"--mount {text}: there is no {source}")
    if not parts[1].startswith("/") or ".." in parts[1].split("/"):
        raise ValueError(f"--mount {text}: {parts[1]!r} has to be an absolute path without '..'")
    return Mount(source, parts[1], parts[2] == "ro")


def default_mounts(
    options: argparse.Namespace, root: Path, environment: Mapping[str, str]
) -> list[Mount]:
    """The checkout, its runs, and the model caches of this machine.

    Args:
        options: What `parse` returned.
        root: The checkout.
        environment: Variables; `REFRAG_CACHE` and `HF_HOME` say where the caches are.
    """

    def folder(variable: str, default: str) -> Path:
        return Path(environment.get(variable) or default).expanduser().resolve()

    checkout = [Mount(root, WORKSPACE)] if options.checkout else []
    # runs may be a link to a larger disk, which leads nowhere inside the container.
    runs = Mount((root / "runs").resolve(), f"{WORKSPACE}/runs", create=True)
    caches = [
        Mount(folder("REFRAG_CACHE", "~/.cache/refrag_lightning"), REFRAG_CACHE, create=True),
        Mount(folder("HF_HOME", "~/.cache/huggingface"), HF_CACHE, create=True),
    ]
    return [*checkout, runs, *caches]


def build_command(
    options: argparse.Namespace, root: Path, environment: Mapping[str, str]
) -> list[str]:
    """The `docker build` of a checkout.

    Args:
        options: What `parse` returned.
        root: The checkout.
        environment: Variables; `TORCH_INDEX_URL` says where the CPU build of torch is.
    """
    settings = [f"VARIANT={options.variant}"]
    if options.jupyter:
        settings.append("JUPYTER=true")
    if options.variant == "cpu" and environment.get("TORCH_INDEX_URL"):
        settings.append(f"TORCH_INDEX_URL={environment['TORCH_INDEX_URL']}")
    settings += options.build_arg
    return [
        *("docker", "build", "--file", str(root / "Dockerfile"), "--tag", options.tag),
        *(word for setting in settings for word in ("--build-arg", setting)),
        str(root),
    ]


def run_command(
    options: argparse.Namespace,
    mounts: Sequence[Mount],
    environment: Mapping[str, str],
    *,
    terminal: bool,
    commit: str = "none",
) -> list[str]:
    """The `docker run`.

    Args:
        options: What `parse` returned.
        mounts: What to mount, outer folders first.
        environment: Variables that may be passed on by name.
        terminal: Whether a person sits at both ends.
        commit: The checkout's commit, which a container without git cannot tell; `none` if there
            is none.

    Raises:
        ValueError: If a variable to pass on is not set, or a secret's value was given.
    """
    command = ["docker", "run", "--rm", "--init", "--interactive", *["--tty"] * terminal]
    command += ["--shm-size", options.shm]
    # Windows has no user ids, and its Docker maps files by itself.
    user = options.user or (f"{os.getuid()}:{os.getgid()}" if hasattr(os, "getuid") else None)
    if user:
        command += ["--user", user]
    if options.gpus != "none":
        # Docker reads the value as CSV, where a device list's commas need quotes.
        command += ["--gpus", _csv([options.gpus])]
    for mount in mounts:
        command += ["--mount", _mount_option(mount)]
    given = {setting.partition("=")[0]: setting for setting in options.env}
    for name, setting in given.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"--env takes NAME or NAME=VALUE, not {_hidden(setting)!r}")
        if "=" in setting and is_secret_name(name):
            raise ValueError(f"--env {name} would be readable by others: {_HOW}")
        if "=" not in setting and name not in environment:
            raise ValueError(f"--env {name}: {name} is not set here")
    # Docker passes on nothing for a name that is not set.
    settings = {name: name for name in SECRETS}
    if commit != "none":
        settings["GIT_COMMIT"] = f"GIT_COMMIT={commit}"
    for setting in (settings | given).values():
        command += ["--env", setting]
    if options.jupyter:
        command += ["--publish", f"127.0.0.1:{options.port}:{options.port}"]
    return [*command, options.tag, *_container_command(options)]


def _container_command(options: argparse.Namespace) -> list[str]:
    if not options.jupyter:
        return list(options.command)
    # Inside, the address is that of the container, which only the published port leads to.
    server = ["--ip=0.0.0.0", f"--port={options.port}", "--ServerApp.port_retries=0"]
    return ["--exec", "jupyter", "lab", *server, "--no-browser"]


def _mount_option(mount: Mount) -> str:
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    return _csv([*fields, "readonly"] if mount.read_only else fields)


def _csv(fields: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def _hidden(setting: str) -> str:
    name, equals, _ = setting.partition("=")
    return name + ("=..." if equals else "")
