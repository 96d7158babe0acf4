"""Requests to AWS Batch, as plain dictionaries made from what a user asked for.

A job of one node overrides the container of its job definition; a job of several overrides that
of its one open node range, which the definition has to spell `0:` as well (Batch refuses targets
that the definition does not have). The image's entry point is `refrag_lightning.launch.bootstrap`,
so the command is what follows `--` on the command line, and the checkout is told by two variables.

Batch counts attempts. What is tried again:

- One node: an instance that was lost (`Host EC2 ... terminated`, which is how a reclaimed Spot
  instance looks), a container that was asked to end (exit code 143) or never started. A run that
  failed by itself would fail again, and is left. Batch never retries a job that was cancelled or
  ran out of time.
- Several nodes: any failure of the main node but exit code 2, a command that cannot be understood.
  A lost node shows on the main node as some error of its own, and Batch does not retry for the
  loss of another node than the main one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from refrag_lightning.launch import bootstrap

MAX_RETRIES = 9
MIN_TIMEOUT = 60
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Job:
    """What a user asks for.

    Attributes:
        name: The job's name.
        command: The words after `--`: a subcommand and its options.
        num_nodes: Machines.
        num_gpus: GPUs of each; 0 for none.
        vcpus: Virtual CPUs of each; None leaves the job definition's.
        memory_gib: Memory of each, GiB; None leaves the job definition's.
        timeout: Seconds that an attempt may take.
        retries: Attempts after the first.
        variables: The user's own environment variables.
    """

    name: str
    command: Sequence[str]
    num_nodes: int = 1
    num_gpus: int = 1
    vcpus: int | None = None
    memory_gib: float | None = None
    timeout: int = 86400
    retries: int = 2
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _JOB_NAME.fullmatch(self.name):
            raise ValueError(
                f"--name {self.name!r} has to be 1 to 128 letters, digits, hyphens and underscores"
            )
        if not self.command:
            raise ValueError("no command: put it after --, as in `-- fit --config FILE`")
        if "" in self.command:
            raise ValueError("the command has an empty word, which Batch does not take")
        for flag, value, least in (
            ("--nodes", self.num_nodes, 1),
            ("--gpus", self.num_gpus, 0),
            ("--vcpus", self.vcpus, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{flag} {value} has to be at least {least}")
        if self.memory_gib is not None and self.memory_gib * 1024 < 4:
            raise ValueError(f"--memory {self.memory_gib:g} has to be at least 4 MiB")
        if not 0 <= self.retries <= MAX_RETRIES:
            raise ValueError(f"--retries {self.retries} has to be between 0 and {MAX_RETRIES}")
        if self.timeout < MIN_TIMEOUT:
            raise ValueError(f"--timeout of {self.timeout} s has to be at least {MIN_TIMEOUT} s")
        for name in self.variables:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"--env {name!r} is no name of a variable")
            if name.startswith("AWS_BATCH") or name in (bootstrap.ADDRESS, bootstrap.SHA256):
                raise ValueError(f"--env {name} is set for every job already")


def parse_timeout(text: str) -> int:
    """Seconds of `90m`, `12h`, `2d`, `3600s` or `3600`.

    Raises:
        ValueError: If it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not found:
        raise ValueError(f"--timeout {text!r} has to be a time: 90m, 12h, 2d, or seconds")
    return round(float(found[1]) * _UNITS[found[2] or "s"])


def job_name(command: Sequence[str]) -> str:
    """A name from a command: `fit --config configs/align.yaml` gives `fit-align`."""
    words = [command[0]] if command else []
    for option, value in pairwise(command):
        if option == "--config":
            words.append(value.rpartition("/")[2].partition(".")[0])
            break
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(words)).strip("-_")
    return name[:128] or "job"


def submit_request(
    job: Job,
    *,
    queue: str,
    definition: str,
    address: str,
    sha256: str,
    commit: str,
    project: str = "refrag",
) -> dict[str, Any]:
    """The request of `submit_job`.

    Args:
        job: What is asked for.
        queue: The job queue.
        definition: The job definition.
        address: Where the checkout lies, `s3://bucket/key`.
        sha256: The SHA-256 of its tar.
        commit: The commit it was made from, for the run's records.
        project: Value of the tag `Project`; the policy of infra/iam.tf lets people cancel those
            jobs only that have it.
    """
    container = _container(
        job,
        {
            "GIT_COMMIT": commit,
            **job.variables,
            bootstrap.ADDRESS: address,
            bootstrap.SHA256: sha256,
        },
    )
    request: dict[str, Any] = {
        "jobName": job.name,
        "jobQueue": queue,
        "jobDefinition": definition,
        "retryStrategy": retry_strategy(job.retries, num_nodes=job.num_nodes),
        "timeout": {"attemptDurationSeconds": job.timeout},
        "tags": {"Project": project},
    }
    if job.num_nodes == 1:
        request["containerOverrides"] = container
    else:
        request["nodeOverrides"] = {
            "numNodes": job.num_nodes,
            "nodePropertyOverrides": [{"targetNodes": "0:", "containerOverrides": container}],
        }
    return request


def retry_strategy(retries: int, *, num_nodes: int) -> dict[str, Any]:
    """The retry strategy of the module's docstring.

    Args:
        retries: Attempts after the first.
        num_nodes: Nodes of the job.
    """
    if not retries:
        return {"attempts": 1}
    if num_nodes > 1:
        rules = [{"onExitCode": "2", "action": "EXIT"}]
    else:
        # The first rule that fits decides; without the last one, the rest would be retried.
        rules = [
            {"onStatusReason": "Host EC2*", "action": "RETRY"},
            {"onStatusReason": "Task failed to start*", "action": "RETRY"},
            {"onExitCode": "143", "action": "RETRY"},
            {"onReason": "*", "action": "EXIT"},
        ]
    return {"attempts": retries + 1, "evaluateOnExit": rules}


def _container(job: Job, variables: Mapping[str, str]) -> dict[str, Any]:
    resources = [
        {"type": kind, "value": str(value)}
        for kind, value in (
            ("VCPU", job.vcpus),
            ("MEMORY", None if job.memory_gib is None else round(job.memory_gib * 1024)),
            # A request for 0 GPUs is refused.
            ("GPU", job.num_gpus or None),
        )
        if value is not None
    ]
    container: dict[str, Any] = {
        "command": list(job.command),
        "environment": [{"name": name, "value": variables[name]} for name in sorted(variables)],
    }
    if resources:
        container["resourceRequirements"] = resources
    return container
