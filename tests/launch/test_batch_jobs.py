"""What is shown of a job, from answers as Batch gives them."""

from __future__ import annotations

import pytest

from refrag_lightning.launch.batch_jobs import (
    Stream,
    describe,
    describe_nodes,
    result,
    streams,
    summary,
)
from tests.launch.batch_fakes import FakeBatch

PLACE = {
    "jobQueue": "arn:aws:batch:eu-central-1:123456789012:job-queue/refrag-gpu",
    "jobDefinition": "arn:aws:batch:eu-central-1:123456789012:job-definition/refrag-single:7",
}
GROUP = {"logDriver": "awslogs", "options": {"awslogs-group": "/aws/batch/refrag"}}
RETRIED = {
    "jobId": "1",
    "jobName": "fit-align",
    "status": "FAILED",
    "statusReason": "Essential container in task exited",
    **PLACE,
    # 2026-01-02 03:04:05 UTC, by `date -u -d @1767323045`.
    "createdAt": 1767323045000,
    "startedAt": 1767323105000,
    "stoppedAt": 1767323195000,
    "attempts": [
        {
            "statusReason": "Host EC2 (instance i-0) terminated.",
            "container": {"logStreamName": "first"},
        },
        {"container": {"logStreamName": "second", "exitCode": 1}},
    ],
    "container": {
        "logStreamName": "second",
        "exitCode": 1,
        "reason": "OutOfMemoryError: Container killed",
        "logConfiguration": GROUP,
        "environment": [{"name": "A", "value": "something private"}],
    },
}


def test_a_job_of_one_node_in_words():
    assert summary(RETRIED, [RETRIED]) == (
        "job             1 (fit-align)\n"
        "state           FAILED: exit code 1, OutOfMemoryError: Container killed, Essential "
        "container in task exited, 2 attempts, 1.5 minutes\n"
        "queue           refrag-gpu\n"
        "definition      refrag-single:7\n"
        "submitted       2026-01-02 03:04:05Z\n"
        "started         2026-01-02 03:05:05Z\n"
        "ended           2026-01-02 03:06:35Z\n"
        "log, attempt 1  /aws/batch/refrag first\n"
        "log, attempt 2  /aws/batch/refrag second"
    )


def test_a_job_that_waits_has_no_times_and_no_log():
    job = {
        "jobId": "1",
        "jobName": "a",
        "status": "RUNNABLE",
        "statusReason": "no room",
        "createdAt": 0,
        "container": {},
        **PLACE,
    }
    assert streams([job]) == []
    assert summary(job, [job]).splitlines()[1:] == [
        "state       RUNNABLE: no room",
        "queue       refrag-gpu",
        "definition  refrag-single:7",
    ]
    assert result({"status": "SUCCEEDED"}) == "SUCCEEDED"


def test_an_attempt_that_runs_follows_those_that_ended():
    running = {
        "jobId": "1",
        "attempts": [{"container": {}}, {"container": {"logStreamName": "b"}}],
        "container": {"logStreamName": "c"},
    }
    # The first never started, and has no log.
    assert streams([running]) == [
        Stream("/aws/batch/job", "b", None, 2),
        Stream("/aws/batch/job", "c", None, 3),
    ]


def test_nodes_have_jobs_and_logs_of_their_own():
    node_properties = {
        "numNodes": 102,
        "nodeRangeProperties": [{"targetNodes": "0:", "container": {"logConfiguration": GROUP}}],
    }
    parent = {"jobId": "1", "status": "RUNNING", "nodeProperties": node_properties}
    node = {"status": "RUNNING", "nodeDetails": {"nodeIndex": 0}}
    timelines = {
        f"1#{index}": [
            node
            | {
                "attempts": [{"container": {"logStreamName": f"old{index}"}}],
                "container": {"logStreamName": f"new{index}"},
            }
        ]
        for index in range(102)
    }
    timelines["1"] = [parent]
    batch = FakeBatch(timelines)
    nodes = describe_nodes(batch, describe(batch, "1"))
    assert [each["jobId"] for each in nodes] == [f"1#{index}" for index in range(102)]
    found = streams(nodes)
    assert found[0] == Stream("/aws/batch/refrag", "old0", 0, 1)
    assert found[101:103] == [
        Stream("/aws/batch/refrag", "old101", 101, 1),
        Stream("/aws/batch/refrag", "new0", 0, 2),
    ]
    # A node's own job is one of one node, although it has node properties.
    alone = describe(batch, "1#5") | {"nodeProperties": node_properties}
    assert describe_nodes(batch, alone) == [alone]


def test_a_job_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="there is no job 'x' in eu-central-1"):
        describe(FakeBatch({}), "x")
