"""Where jobs go: region, bucket, queues and job definitions.

A value is looked for on the command line, in the variable `REFRAG_BATCH_<NAME>`, in a YAML file,
and among the defaults, which are the names that the Terraform files under `infra/` give. The file
is `--settings FILE`, or what REFRAG_BATCH_SETTINGS names, or
`~/.config/refrag_lightning/batch.yaml`:

    region: eu-central-1
    bucket: my-bucket
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from refrag_lightning.launch.bootstrap import check_bucket, check_key

PREFIX = "REFRAG_BATCH_"
# Batch's own rules for names, and a project's for tags (infra/variables.tf).
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}"
_ARN = r"arn:aws[a-z-]*:batch:[a-z0-9-]+:\d{12}"
_QUEUE = re.compile(rf"{_NAME}|{_ARN}:job-queue/{_NAME}", re.ASCII)
_DEFINITION = re.compile(rf"({_ARN}:job-definition/)?{_NAME}(:\d+)?", re.ASCII)
_REGION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.:/=+@-]{0,254}")


@dataclass(frozen=True)
class Settings:
    """Where jobs go.

    Attributes:
        region: AWS region; None leaves it to AWS_REGION or the profile.
        bucket: Bucket of the checkouts.
        prefix: What the names of the checkouts in it begin with.
        cpu_queue: Queue of jobs without GPUs.
        gpu_queue: Queue of jobs with GPUs.
        cpu_spot_queue: Its Spot sibling, for jobs of one node.
        gpu_spot_queue: Its Spot sibling, for jobs of one node.
        single_definition: Job definition of one node: a name, `name:revision` or an ARN.
        multi_definition: Multi-node parallel job definition, with one open node range `0:`.
        project: Value of the tag `Project` of every job: whose jobs people may cancel.
    """

    region: str | None = None
    bucket: str | None = None
    prefix: str = "checkouts"
    cpu_queue: str = "refrag-cpu"
    gpu_queue: str = "refrag-gpu"
    cpu_spot_queue: str = "refrag-cpu-spot"
    gpu_spot_queue: str = "refrag-gpu-spot"
    single_definition: str = "refrag-single"
    multi_definition: str = "refrag-multi"
    project: str = "refrag"

    def __post_init__(self) -> None:
        if self.region is not None and not _REGION.fullmatch(self.region):
            raise ValueError(f"region {self.region!r} is not the name of an AWS region")
        if self.bucket:
            _checked("bucket", check_bucket, self.bucket)
        if self.prefix.strip("/"):
            _checked("prefix", check_key, self.prefix.strip("/"))
        for name in ("cpu_queue", "gpu_queue", "cpu_spot_queue", "gpu_spot_queue"):
            check_queue(getattr(self, name), name)
        for name in ("single_definition", "multi_definition"):
            check_definition(getattr(self, name), name)
        if not _PROJECT.fullmatch(self.project):
            raise ValueError(f"project {self.project!r} is not a value that a tag can have")

    def need_bucket(self) -> str:
        """The bucket.

        Raises:
            ValueError: If there is none.
        """
        if not self.bucket:
            raise ValueError(
                f"no bucket for the checkout: give --bucket, set {PREFIX}BUCKET, or put `bucket:` "
                "into the settings file"
            )
        return self.bucket

    def queue(self, *, num_gpus: int, num_nodes: int, spot: bool, given: str | None = None) -> str:
        """The queue for a job.

        Args:
            num_gpus: GPUs of a node.
            num_nodes: Nodes.
            spot: Whether Spot instances are asked for.
            given: A queue that the user named.

        Raises:
            ValueError: If several nodes are to run on Spot instances, which Batch does not do.
        """
        if given is None:
            if num_gpus:
                given = self.gpu_spot_queue if spot else self.gpu_queue
            else:
                given = self.cpu_spot_queue if spot else self.cpu_queue
        elif spot:
            raise ValueError(f"--spot chooses a queue, and --queue {given} has chosen one")
        if num_nodes > 1 and given in (self.cpu_spot_queue, self.gpu_spot_queue):
            raise ValueError(
                f"{num_nodes} nodes cannot run on Spot instances (queue {given}): Batch takes "
                "multi-node jobs on On-Demand instances only"
            )
        return given


def check_queue(queue: str, setting: str) -> None:
    """Raises ValueError, with the setting's name, if this is no name and no ARN of a job queue."""
    if not _QUEUE.fullmatch(queue):
        raise ValueError(
            f"{setting} {queue!r} is no job queue: a name of letters, digits, '-' and '_', or "
            "an ARN"
        )


def check_definition(definition: str, setting: str) -> None:
    """Raises ValueError if this is no name, `name:revision` or ARN of a job definition."""
    if not _DEFINITION.fullmatch(definition):
        raise ValueError(
            f"{setting} {definition!r} is no job definition: a name of letters, digits, '-' and "
            "'_', name:revision, or an ARN"
        )


def _checked(setting: str, check: Callable[[str], None], value: str) -> None:
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


def load_settings(
    flags: Mapping[str, str | None], environment: Mapping[str, str], file: str | None = None
) -> Settings:
    """The settings from everywhere.

    Args:
        flags: What the command line gave, None where it gave nothing.
        environment: This process's variables.
        file: The settings file that the command line named.

    Raises:
        ValueError: If the file holds something else than settings.
        OSError: If a file that was named cannot be read.
    """
    names = [field.name for field in fields(Settings)]
    values = _read(file or environment.get(f"{PREFIX}SETTINGS"), environment, names)
    for name in names:
        if value := environment.get(f"{PREFIX}{name.upper()}"):
            values[name] = value
        if (value := flags.get(name)) is not None:
            values[name] = value
    return Settings(**values)


def _read(file: str | None, environment: Mapping[str, str], names: list[str]) -> dict[str, str]:
    if file is None:
        home = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = Path(home) / "refrag_lightning" / "batch.yaml"
        if not path.is_file():
            return {}
    else:
        path = Path(file)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no settings: `name: value` lines are expected")
    for name, value in data.items():
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(names)}"
            raise ValueError(f"{path} has an unknown setting {name!r}; {hint}")
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name} has to be a string, not {value!r}")
    return dict(data)
