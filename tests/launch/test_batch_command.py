"""The whole command: requests, the life of a job with moto, Ctrl-C, errors, and no secrets."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refrag_lightning.launch import batch_command, follow
from refrag_lightning.launch.batch_command import main
from refrag_lightning.launch.checkout import pack
from tests.launch.batch_fakes import FakeBatch
from tests.launch.conftest import REGION, git

ROOT = Path(__file__).parents[2]
FIT = ["fit", "--config", "configs/align.yaml"]


@pytest.fixture
def here(repository, monkeypatch):
    """The checkout as the current folder."""
    monkeypatch.chdir(repository)
    return repository


def environment(packed) -> list[dict[str, str]]:
    return [
        {"name": "GIT_COMMIT", "value": packed.commit},
        {"name": "REFRAG_CHECKOUT", "value": f"s3://mine/checkouts/{packed.sha256}.tar.gz"},
        {"name": "REFRAG_CHECKOUT_SHA256", "value": packed.sha256},
    ]


ONE_NODE = {
    "attempts": 3,
    "evaluateOnExit": [
        {"onStatusReason": "Host EC2*", "action": "RETRY"},
        {"onStatusReason": "Task failed to start*", "action": "RETRY"},
        {"onExitCode": "143", "action": "RETRY"},
        {"onReason": "*", "action": "EXIT"},
    ],
}


def expected_gpu(packed):
    return {
        "jobName": "fit-align",
        "jobQueue": "refrag-gpu",
        "jobDefinition": "refrag-single",
        "retryStrategy": ONE_NODE,
        "timeout": {"attemptDurationSeconds": 43200},
        "tags": {"Project": "refrag"},
        "containerOverrides": {
            "command": FIT,
            "environment": [*environment(packed), {"name": "WANDB_MODE", "value": "offline"}],
            "resourceRequirements": [
                {"type": "VCPU", "value": "8"},
                {"type": "MEMORY", "value": "30720"},
                {"type": "GPU", "value": "1"},
            ],
        },
    }


def expected_cpu(packed):
    return {
        "jobName": "hello",
        "jobQueue": "refrag-cpu",
        "jobDefinition": "refrag-single",
        "retryStrategy": {"attempts": 1},
        "timeout": {"attemptDurationSeconds": 86400},
        "tags": {"Project": "refrag"},
        "containerOverrides": {"command": ["hello"], "environment": environment(packed)},
    }


def expected_nodes(packed):
    return {
        "jobName": "large",
        "jobQueue": "refrag-gpu",
        "jobDefinition": "refrag-multi",
        "retryStrategy": {
            "attempts": 3,
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
                        "command": [*FIT, "--trainer.strategy", "ddp"],
                        "environment": environment(packed),
                        "resourceRequirements": [{"type": "GPU", "value": "8"}],
                    },
                }
            ],
        },
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [
                *["--vcpus", "8", "--memory", "30", "--timeout", "12h"],
                *["--env", "WANDB_MODE=offline", "--", *FIT],
            ],
            expected_gpu,
        ),
        (["--gpus", "0", "--retries", "0", "--", "hello"], expected_cpu),
        (
            [
                *["--nodes", "4", "--gpus", "8", "--name", "large"],
                *["--", *FIT, "--trainer.strategy", "ddp"],
            ],
            expected_nodes,
        ),
    ],
)
def test_a_dry_run_prints_the_full_requests_and_needs_no_aws(
    aws_environment, here, capsys, monkeypatch, words, expected
):
    monkeypatch.setattr(batch_command, "client", None)
    assert main(["--dry-run", "--bucket", "mine", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    packed = pack(here)
    assert printed == {
        "s3.put_object": {
            "Bucket": "mine",
            "Key": f"checkouts/{packed.sha256}.tar.gz",
            "Body": f"{packed.num_files} files, {len(packed.data)} bytes",
        },
        "batch.submit_job": expected(packed),
    }


@pytest.fixture
def place(aws, monkeypatch):
    """A bucket, a queue and a job definition in moto, under the default names."""
    import boto3

    monkeypatch.setenv("REFRAG_BATCH_BUCKET", "mine")
    monkeypatch.setenv("REFRAG_BATCH_REGION", REGION)
    s3 = boto3.client("s3", region_name=REGION)
    s3.create_bucket(Bucket="mine", CreateBucketConfiguration={"LocationConstraint": REGION})
    role = boto3.client("iam", region_name=REGION).create_role(
        RoleName="service", AssumeRolePolicyDocument="{}"
    )
    batch = boto3.client("batch", region_name=REGION)
    environment = batch.create_compute_environment(
        computeEnvironmentName="machines", type="UNMANAGED", serviceRole=role["Role"]["Arn"]
    )
    batch.create_job_queue(
        jobQueueName="refrag-cpu",
        state="ENABLED",
        priority=1,
        computeEnvironmentOrder=[
            {"order": 1, "computeEnvironment": environment["computeEnvironmentArn"]}
        ],
    )
    batch.register_job_definition(
        jobDefinitionName="refrag-single",
        type="container",
        containerProperties={
            "image": "image:1",
            "resourceRequirements": [
                {"type": "VCPU", "value": "2"},
                {"type": "MEMORY", "value": "2048"},
            ],
        },
    )
    return batch


def moto_job(job_id: str):
    """moto's own record of a job, whose state a test may move."""
    from moto.backends import get_backend
    from moto.core import DEFAULT_ACCOUNT_ID

    return get_backend("batch")[DEFAULT_ACCOUNT_ID][REGION]._jobs[job_id]


