"""Requests of jobs: written out by hand, and checked by botocore against the service's model."""

from __future__ import annotations

import pytest

from refrag_lightning.launch.batch_requests import (
    Job,
    job_name,
    parse_timeout,
    retry_strategy,
    submit_request,
)
from tests.launch.conftest import REGION

SENT = {
    "address": "s3://bucket/checkouts/abc.tar.gz",
    "sha256": "abc",
    "commit": "c0ffee-dirty",
}
ENVIRONMENT = [
    {"name": "GIT_COMMIT", "value": "c0ffee-dirty"},
    {"name": "REFRAG_CHECKOUT", "value": "s3://bucket/checkouts/abc.tar.gz"},
    {"name": "REFRAG_CHECKOUT_SHA256", "value": "abc"},
]
ONE_NODE_RETRIES = [
    {"onStatusReason": "Host EC2*", "action": "RETRY"},
    {"onStatusReason": "Task failed to start*", "action": "RETRY"},
    {"onExitCode": "143", "action": "RETRY"},
    {"onReason": "*", "action": "EXIT"},
]


def test_one_node_with_gpus():
    job = Job(
        name="fit-align",
        command=["fit", "--config", "configs/align.yaml"],
        num_gpus=2,
        vcpus=16,
        memory_gib=60.5,
        timeout=43200,
        variables={"WANDB_MODE": "offline", "A": ""},
    )
    assert submit_request(job, queue="gpu", definition="single", **SENT) == {
        "jobName": "fit-align",
        "jobQueue": "gpu",
        "jobDefinition": "single",
        "retryStrategy": {"attempts": 3, "evaluateOnExit": ONE_NODE_RETRIES},
        "timeout": {"attemptDurationSeconds": 43200},
        "tags": {"Project": "refrag"},
        "containerOverrides": {
            "command": ["fit", "--config", "configs/align.yaml"],
            "environment": [
                {"name": "A", "value": ""},
                *ENVIRONMENT,
                {"name": "WANDB_MODE", "value": "offline"},
            ],
            "resourceRequirements": [
                {"type": "VCPU", "value": "16"},
                {"type": "MEMORY", "value": "61952"},
                {"type": "GPU", "value": "2"},
            ],
        },
    }


def test_one_node_that_takes_what_its_definition_says():
    job = Job(name="hello", command=["hello"], num_gpus=0, retries=0)
    request = submit_request(job, queue="cpu", definition="single", **SENT)
    assert request["containerOverrides"] == {"command": ["hello"], "environment": ENVIRONMENT}
    assert request["retryStrategy"] == {"attempts": 1}
    assert request["timeout"] == {"attemptDurationSeconds": 24 * 3600}


FOUR_NODES = {
    "jobName": "big",
    "jobQueue": "gpu",
    "jobDefinition": "multi:3",
    "retryStrategy": {
        "attempts": 2,
        "evaluateOnExit": [{"onExitCode": "2", "action": "EXIT"}],
    },
    "timeout": {"attemptDurationSeconds": 86400},
    "tags": {"Project": "refrag"},
    "nodeOverrides": {
        "numNodes": 4,
        "nodePropertyOverrides": [
            {
                "targetNodes": "0:",
                "containerOverrides": {
                    "command": ["fit", "--trainer.strategy", "ddp"],
                    "environment": ENVIRONMENT,
                    "resourceRequirements": [{"type": "GPU", "value": "8"}],
                },
            }
        ],
    },
}


def test_several_nodes(aws_environment):
    import boto3
    from botocore.stub import Stubber

    command = ["fit", "--trainer.strategy", "ddp"]
    job = Job(name="big", command=command, num_nodes=4, num_gpus=8, retries=1)
    request = submit_request(job, queue="gpu", definition="multi:3", **SENT)
    batch = boto3.client("batch", region_name=REGION)
    with Stubber(batch) as stubber:
        # The stubber compares every field with these, and all of them with the service's model.
        stubber.add_response("submit_job", {"jobName": "big", "jobId": "1"}, FOUR_NODES)
        assert batch.submit_job(**request)["jobId"] == "1"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "a b"}, "--name 'a b' has to be 1 to 128 letters"),
        ({"command": []}, "no command: put it after --"),
        ({"command": ["fit", ""]}, "an empty word"),
        ({"num_nodes": 0}, "--nodes 0 has to be at least 1"),
        ({"num_gpus": -1}, "--gpus -1 has to be at least 0"),
        ({"vcpus": 0}, "--vcpus 0 has to be at least 1"),
        ({"memory_gib": 0.001}, "--memory 0.001 has to be at least 4 MiB"),
        ({"retries": 10}, "--retries 10 has to be between 0 and 9"),
        ({"timeout": 59}, "--timeout of 59 s has to be at least 60 s"),
        ({"variables": {"A-B": "1"}}, "--env 'A-B' is no name of a variable"),
        ({"variables": {"AWS_BATCH_JOB_ID": "1"}}, "--env AWS_BATCH_JOB_ID is set for every job"),
        ({"variables": {"REFRAG_CHECKOUT": "1"}}, "--env REFRAG_CHECKOUT is set for every job"),
    ],
)
def test_what_batch_would_refuse_is_refused_here(wrong, message):
    with pytest.raises(ValueError, match=message):
        Job(**{"name": "a", "command": ["fit"]} | wrong)


def test_times_and_names():
    assert [parse_timeout(text) for text in ("90m", "1.5h", "2d", "75s", "3600")] == [
        5400,
        5400,
        172800,
        75,
        3600,
    ]
    for text in ("", "h", "-1h", "1 h", "1w"):
        with pytest.raises(ValueError, match="has to be a time"):
            parse_timeout(text)
    assert job_name(["fit", "--config", "configs/align.yaml", "--config", "b.yaml"]) == "fit-align"
    assert job_name(["test", "--model", "x"]) == "test"
    assert job_name(["fit", "--config", "a b!.v2.yaml"]) == "fit-a-b"
    assert job_name([]) == "job"


def first_match(rules: list[dict[str, str]], **end: str) -> str:
    """What Batch does: the first rule of which every condition fits; RETRY if there is none."""
    keys = {"onStatusReason": "status", "onReason": "reason", "onExitCode": "code"}
    for rule in rules:
        wanted = [(keys[key], value) for key, value in rule.items() if key in keys]
        if all(
            end[key].startswith(value[:-1]) if value.endswith("*") else end[key] == value
            for key, value in wanted
        ):
            return rule["action"]
    return "RETRY"


@pytest.mark.parametrize(
    ("status", "code", "one", "several"),
    [
        ("Host EC2 (instance i-0ab) terminated.", "", "RETRY", "RETRY"),
        ("Task failed to start", "", "RETRY", "RETRY"),
        ("Essential container in task exited", "143", "RETRY", "RETRY"),
        ("Essential container in task exited", "1", "EXIT", "RETRY"),
        ("Essential container in task exited", "137", "EXIT", "RETRY"),
        ("Essential container in task exited", "2", "EXIT", "EXIT"),
    ],
)
def test_what_is_tried_again(status, code, one, several):
    for num_nodes, action in ((1, one), (4, several)):
        rules = retry_strategy(2, num_nodes=num_nodes)["evaluateOnExit"]
        assert len(rules) <= 5
        assert first_match(rules, status=status, reason="", code=code) == action
