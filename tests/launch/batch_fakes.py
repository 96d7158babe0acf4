"""A Batch and a CloudWatch that do as a test says, with the clock of the test."""

from __future__ import annotations

from typing import Any

Answer = dict[str, Any]


class FakeBatch:
    """Describes jobs as they are at a time; the time moves when somebody sleeps."""

    class meta:
        region_name = "eu-central-1"

    def __init__(self, timelines: dict[str, list[Answer]]) -> None:
        """Takes what each job is at times 0, 1, 2, ...; the last one stays."""
        self.timelines = timelines
        self.time = 0
        self.pauses: list[float] = []
        self.failures: list[Exception] = []

    def describe_jobs(self, jobs: list[str]) -> Answer:
        if self.failures:
            raise self.failures.pop(0)
        found = []
        for name in jobs:
            if timeline := self.timelines.get(name):
                now = timeline[min(self.time, len(timeline) - 1)]
                found.append({"jobId": name, "jobName": "n", **now})
        # Batch gives no order.
        return {"jobs": found[::-1]}

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += 1


class FakeLogs:
    """Streams whose lines arrive at given times, in pages, with CloudWatch's tokens.

    A token stands for the place behind what was given, and comes back where nothing follows.
    """

    class exceptions:
        class ResourceNotFoundException(Exception):
            """There is no such stream yet."""

    def __init__(
        self, batch: FakeBatch, arrivals: dict[str, list[tuple[int, str]]], page: int = 2
    ) -> None:
        """Takes (time of arrival, line) in the streams' order, by the streams' names."""
        self.batch = batch
        self.arrivals = arrivals
        self.page = page
        self.groups: set[str] = set()

    def get_log_events(
        self,
        *,
        logGroupName: str,
        logStreamName: str,
        startFromHead: bool,
        nextToken: str | None = None,
    ) -> Answer:
        self.groups.add(logGroupName)
        there = [line for time, line in self.arrivals[logStreamName] if time <= self.batch.time]
        if not there:
            raise self.exceptions.ResourceNotFoundException
        assert startFromHead
        begin = 0 if nextToken is None else int(nextToken.removeprefix("f/"))
        lines = there[begin : begin + self.page]
        return {
            "events": [{"timestamp": 0, "message": line} for line in lines],
            "nextForwardToken": f"f/{begin + len(lines)}",
            "nextBackwardToken": f"b/{begin}",
        }
