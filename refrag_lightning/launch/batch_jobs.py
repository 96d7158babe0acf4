"""What Batch says of a job, in the parts that are shown: its state, its nodes, attempts and result.

A multi-node job has a job of its own for every node, called `<id>#0`, `<id>#1` and so on, with the
node's log streams. Its own state, times and result are the main node's.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, NamedTuple

ENDED = ("SUCCEEDED", "FAILED")
_LOG_GROUP = "/aws/batch/job"
# Batch describes so many jobs at a time.
_PAGE = 100


class Stream(NamedTuple):
    """A log stream of CloudWatch.

    Attributes:
        group: Its log group.
        name: Its name.
        node: The node it belongs to, None in a job of one node.
        attempt: The attempt it belongs to, from 1.
    """

    group: str
    name: str
    node: int | None
    attempt: int


def describe(batch: Any, job_id: str) -> dict[str, Any]:
    """What Batch says of a job.

    Raises:
        ValueError: If it knows no such job.
        botocore.exceptions.ClientError: If it refuses.
    """
    jobs = batch.describe_jobs(jobs=[job_id])["jobs"]
    if not jobs:
        raise ValueError(
            f"there is no job {job_id!r} in {batch.meta.region_name}; Batch forgets jobs some days "
            "after their end"
        )
    return jobs[0]


def describe_nodes(batch: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What Batch says of the nodes of a multi-node job; of another job, the job itself.

    Raises:
        botocore.exceptions.ClientError: If it refuses.
    """
    # A node's own job has node properties too.
    num_nodes = job.get("nodeProperties", {}).get("numNodes")
    if num_nodes is None or "#" in job["jobId"]:
        return [job]
    names = [f"{job['jobId']}#{node}" for node in range(num_nodes)]
    found = []
    for first in range(0, num_nodes, _PAGE):
        found += batch.describe_jobs(jobs=names[first : first + _PAGE])["jobs"]
    # The log group stands in the definition, which a node's job need not repeat.
    found = [{"nodeProperties": job["nodeProperties"], **node} for node in found]
    return sorted(found, key=lambda node: int(node["jobId"].rpartition("#")[2]))


def streams(nodes: list[dict[str, Any]]) -> list[Stream]:
    """The log streams of a job's nodes, attempt by attempt."""
    found: list[Stream] = []
    for node in nodes:
        container = node.get("container") or {}
        ranges = node.get("nodeProperties", {}).get("nodeRangeProperties", ())
        configured = [
            part.get("logConfiguration", {}).get("options", {}).get("awslogs-group")
            for part in (container, *(node_range.get("container", {}) for node_range in ranges))
        ]
        group = next(filter(None, configured), _LOG_GROUP)
        attempts = [attempt.get("container", {}) for attempt in node.get("attempts", ())]
        # The attempt that runs is not among the attempts yet.
        names = [part.get("logStreamName") for part in (*attempts, container)]
        _, number, index = node["jobId"].partition("#")
        which = int(index) if number else None
        for attempt, name in enumerate(names, start=1):
            if name and not any(stream.name == name for stream in found):
                found.append(Stream(group, name, which, attempt))
    return sorted(found, key=lambda stream: (stream.attempt, stream.node or 0))


def result(job: dict[str, Any]) -> str:
    """How a job ended, on one line: its state, exit code and reasons."""
    attempts = job.get("attempts") or [{}]
    container = {**attempts[-1].get("container", {}), **(job.get("container") or {})}
    parts = []
    if (code := container.get("exitCode")) is not None:
        parts.append(f"exit code {code}")
    if job["status"] == "FAILED":
        for reason in (container.get("reason"), job.get("statusReason")):
            if reason and reason not in parts:
                parts.append(reason)
    if len(attempts) > 1:
        parts.append(f"{len(attempts)} attempts")
    if job.get("startedAt") and job.get("stoppedAt"):
        parts.append(f"{(job['stoppedAt'] - job['startedAt']) / 60000:.1f} minutes")
    return f"{job['status']}: {', '.join(parts)}" if parts else job["status"]


def summary(job: dict[str, Any], nodes: list[dict[str, Any]]) -> str:
    """A job on some lines. Its variables are not among them.

    Args:
        job: The job.
        nodes: Its nodes, as `describe_nodes` gives them.
    """
    lines = [
        ("job", f"{job['jobId']} ({job['jobName']})"),
        ("state", result(job) if job["status"] in ENDED else _state(job)),
        ("queue", job["jobQueue"].rpartition("/")[2]),
        ("definition", job["jobDefinition"].rpartition("/")[2]),
    ]
    for label, key in (
        ("submitted", "createdAt"),
        ("started", "startedAt"),
        ("ended", "stoppedAt"),
    ):
        if job.get(key):
            lines.append((label, _time(job[key])))
    if len(nodes) > 1:
        for node in nodes:
            text = result(node) if node["status"] in ENDED else _state(node)
            lines.append((f"node {node['jobId'].rpartition('#')[2]}", text))
    for stream in streams(nodes):
        which = "" if stream.node is None else f", node {stream.node}"
        lines.append((f"log, attempt {stream.attempt}{which}", f"{stream.group} {stream.name}"))
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def _state(job: dict[str, Any]) -> str:
    reason = job.get("statusReason")
    return f"{job['status']}: {reason}" if reason else job["status"]


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
