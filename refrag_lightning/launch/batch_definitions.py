"""Job definitions with more shared memory.

A container has 64 MB of /dev/shm unless its job definition says otherwise, too little for a
DataLoader's workers, and a submitted job cannot override it. So `--shm` takes a definition derived
from the chosen one, under a name of its own (`refrag-single` with 16 GiB becomes
`refrag-single-shm-16384`): a new revision of `refrag-single` itself would be what later jobs get
without asking. The derived definition is registered again only where the newest revision of that
name differs from what it should be, as after a change of the original.
"""

from __future__ import annotations

import copy
from typing import Any

# What `describe_job_definitions` adds to what was registered.
_DESCRIBED = ("jobDefinitionArn", "revision", "status", "containerOrchestrationType")


def describe_definition(batch: Any, name: str) -> dict[str, Any]:
    """The newest active revision of a job definition, or the one that is named.

    Args:
        batch: A boto3 client of Batch.
        name: A name, `name:revision` or an ARN.

    Raises:
        ValueError: If there is no such active definition.
        botocore.exceptions.ClientError: If Batch refuses.
    """
    found = _newest(batch, name)
    if found is None:
        raise ValueError(f"there is no active job definition {name!r} in {batch.meta.region_name}")
    return found


def with_shared_memory(definition: dict[str, Any], mib: int) -> dict[str, Any]:
    """The request of `register_job_definition` for a definition with more shared memory.

    Args:
        definition: The original, as Batch describes it.
        mib: Size of /dev/shm, MiB.

    Raises:
        ValueError: If its containers are not of a kind that has such a setting here.
    """
    request = {
        key: copy.deepcopy(value)
        for key, value in definition.items()
        if key not in _DESCRIBED and value not in (None, {}, [])
    }
    name = definition["jobDefinitionName"]
    request["jobDefinitionName"] = f"{name}-shm-{mib}"
    # Tags of AWS's own cannot be set.
    if tags := {k: v for k, v in request.pop("tags", {}).items() if not k.startswith("aws:")}:
        request["tags"] = tags
    if definition["type"] == "multinode":
        ranges = request["nodeProperties"]["nodeRangeProperties"]
        containers = [node_range.get("container") for node_range in ranges]
    else:
        containers = [request.get("containerProperties")]
    for container in containers:
        if container is None:
            raise ValueError(f"--shm needs a job definition with a plain container, unlike {name}")
        container.setdefault("linuxParameters", {})["sharedMemorySize"] = mib
    return request


def registered(batch: Any, request: dict[str, Any]) -> str | None:
    """`name:revision` of the newest revision, if it is what would be registered.

    Args:
        batch: A boto3 client of Batch.
        request: A request of `register_job_definition`.

    Raises:
        botocore.exceptions.ClientError: If Batch refuses.
    """
    newest = _newest(batch, request["jobDefinitionName"])
    if newest is None:
        return None
    cleaned = {
        key: value
        for key, value in newest.items()
        if key not in _DESCRIBED and value not in (None, {}, [])
    }
    if cleaned != request:
        return None
    return f"{newest['jobDefinitionName']}:{newest['revision']}"


def register(batch: Any, request: dict[str, Any]) -> str:
    """Registers a job definition and returns its `name:revision`.

    Raises:
        botocore.exceptions.ClientError: If Batch refuses.
    """
    answer = batch.register_job_definition(**request)
    return f"{answer['jobDefinitionName']}:{answer['revision']}"


def _newest(batch: Any, name: str) -> dict[str, Any] | None:
    # By a bare name all revisions can be asked for; a revision or an ARN names one.
    bare = ":" not in name
    which = {"jobDefinitionName": name} if bare else {"jobDefinitions": [name]}
    pages = batch.get_paginator("describe_job_definitions").paginate(status="ACTIVE", **which)
    found = [definition for page in pages for definition in page["jobDefinitions"]]
    return max(found, key=lambda definition: definition["revision"], default=None)
