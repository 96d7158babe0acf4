"""Following a job: its states and the lines of its log, until it ends.

CloudWatch has no end of a stream: a page comes with a token for what follows it, and when nothing
does, the token that was given comes back. Keeping the last token of each stream gives every line
once, however often it is asked. Lines arrive some seconds after they were written, so once the job
has ended the streams are read until nothing new came for a while.

Between two looks lie 2 seconds, growing to 30 while nothing happens. A look that fails for a
passing reason (throttling, a lost connection) is repeated, ten times in a row at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from refrag_lightning.launch import batch_jobs
from refrag_lightning.launch.batch_clients import is_passing
from refrag_lightning.launch.batch_jobs import Stream
from refrag_lightning.plain_text import say

_SHORTEST, _LONGEST = 2.0, 30.0
_FAILURES = 10
# Looks without a new line after which an ended job's log is complete, and looks at all.
_QUIET, _LAST_LOOKS = 3, 15


class Logs:
    """The log of a job, read piece by piece.

    Args:
        client: A boto3 client of CloudWatch Logs.
        write: Takes each line.
    """

    def __init__(self, client: Any, write: Callable[[str], None]) -> None:
        self.client = client
        self.write = write
        self._tokens: dict[Stream, str] = {}
        self._announced: set[Stream] = set()

    def read(self, streams: list[Stream]) -> int:
        """Writes what is new in some streams.

        Args:
            streams: The streams, in the order to write them.

        Returns:
            The number of lines written.

        Raises:
            botocore.exceptions.ClientError: If CloudWatch refuses.
        """
        return sum(self._read(stream) for stream in streams)

    def _read(self, stream: Stream) -> int:
        written = 0
        while True:
            token = self._tokens.get(stream)
            try:
                page = self.client.get_log_events(
                    logGroupName=stream.group,
                    logStreamName=stream.name,
                    startFromHead=True,
                    **({} if token is None else {"nextToken": token}),
                )
            except self.client.exceptions.ResourceNotFoundException:
                # Nothing was written yet.
                return written
            for event in page["events"]:
                self._write(stream, event["message"])
                written += 1
            self._tokens[stream] = page["nextForwardToken"]
            if page["nextForwardToken"] == token:
                return written

    def _write(self, stream: Stream, message: str) -> None:
        if stream.attempt > 1 and stream not in self._announced:
            node = "" if stream.node is None else f" of node {stream.node}"
            self.write(f"--- attempt {stream.attempt}{node}")
        self._announced.add(stream)
        prefix = "" if stream.node is None else f"[{stream.node}] "
        self.write(f"{prefix}{message}")


def follow(
    batch: Any,
    logs: Any,
    job_id: str,
    *,
    write: Callable[[str], None] = say,
    tell: Callable[[str], None] = say,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Follows a job to its end.

    Args:
        batch: A boto3 client of Batch.
        logs: A boto3 client of CloudWatch Logs.
        job_id: The job.
        write: Takes each line of the log.
        tell: Takes each line about the job.
        sleep: Waits for so many seconds.

    Returns:
        Whether it succeeded.

    Raises:
        ValueError: If there is no such job.
        botocore.exceptions.ClientError: If AWS refuses, or fails ten times in a row.
    """
    reader = Logs(logs, write)
    state, pause, failures = "", _SHORTEST, 0
    while True:
        try:
            job = batch_jobs.describe(batch, job_id)
            nodes = batch_jobs.describe_nodes(batch, job)
            if changed := job["status"] != state:
                state = job["status"]
                if state not in batch_jobs.ENDED:
                    reason = job.get("statusReason")
                    tell(f"{state}: {reason}" if reason else state)
            new = reader.read(batch_jobs.streams(nodes))
            failures = 0
        except Exception as error:
            failures += 1
            if failures == _FAILURES or not is_passing(error):
                raise
            changed, new = False, 0
        if state in batch_jobs.ENDED and not failures:
            break
        pause = _SHORTEST if changed or new else min(pause * 1.5, _LONGEST)
        sleep(pause)
    _read_rest(batch, job, reader, sleep)
    tell(batch_jobs.result(job))
    for node in nodes if len(nodes) > 1 else ():
        if node["status"] == "FAILED":
            tell(f"node {node['jobId'].rpartition('#')[2]} {batch_jobs.result(node)}")
    return state == "SUCCEEDED"


def _read_rest(
    batch: Any, job: dict[str, Any], reader: Logs, sleep: Callable[[float], None]
) -> None:
    """Reads what arrives after a job's end. How the job ended is known, so this may fall short."""
    quiet = 0
    for _ in range(_LAST_LOOKS):
        sleep(_SHORTEST)
        try:
            nodes = batch_jobs.describe_nodes(batch, job)
            quiet = 0 if reader.read(batch_jobs.streams(nodes)) else quiet + 1
        except Exception as error:
            if not is_passing(error):
                raise
            quiet = 0
        if quiet == _QUIET:
            return