def print_in_job(stream: str, *lines: str) -> None:
    import boto3

    logs = boto3.client("logs", region_name=REGION)
    events = [{"timestamp": int(time.time() * 1000), "message": line} for line in lines]
    place = {"logGroupName": "/aws/batch/job", "logStreamName": stream}
    if not logs.describe_log_groups()["logGroups"]:
        logs.create_log_group(logGroupName=place["logGroupName"])
    if not logs.describe_log_streams(logGroupName=place["logGroupName"])["logStreams"]:
        logs.create_log_stream(**place)
    logs.put_log_events(**place, logEvents=events)


def test_the_life_of_a_job_of_one_node(place, here, capsys, monkeypatch):
    import boto3

    words = ["--gpus", "0", "--vcpus", "4", "--", *FIT]
    assert main(words) == 0
    told = capsys.readouterr()
    job_id = told.out.strip()
    assert "checkout uploaded to s3://mine/checkouts/" in told.err
    assert f"logs {job_id} --follow --region {REGION}" in told.err

    packed = pack(here)
    s3 = boto3.client("s3", region_name=REGION)
    stored = s3.get_object(Bucket="mine", Key=f"checkouts/{packed.sha256}.tar.gz")
    assert stored["Body"].read() == packed.data
    job = place.describe_jobs(jobs=[job_id])["jobs"][0]
    assert job["container"]["command"] == FIT
    assert job["timeout"] == {"attemptDurationSeconds": 86400}
    given = [each for each in job["container"]["environment"] if "AWS" not in each["name"]]
    assert given == environment(packed)

    # moto ends a job at once; here it waits, runs and ends while it is followed.
    record = moto_job(job_id)
    stream = job["container"]["logStreamName"]
    record.log_stream_name = None
    record.status = "RUNNABLE"

    def started():
        record.status, record.log_stream_name = "RUNNING", stream

    def ended():
        record.status = "SUCCEEDED"
        print_in_job(stream, "last")

    steps = [
        started,
        functools.partial(print_in_job, stream, "one", "two"),
        functools.partial(print_in_job, stream, "three"),
        ended,
    ]

    def sleep(seconds: float) -> None:
        if steps:
            steps.pop(0)()

    monkeypatch.setattr(batch_command, "follow", functools.partial(follow.follow, sleep=sleep))
    assert main(["logs", job_id, "--follow"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == ["one", "two", "three", "last"]
    assert told.err.splitlines()[:2] == ["RUNNABLE", "RUNNING"]
    assert told.err.splitlines()[2].startswith("SUCCEEDED")

    assert main(["logs", job_id]) == 0
    assert capsys.readouterr().out.splitlines() == ["one", "two", "three", "last"]
    assert main(["status", job_id]) == 0
    shown = capsys.readouterr().out
    assert f"job             {job_id} (fit-align)\nstate           SUCCEEDED" in shown
    assert f"log, attempt 1  /aws/batch/job {stream}" in shown
    assert main(["cancel", job_id]) == 0
    assert "has ended already: SUCCEEDED" in capsys.readouterr().err

    # The same checkout again: it is there.
    assert main(words) == 0
    assert "checkout is there already: s3://mine/checkouts/" in capsys.readouterr().err


def test_a_job_that_fails_and_one_that_is_cancelled(place, here, capsys, monkeypatch):
    monkeypatch.setattr(
        batch_command, "follow", functools.partial(follow.follow, sleep=lambda seconds: None)
    )
    monkeypatch.setenv("MOTO_SIMPLE_BATCH_FAIL_AFTER", "0")
    assert main(["--gpus", "0", "--follow", "--", "hello"]) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith("FAILED")

    job_id = told.out.strip()
    record = moto_job(job_id)
    record.status = "RUNNING"
    stopped = []
    monkeypatch.setattr(record, "terminate", stopped.append)
    assert main(["cancel", job_id, "--reason", "wrong rate"]) == 0
    assert stopped == ["wrong rate"]
    assert "is being stopped; it was RUNNING" in capsys.readouterr().err


def test_shared_memory_takes_a_definition_of_its_own(place, here, capsys):
    words = ["--gpus", "0", "--shm", "16", "--", "hello"]
    assert main(["--dry-run", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    registration = printed["batch.register_job_definition"]
    assert registration["jobDefinitionName"] == "refrag-single-shm-16384"
    # Batch describes more than was registered, most of it empty.
    properties = registration["containerProperties"].items()
    assert {name: value for name, value in properties if value} == {
        "image": "image:1",
        "resourceRequirements": [
            {"type": "VCPU", "value": "2"},
            {"type": "MEMORY", "value": "2048"},
        ],
        "linuxParameters": {"sharedMemorySize": 16384},
    }
    assert printed["batch.submit_job"]["jobDefinition"] == "refrag-single-shm-16384"

    for told in ("registered refrag-single-shm-16384:1\n", ""):
        assert main(words) == 0
        captured = capsys.readouterr()
        job = place.describe_jobs(jobs=[captured.out.strip()])["jobs"][0]
        assert job["jobDefinition"].endswith("/refrag-single-shm-16384:1")
        assert ("registered" in captured.err) is bool(told)
        assert told in captured.err
    assert main(["--dry-run", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["s3.put_object", "batch.submit_job"]
    assert printed["batch.submit_job"]["jobDefinition"] == "refrag-single-shm-16384:1"


def test_several_nodes_are_submitted_as_they_are_printed(
    aws_environment, here, capsys, monkeypatch
):
    """botocore compares every field with what is expected, and with the service's model."""
    import boto3
    from botocore.stub import Stubber

    batch, s3 = (boto3.client(name, region_name=REGION) for name in ("batch", "s3"))
    monkeypatch.setattr(
        batch_command, "client", lambda name, region: {"batch": batch, "s3": s3}[name]
    )
    packed = pack(here)
    with Stubber(batch) as stubber, Stubber(s3) as storage:
        storage.add_client_error("head_object", "404", http_status_code=404)
        storage.add_response("put_object", {})
        answer = {"jobName": "large", "jobId": "11", "jobArn": "arn"}
        stubber.add_response("submit_job", answer, expected_nodes(packed))
        words = ["--bucket", "mine", "--nodes", "4", "--gpus", "8", "--name", "large"]
        assert main([*words, "--", *FIT, "--trainer.strategy", "ddp"]) == 0
        stubber.assert_no_pending_responses()
        storage.assert_no_pending_responses()
    assert capsys.readouterr().out == "11\n"


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(aws_environment):
    """With a real signal, to a process that follows."""
    code = (
        "import sys\n"
        "from refrag_lightning.launch import batch_command\n"
        "from tests.launch.batch_fakes import FakeBatch, FakeLogs\n"
        "running = {'status': 'RUNNING', 'container': {'logStreamName': 's'}}\n"
        "batch = FakeBatch({'7': [running]})\n"
        "logs = FakeLogs(batch, {'s': [(0, 'a line')]})\n"
        "batch_command.client = lambda name, region: {'batch': batch, 'logs': logs}[name]\n"
        "sys.exit(batch_command.main(['logs', '7', '--follow']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a line\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told == (
        "RUNNING\n"
        "\n"
        "job 7 goes on\n"
        "follow it: python scripts/submit_batch.py logs 7 --follow --region eu-central-1\n"
        "stop it:   python scripts/submit_batch.py cancel 7 --region eu-central-1\n"
    )


def test_a_lost_connection_says_that_the_job_goes_on(aws_environment, capsys, monkeypatch):
    from botocore.exceptions import NoCredentialsError

    batch = FakeBatch({})
    batch.failures = [NoCredentialsError()]
    monkeypatch.setattr(batch_command, "client", lambda name, region: batch)
    assert main(["logs", "7", "--follow"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("job 7 goes on\nfollow it: ")
    assert told.splitlines()[-1].startswith("error: no AWS credentials: set AWS_PROFILE")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command: put it after --"),
        (["--"], "no command: put it after --"),
        (["fit", "--config", "x"], "unknown option 'fit'; the command of the run goes after --"),
        (["--node", "2", "--", "fit"], "unknown option '--node'"),
        (["--nodes", "two", "--", "fit"], "argument --nodes: invalid int value: 'two'; --help"),
        (["--env", "A", "--", "fit"], "--env 'A' has to be NAME=VALUE"),
        (["--nodes", "2", "--spot", "--", "fit"], "2 nodes cannot run on Spot instances"),
        (["--shm", "0", "--", "fit"], "--shm 0 has to be at least 1 MiB"),
        (["--checkout", "/", "--", "fit"], "/ cannot be read as a git checkout"),
        (["--max-file-mb", "0.000001", "--", "fit"], "larger than 1e-06 MB: .gitignore"),
        (["--settings", "none.yaml", "--", "fit"], "No such file or directory: 'none.yaml'"),
        (["status"], "the following arguments are required: JOB"),
        (["cancel", "7", "--reason", ""], "--reason must not be empty"),
        (["--bucket", "../x", "--", "fit"], "bucket: '../x' is not the name of a bucket"),
        (["--prefix", "a/../../b", "--", "fit"], "prefix: 'a/../../b' is not a key"),
        (["--queue", "../q", "--", "fit"], "--queue '../q' is no job queue"),
        (["--job-definition=--x", "--", "fit"], "--job-definition '--x' is no job definition"),
        (["--region", "../x", "--", "fit"], "region '../x' is not the name of an AWS region"),
        (["--name=-x", "--", "fit"], "--name '-x' has to be 1 to 128 letters"),
        (["--memory", "inf", "--", "fit"], "argument --memory: 'inf' is not a number"),
        (["--send-anyway", "x", "--", "fit"], "--send-anyway x: no such file is sent"),
        (["--env", "REFRAG_CHECKOUT_MAX_MB=-1", "--", "fit"], "MAX_MB has to be a positive number"),
        (["--env", "DB_PASS=x", "--", "fit"], "DB_PASS would be readable by others"),
        (["status", "../7"], "argument JOB: '../7' is not the id of a job"),
    ],
)
def test_what_cannot_be_understood_is_one_line(aws_environment, here, capsys, words, message):
    place = [] if words and words[0] in ("status", "cancel", "fit") else ["--bucket", "mine"]
    assert main([*place, *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert message in told.err
    assert told.err.count("\n") == 1


def test_what_the_container_would_not_unpack_is_not_sent(aws_environment, here, capsys):
    words = ["--dry-run", "--bucket", "mine", "--env", "REFRAG_CHECKOUT_MAX_FILES=4", "--", "fit"]
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "error: the checkout has more than 4 files; the variable REFRAG_CHECKOUT_MAX_FILES sets "
        "the limit\n"
    )
    words[4] = "REFRAG_CHECKOUT_MAX_FILES=5"
    assert main(words) == 0


def test_a_file_with_a_secret_is_sent_if_it_is_named(aws_environment, here, capsys):
    (here / ".env").write_text("A=1\n")
    words = ["--dry-run", "--bucket", "mine"]
    assert main([*words, "--", "fit"]) == 2
    assert (
        "error: secrets would be uploaded: '.env' (an environment file);" in capsys.readouterr().err
    )
    assert main([*words, "--send-anyway", ".env", "--", "fit"]) == 0


def test_what_is_missing_names_the_option_and_the_variable(aws_environment, here, capsys):
    assert main(["--", "fit"]) == 2
    assert "give --bucket, set REFRAG_BATCH_BUCKET" in capsys.readouterr().err
    assert main(["--bucket", "mine", "--", "fit"]) == 1
    assert "give --region, set REFRAG_BATCH_REGION or AWS_REGION" in capsys.readouterr().err


def test_what_aws_refuses_is_one_line(place, here, capsys):
    assert main(["--gpus", "1", "--", "fit"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        "error: AWS refused SubmitJob: ClientException: Job queue refrag-gpu does not exist"
    )
    assert main(["status", "no-such-job"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no job 'no-such-job' in eu-central-1; Batch forgets jobs some days after "
        "their end\n"
    )


def test_secrets_are_in_no_request_and_in_nothing_that_is_printed(place, here, capsys, monkeypatch):
    import botocore.client

    secret = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_" + "AbCdEfGhIj" * 3}
    for name, value in secret.items():
        monkeypatch.setenv(name, value)
    requests = []
    original = botocore.client.BaseClient._make_api_call

    def record(self, operation, parameters):
        requests.append(repr(parameters))
        return original(self, operation, parameters)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", record)
    refused = [
        ["--env", f"WANDB_API_KEY={secret['WANDB_API_KEY']}", "--", "fit"],
        ["--env", f"X={secret['WANDB_API_KEY']}", "--", "fit"],
        ["--env", "WANDB_API_KEY=another", "--", "fit"],
        ["--enw", f"X={secret['HF_TOKEN']}", "--", "fit"],
        ["--", "fit", "--logger.api_key", "another"],
        ["--", "fit", "--paths", f"https://host/?token={secret['HF_TOKEN']}"],
        ["--name", f"job-{secret['WANDB_API_KEY']}", "--", "fit"],
        ["cancel", "7", "--reason", secret["HF_TOKEN"]],
    ]
    for words in refused:
        assert main(["--gpus", "0", *words] if words[0] != "cancel" else words) == 2
    (here / "notes.txt").write_text(secret["HF_TOKEN"])
    assert main(["--gpus", "0", "--", "fit"]) == 2
    assert requests == []
    (here / "notes.txt").unlink()
    assert main(["--gpus", "0", "--shm", "1", "--", "fit"]) == 0
    assert main(["--gpus", "0", "--dry-run", "--", "fit"]) == 0
    told = capsys.readouterr()
    assert len(requests) == 6
    for text in (*requests, told.out, told.err):
        for value in (*secret.values(), "another"):
            assert value not in text


def test_the_script_runs_from_anywhere(aws_environment, repository, tmp_path):
    script = ROOT / "scripts" / "submit_batch.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    helped = call("--help")
    assert helped.returncode == 0
    for option in ("--dry-run", "--follow", "--nodes", "--shm", "status JOB", "cancel JOB"):
        assert option in helped.stdout
    printed = call(
        "--dry-run", "--bucket", "mine", "--checkout", str(repository), "--", "fit", "--help"
    )
    assert printed.returncode == 0, printed.stderr
    request = json.loads(printed.stdout)["batch.submit_job"]
    assert request["containerOverrides"]["command"] == ["fit", "--help"]
    head = git(repository, "rev-parse", "HEAD").strip()
    assert {"name": "GIT_COMMIT", "value": head} in request["containerOverrides"]["environment"]
