"""Send a run to AWS Batch, with the checkout as it lies here.

  submit_batch.py [OPTIONS] -- fit --config configs/align.yaml   submit a job
  submit_batch.py status JOB                                     its state, nodes and logs
  submit_batch.py logs JOB [--follow]                            what it printed
  submit_batch.py cancel JOB [--reason TEXT]                     stop it

Region, bucket, queues and job definitions come from options, REFRAG_BATCH_* variables or a settings
file; see docs/batch.md. Secrets never go into OPTIONS or the command: they belong into the job
definition. Exit codes: 0 (and the job succeeded, where it was followed), 1 for a failed job or a
failure of AWS, 2 for a command line that cannot be understood, 130 for Ctrl-C, which leaves a
followed job running.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from refrag_lightning.launch import batch_definitions, batch_jobs
from refrag_lightning.launch.batch_clients import aws_message, client
from refrag_lightning.launch.batch_requests import (
    Job,
    job_name,
    parse_timeout,
    submit_request,
)
from refrag_lightning.launch.batch_secrets import refuse_secrets, secret_values
from refrag_lightning.launch.batch_settings import (
    Settings,
    check_definition,
    check_queue,
    load_settings,
)
from refrag_lightning.launch.bootstrap import Limits
from refrag_lightning.launch.checkout import MAX_FILE_MB, Checkout, find_root, pack, upload
from refrag_lightning.launch.follow import Logs, follow
from refrag_lightning.plain_text import say

_PROGRAM = "submit_batch.py"
# `#` numbers a job's nodes, `:` the parts of an array job.
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}([#:]\d+)?", re.ASCII)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists what there is")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: The arguments; None takes those of the process.

    Returns:
        The exit code of the module's docstring.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Before anything can repeat a word of it.
        refuse_secrets(words, os.environ)
        return _run(words)
    except BrokenPipeError:
        # `... logs JOB | head`: nobody reads on, and Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        # Some of AWS's errors are OSErrors as well, so these come first.
        if (message := aws_message(error)) is not None:
            return _fail(message, 1)
        if isinstance(error, ValueError | OSError):
            return _fail(str(error), 2)
        raise


def parser() -> argparse.ArgumentParser:
    """The options of a submission."""
    assert __doc__ is not None
    made = _Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [OPTIONS] -- SUBCOMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--dry-run", action="store_true", help="only print the requests, as JSON")
    made.add_argument("--follow", action="store_true", help="follow the job to its end")
    job = made.add_argument_group("the job")
    job.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    job.add_argument("--gpus", type=int, default=1, help="GPUs of each; 0 for a CPU queue (1)")
    job.add_argument("--vcpus", type=int, help="virtual CPUs of each (the job definition's)")
    job.add_argument("--memory", type=_number, help="GiB of each (the job definition's)")
    job.add_argument("--shm", type=_number, help="GiB of /dev/shm (the job definition's)")
    job.add_argument("--timeout", default="24h", help="of an attempt: 90m, 12h, 2d (24h)")
    job.add_argument("--retries", type=int, default=2, help="attempts after the first, 0 to 9 (2)")
    job.add_argument("--spot", action="store_true", help="Spot instances, for one node")
    job.add_argument("--queue", help="another queue than --gpus and --spot choose")
    job.add_argument("--job-definition", help="another than --nodes chooses")
    job.add_argument("--name", help="the job's name (from the command)")
    job.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="a variable, no secret; repeat it"
    )
    sent = made.add_argument_group("the checkout")
    sent.add_argument("--checkout", type=Path, default=Path(), help="a folder in it (this one)")
    sent.add_argument(
        "--max-file-mb", type=_number, default=MAX_FILE_MB, help=f"largest file ({MAX_FILE_MB:g})"
    )
    sent.add_argument(
        "--send-anyway",
        action="append",
        default=[],
        metavar="FILE",
        help="send this file although it looks like a secret; as named from the top; repeat it",
    )
    sent.add_argument("--bucket", help="bucket of the checkouts")
    sent.add_argument("--prefix", help="what their names begin with (checkouts)")
    _add_place(made)
    return made


def _run(words: list[str]) -> int:
    actions = {"status": _status, "logs": _logs, "cancel": _cancel}
    if words and words[0] in actions:
        return actions[words[0]](words[1:])
    place = words.index("--") if "--" in words else len(words)
    own, command = words[:place], words[place + 1 :]
    options, unknown = parser().parse_known_args(own)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; the command of the run goes after --")
    settings = _settings(options)
    job = Job(
        name=options.name or job_name(command),
        command=command,
        num_nodes=options.nodes,
        num_gpus=options.gpus,
        vcpus=options.vcpus,
        memory_gib=options.memory,
        timeout=parse_timeout(options.timeout),
        retries=options.retries,
        variables=dict(_variable(text) for text in options.env),
    )
    return _submit(job, settings, options)


def _submit(job: Job, settings: Settings, options: argparse.Namespace) -> int:
    bucket = settings.need_bucket()
    queue = settings.queue(
        num_gpus=job.num_gpus, num_nodes=job.num_nodes, spot=options.spot, given=options.queue
    )
    single, multi = settings.single_definition, settings.multi_definition
    definition = options.job_definition or (single if job.num_nodes == 1 else multi)
    check_queue(queue, "--queue")
    check_definition(definition, "--job-definition")
    limits = Limits.of(job.variables)
    checkout = pack(
        find_root(options.checkout),
        max_file_mb=options.max_file_mb,
        secrets=secret_values(os.environ),
        allowed=options.send_anyway,
    )
    # What the container would refuse is not sent.
    limits.check(
        num_files=checkout.num_files, num_bytes=checkout.num_bytes, largest=checkout.largest
    )
    requests: dict[str, Any] = {
        "s3.put_object": {
            "Bucket": bucket,
            "Key": checkout.key(settings.prefix),
            "Body": f"{checkout.num_files} files, {len(checkout.data)} bytes",
        }
    }
    batch = None
    if options.shm is not None:
        if options.shm * 1024 < 1:
            raise ValueError(f"--shm {options.shm:g} has to be at least 1 MiB")
        batch = client("batch", settings.region)
        original = batch_definitions.describe_definition(batch, definition)
        request = batch_definitions.with_shared_memory(original, round(options.shm * 1024))
        known = batch_definitions.registered(batch, request)
        if known is None:
            requests["batch.register_job_definition"] = request
        definition = known or request["jobDefinitionName"]
    submission = submit_request(
        job,
        queue=queue,
        definition=definition,
        address=f"s3://{bucket}/{checkout.key(settings.prefix)}",
        sha256=checkout.sha256,
        commit=checkout.commit,
        project=settings.project,
    )
    requests["batch.submit_job"] = submission
    if options.dry_run:
        say(json.dumps(requests, indent=2))
        return 0
    batch = batch or client("batch", settings.region)
    _send(checkout, bucket, settings)
    if "batch.register_job_definition" in requests:
        registered = batch_definitions.register(batch, requests["batch.register_job_definition"])
        submission["jobDefinition"] = registered
        _tell(f"registered {registered}")
    job_id = batch.submit_job(**submission)["jobId"]
    _tell(f"submitted {job.name} to {queue}")
    say(job_id, flush=True)
    if options.follow:
        return _follow(batch, client("logs", settings.region), job_id)
    _tell(_how(batch, job_id))
    return 0


def _send(checkout: Checkout, bucket: str, settings: Settings) -> None:
    address = f"s3://{bucket}/{checkout.key(settings.prefix)}"
    sent = upload(client("s3", settings.region), checkout, bucket=bucket, prefix=settings.prefix)
    size = f"{checkout.num_files} files, {len(checkout.data) / 1e6:.1f} MB"
    _tell(f"checkout {'uploaded to' if sent else 'is there already:'} {address} ({size})")


def _status(words: list[str]) -> int:
    options = _job_parser("status", "The state of a job.").parse_args(words)
    batch = client("batch", _settings(options).region)
    job = batch_jobs.describe(batch, options.job)
    say(batch_jobs.summary(job, batch_jobs.describe_nodes(batch, job)))
    return 0


def _logs(words: list[str]) -> int:
    made = _job_parser("logs", "What a job printed, all attempts and nodes.")
    made.add_argument("--follow", action="store_true", help="go on to the job's end")
    options = made.parse_args(words)
    settings = _settings(options)
    batch, logs = client("batch", settings.region), client("logs", settings.region)
    if options.follow:
        return _follow(batch, logs, options.job)
    nodes = batch_jobs.describe_nodes(batch, batch_jobs.describe(batch, options.job))
    Logs(logs, _write).read(batch_jobs.streams(nodes))
    return 0


def _cancel(words: list[str]) -> int:
    made = _job_parser("cancel", "Stop a job, whatever its state.")
    made.add_argument("--reason", default="cancelled by its owner", help="kept with the job")
    options = made.parse_args(words)
    if not options.reason:
        raise ValueError("--reason must not be empty")
    batch = client("batch", _settings(options).region)
    job = batch_jobs.describe(batch, options.job)
    if job["status"] in batch_jobs.ENDED:
        _tell(f"job {options.job} has ended already: {batch_jobs.result(job)}")
        return 0
    batch.terminate_job(jobId=options.job, reason=options.reason)
    _tell(f"job {options.job} is being stopped; it was {job['status']}")
    return 0


def _follow(batch: Any, logs: Any, job_id: str) -> int:
    try:
        return 0 if follow(batch, logs, job_id, write=_write, tell=_tell) else 1
    except KeyboardInterrupt:
        _tell(f"\njob {job_id} goes on\n{_how(batch, job_id)}")
        return 130
    except Exception as error:
        if aws_message(error) is not None:
            _tell(f"job {job_id} goes on\n{_how(batch, job_id)}")
        raise


def _how(batch: Any, job_id: str) -> str:
    call, region = f"python scripts/{_PROGRAM}", batch.meta.region_name
    return (
        f"follow it: {call} logs {job_id} --follow --region {region}\n"
        f"stop it:   {call} cancel {job_id} --region {region}"
    )


def _job_parser(name: str, description: str) -> argparse.ArgumentParser:
    made = _Parser(prog=f"{_PROGRAM} {name}", description=description, allow_abbrev=False)
    made.add_argument("job", metavar="JOB", type=_job_id, help="the job's id")
    _add_place(made)
    return made


def _add_place(made: argparse.ArgumentParser) -> None:
    made.add_argument("--region", help="AWS region (AWS_REGION, or the profile's)")
    made.add_argument(
        "--settings", help="settings file (~/.config/refrag_lightning/batch.yaml)", metavar="FILE"
    )


def _settings(options: argparse.Namespace) -> Settings:
    flags = {name: getattr(options, name, None) for name in ("region", "bucket", "prefix")}
    return load_settings(flags, os.environ, options.settings)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # Neither infinity nor NaN is a size.
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _job_id(text: str) -> str:
    if not _JOB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a job")
    return text


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--env {text!r} has to be NAME=VALUE")
    return name, value


def _write(line: str) -> None:
    say(line, flush=True)


def _tell(line: str) -> None:
    say(line, file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    say(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
