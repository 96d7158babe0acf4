"""Job definitions with more shared memory: copies, registered when they are needed."""

from __future__ import annotations

import pytest

from refrag_lightning.launch.batch_definitions import (
    describe_definition,
    register,
    registered,
    with_shared_memory,
)
from tests.launch.conftest import REGION

CONTAINER = {
    "image": "image:1",
    "command": ["--help"],
    "resourceRequirements": [
        {"type": "VCPU", "value": "4"},
        {"type": "MEMORY", "value": "14000"},
    ],
    "linuxParameters": {"initProcessEnabled": True, "sharedMemorySize": 64},
}


@pytest.fixture
def batch(aws):
    import boto3

    client = boto3.client("batch", region_name=REGION)
    client.register_job_definition(
        jobDefinitionName="single",
        type="container",
        containerProperties=CONTAINER,
        timeout={"attemptDurationSeconds": 100},
        platformCapabilities=["EC2"],
        tags={"Project": "refrag"},
    )
    return client


def test_a_copy_is_registered_once_and_again_when_the_original_changes(batch):
    original = describe_definition(batch, "single")
    request = with_shared_memory(original, 16384)
    assert request["jobDefinitionName"] == "single-shm-16384"
    assert request["containerProperties"]["linuxParameters"] == {
        "initProcessEnabled": True,
        "sharedMemorySize": 16384,
    }
    assert original["containerProperties"]["linuxParameters"]["sharedMemorySize"] == 64
    same = {"containerProperties", "jobDefinitionName"}
    assert {k: v for k, v in request.items() if k not in same} == {
        "type": "container",
        "timeout": {"attemptDurationSeconds": 100},
        "platformCapabilities": ["EC2"],
        "tags": {"Project": "refrag"},
    }
    assert registered(batch, request) is None
    assert register(batch, request) == "single-shm-16384:1"
    assert registered(batch, request) == "single-shm-16384:1"

    changed = CONTAINER | {"image": "image:2"}
    batch.register_job_definition(
        jobDefinitionName="single", type="container", containerProperties=changed
    )
    newer = with_shared_memory(describe_definition(batch, "single"), 16384)
    assert newer["containerProperties"]["image"] == "image:2"
    assert registered(batch, newer) is None
    assert register(batch, newer) == "single-shm-16384:2"
    # A revision that is named is the one that is copied. (moto knows it by its ARN alone.)
    older = with_shared_memory(describe_definition(batch, original["jobDefinitionArn"]), 16384)
    assert older["containerProperties"]["image"] == "image:1"


def test_one_that_is_not_there_is_told(batch):
    for name in ("double", "single:7"):
        with pytest.raises(ValueError, match=f"no active job definition '{name}' in eu-central-1"):
            describe_definition(batch, name)


def test_every_range_of_nodes_gets_it(aws_environment):
    """As Batch describes it; moto leaves out what nodes have."""
    import boto3
    from botocore.stub import Stubber

    arn = f"arn:aws:batch:{REGION}:123456789012:job-definition/multi:2"
    container = {"image": "image:1", "command": [], "secrets": []}
    described = {
        "jobDefinitionName": "multi",
        "jobDefinitionArn": arn,
        "revision": 2,
        "status": "ACTIVE",
        "type": "multinode",
        "containerOrchestrationType": "ECS",
        "parameters": {},
        "tags": {"aws:cloudformation:stack": "x"},
        "nodeProperties": {
            "numNodes": 2,
            "mainNode": 0,
            "nodeRangeProperties": [{"targetNodes": "0:", "container": container}],
        },
    }
    expected = {
        "jobDefinitionName": "multi-shm-1024",
        "type": "multinode",
        "nodeProperties": {
            "numNodes": 2,
            "mainNode": 0,
            "nodeRangeProperties": [
                {
                    "targetNodes": "0:",
                    "container": container | {"linuxParameters": {"sharedMemorySize": 1024}},
                }
            ],
        },
    }
    answer = {"jobDefinitionName": "multi-shm-1024", "jobDefinitionArn": arn, "revision": 1}
    batch = boto3.client("batch", region_name=REGION)
    with Stubber(batch) as stubber:
        stubber.add_response(
            "describe_job_definitions",
            {"jobDefinitions": [described | {"revision": 1}, described]},
            {"jobDefinitionName": "multi", "status": "ACTIVE"},
        )
        stubber.add_response("register_job_definition", answer, expected)
        request = with_shared_memory(describe_definition(batch, "multi"), 1024)
        assert register(batch, request) == "multi-shm-1024:1"


def test_other_kinds_of_containers_are_refused():
    definition = {"jobDefinitionName": "pods", "type": "container", "eksProperties": {"x": 1}}
    with pytest.raises(ValueError, match="--shm needs a job definition with a plain container"):
        with_shared_memory(definition, 1024)
