"""Following a job: every line once, every state, the result, and errors that pass."""

from __future__ import annotations

import time

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from hypothesis import given
from hypothesis import strategies as st

from refrag_lightning.launch.follow import Logs, follow
from tests.launch.batch_fakes import FakeBatch, FakeLogs

BEFORE = {"status": "RUNNABLE", "container": {}}
RUNNING = {"status": "RUNNING", "container": {"logStreamName": "s"}}
SUCCEEDED = {"status": "SUCCEEDED", "container": {"logStreamName": "s", "exitCode": 0}}


def run(batch: FakeBatch, logs: FakeLogs) -> tuple[bool, list[str], list[str]]:
    lines: list[str] = []
    told: list[str] = []
    succeeded = follow(batch, logs, "1", write=lines.append, tell=told.append, sleep=batch.sleep)
    return succeeded, lines, told


def test_states_lines_and_result():
    states = [
        {"status": "SUBMITTED", "container": {}},
        BEFORE | {"statusReason": "no room yet"},
        {"status": "STARTING", "container": {}},
        RUNNING,
        RUNNING,
        SUCCEEDED,
    ]
    batch = FakeBatch({"1": states})
    # The last line arrives after the job has ended.
    logs = FakeLogs(batch, {"s": [(3, "a"), (4, "b"), (4, "c"), (4, "d"), (7, "e")]})
    assert run(batch, logs) == (
        True,
        ["a", "b", "c", "d", "e"],
        ["SUBMITTED", "RUNNABLE: no room yet", "STARTING", "RUNNING", "SUCCEEDED: exit code 0"],
    )
    assert logs.groups == {"/aws/batch/job"}
    # Three looks without a line after the last one, at time 7.
    assert batch.time == 10


@given(
    delays=st.lists(st.tuples(st.integers(0, 3), st.text(max_size=2)), max_size=30),
    page=st.integers(1, 4),
)
def test_no_line_is_lost_or_doubled(delays, page):
    time, arrivals = 0, []
    for delay, line in delays:
        time += delay
        arrivals.append((time, line))
    batch = FakeBatch({"1": [RUNNING] * (time + 1) + [SUCCEEDED]})
    succeeded, lines, _ = run(batch, FakeLogs(batch, {"s": arrivals}, page))
    assert succeeded
    assert lines == [line for _, line in arrivals]


def test_a_second_attempt_is_announced_and_a_failure_told():
    first = {"container": {"logStreamName": "s", "exitCode": 143}}
    again = {"status": "RUNNING", "attempts": [first], "container": {"logStreamName": "t"}}
    ended = {
        "status": "FAILED",
        "statusReason": "Essential container in task exited",
        "attempts": [first, {"container": {"logStreamName": "t", "exitCode": 1}}],
        "container": {"logStreamName": "t", "exitCode": 1},
    }
    batch = FakeBatch({"1": [RUNNING, BEFORE, again, ended]})
    logs = FakeLogs(batch, {"s": [(0, "a"), (2, "late")], "t": [(2, "b"), (3, "c")]})
    assert run(batch, logs) == (
        False,
        ["a", "late", "--- attempt 2", "b", "c"],
        [
            "RUNNING",
            "RUNNABLE",
            "RUNNING",
            "FAILED: exit code 1, Essential container in task exited, 2 attempts",
        ],
    )


def test_lines_of_several_nodes_say_which():
    nodes = {"nodeProperties": {"numNodes": 2}}
    bad = {"status": "FAILED", "container": {"logStreamName": "t", "exitCode": 1, "reason": "x"}}
    batch = FakeBatch(
        {
            "1": [nodes | {"status": "RUNNING"}, nodes | {"status": "FAILED"}],
            "1#0": [RUNNING],
            "1#1": [RUNNING | {"container": {"logStreamName": "t"}}, bad],
        }
    )
    logs = FakeLogs(batch, {"s": [(0, "a"), (1, "b")], "t": [(0, "c"), (2, "d")]})
    assert run(batch, logs) == (
        False,
        ["[0] a", "[1] c", "[0] b", "[1] d"],
        ["RUNNING", "FAILED", "node 1 FAILED: exit code 1, x"],
    )


def test_pauses_grow_to_half_a_minute_while_nothing_happens():
    batch = FakeBatch({"1": [RUNNING] * 12 + [SUCCEEDED]})
    run(batch, FakeLogs(batch, {"s": [(10, "a")]}))
    # By 1.5 from 2 on: 2, 3, 4.5, ... and from 2 again at the line of time 10.
    assert batch.pauses[:10] == [2, 3, 4.5, 6.75, 10.125, 15.1875, 22.78125, 30, 30, 30]
    assert batch.pauses[10:] == [2, 3, 2, 2, 2]


def refusal(status: int, code: str) -> Exception:
    said = {"Error": {"Code": code, "Message": "no"}}
    return ClientError(said | {"ResponseMetadata": {"HTTPStatusCode": status}}, "DescribeJobs")


def passing() -> list[Exception]:
    return [
        EndpointConnectionError(endpoint_url="x"),
        refusal(400, "ThrottlingException"),
        refusal(500, "ServerException"),
    ]


def test_errors_that_pass_are_waited_out():
    batch = FakeBatch({"1": [RUNNING] * 4 + [SUCCEEDED]})
    batch.failures = passing()
    assert run(batch, FakeLogs(batch, {"s": [(0, "a")]}))[:2] == (True, ["a"])


def test_an_error_after_the_end_does_not_hide_the_result():
    nodes = {"nodeProperties": {"numNodes": 1}}
    timelines = {"1": [nodes | {"status": "SUCCEEDED"}], "1#0": [SUCCEEDED]}
    batch = FakeBatch(timelines)
    sleep = batch.sleep

    def break_and_sleep(seconds: float) -> None:
        sleep(seconds)
        if batch.time < 3:
            batch.failures = passing()[:1]

    batch.sleep = break_and_sleep
    logs = FakeLogs(batch, {"s": [(0, "a"), (3, "b")]})
    assert run(batch, logs) == (True, ["[0] a", "[0] b"], ["SUCCEEDED"])


@pytest.mark.parametrize(
    ("failures", "left"),
    [
        (passing() * 4, 2),
        ([refusal(403, "AccessDeniedException")], 0),
        ([NoCredentialsError()], 0),
    ],
)
def test_other_errors_and_too_many_end_it(failures, left):
    batch = FakeBatch({"1": [RUNNING]})
    batch.failures = list(failures)
    with pytest.raises((ClientError, EndpointConnectionError, NoCredentialsError)):
        run(batch, FakeLogs(batch, {"s": []}))
    assert len(batch.failures) == left


def test_a_stream_is_read_on_from_where_it_was_left(aws):
    """Against another implementation of the tokens, moto's."""
    import boto3

    from refrag_lightning.launch.batch_jobs import Stream

    client = boto3.client("logs", region_name="eu-central-1")
    client.create_log_group(logGroupName="g")
    stream, lines = Stream("g", "s", None, 1), []
    reader = Logs(client, lines.append)
    assert reader.read([stream]) == 0
    client.create_log_stream(logGroupName="g", logStreamName="s")
    written = []
    for count in (0, 3, 0, 1, 5):
        new = [f"line {len(written) + index}" for index in range(count)]
        written += new
        if new:
            # moto, as CloudWatch, takes no lines of long ago.
            now = int(time.time() * 1000)
            events = [{"timestamp": now, "message": line} for line in new]
            client.put_log_events(logGroupName="g", logStreamName="s", logEvents=events)
        assert reader.read([stream]) == count
        assert lines == written
