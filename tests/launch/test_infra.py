"""The Terraform files: that they parse, and that they and the submission mean the same names."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import botocore.session
import hcl2
import pytest
from botocore.validate import ParamValidator

from refrag_lightning.launch import batch_command, docker
from refrag_lightning.launch.batch_definitions import with_shared_memory
from refrag_lightning.launch.batch_requests import Job, submit_request
from refrag_lightning.launch.batch_secrets import is_secret_name
from refrag_lightning.launch.batch_settings import Settings

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "infra").glob("*.tf"))
# Values of what has no default or is known only once it was made.
KNOWN = {
    "var.region": "eu-central-1",
    "aws_iam_role.job.arn": "arn:aws:iam::111122223333:role/refrag-job",
    "aws_iam_role.execution.arn": "arn:aws:iam::111122223333:role/refrag-execution",
    "aws_ecr_repository.this.repository_url": "registry.example/refrag",
    "aws_cloudwatch_log_group.this.name": "/aws/batch/refrag",
}


def plain(value: Any) -> Any:
    """What the parser returns, without its quotes and notes; expressions stay `${...}`."""
    if isinstance(value, dict):
        kept = {
            name: inner for name, inner in value.items() if not name.strip('"').startswith("__")
        }
        return {name.strip('"'): plain(inner) for name, inner in kept.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, str) and value[:1] == '"' == value[-1:]:
        return value[1:-1]
    return value


@pytest.fixture(scope="module")
def parsed() -> dict[str, Any]:
    """Blocks of all files: kind to name to body; resources and data by `type.name`."""
    found: dict[str, Any] = {"variable": {}, "output": {}, "locals": {}, "resource": {}, "data": {}}
    for path in FILES:
        with path.open() as file:
            blocks = plain(hcl2.load(file))
        for kind in found:
            for block in blocks.get(kind, []):
                if kind in ("resource", "data"):
                    ((type_, named),) = block.items()
                    ((name, body),) = named.items()
                    block = {f"{type_}.{name}": body}
                assert not block.keys() & found[kind].keys()
                found[kind].update(block)
    return found


@pytest.fixture(scope="module")
def resolve(parsed):
    """Works out expressions that are names of variables, locals or known values."""

    def value_of(name: str) -> Any:
        if found := re.fullmatch(r"tostring\((.*)\)", name):
            return str(value_of(found[1]))
        if name in KNOWN:
            return KNOWN[name]
        kind, _, rest = name.partition(".")
        if kind == "local":
            return work_out(parsed["locals"][rest])
        if kind == "var":
            return work_out(parsed["variable"][rest]["default"])
        # The one loop: no secrets were given.
        assert name.startswith("[for name, arn in var.secret_arns"), name
        return []

    def work_out(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: work_out(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [work_out(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if found := re.fullmatch(r"\$\{((?:(?!\$\{).)*)\}", value, re.DOTALL):
            return value_of(found[1])
        return re.sub(r"\$\{([^}]*)\}", lambda found: str(value_of(found[1])), value)

    return work_out


@pytest.fixture
def definitions(parsed, resolve) -> dict[str, dict[str, Any]]:
    """The two job definitions as requests of `register_job_definition`."""
    single = parsed["resource"]["aws_batch_job_definition.single"]
    multi = parsed["resource"]["aws_batch_job_definition.multi"]
    assert single["container_properties"] == "${jsonencode(local.container)}"
    assert multi["node_properties"] == "${jsonencode(local.nodes)}"
    return {
        "single": {
            "jobDefinitionName": resolve(single["name"]),
            "type": single["type"],
            "platformCapabilities": single["platform_capabilities"],
            "containerProperties": resolve("${local.container}"),
        },
        "multi": {
            "jobDefinitionName": resolve(multi["name"]),
            "type": multi["type"],
            "nodeProperties": resolve("${local.nodes}"),
        },
    }


def validate(operation: str, request: dict[str, Any]) -> None:
    """Compares a request with AWS's own model of it, as boto3 does before it sends one."""
    model = botocore.session.get_session().get_service_model("batch").operation_model(operation)
    report = ParamValidator().validate(request, model.input_shape)
    assert not report.has_errors(), report.generate_report()


def test_every_name_is_declared_and_used(parsed):
    text = "\n".join(path.read_text() for path in FILES)
    assert set(re.findall(r"\bvar\.(\w+)", text)) == set(parsed["variable"])
    assert set(re.findall(r"\blocal\.(\w+)", text)) == set(parsed["locals"])
    used = set(re.findall(r"\b(?<!data\.)(aws_\w+\.\w+)", text))
    declared = {*parsed["resource"], *parsed["data"]}
    assert used <= declared
    for name in parsed["data"]:
        assert f"data.{name}" in text
    for body in [*parsed["variable"].values(), *parsed["output"].values()]:
        assert body["description"].endswith((".", "batch.yaml"))


def test_job_definitions_are_what_batch_takes(definitions):
    for request in definitions.values():
        validate("RegisterJobDefinition", request)
    container = definitions["single"]["containerProperties"]
    assert {need["type"]: need["value"] for need in container["resourceRequirements"]} == {
        "VCPU": "4",
        "MEMORY": "14000",
    }
    # Docker's own 64 MB breaks loader workers.
    assert container["linuxParameters"]["sharedMemorySize"] == 8192
    assert container["logConfiguration"]["options"]["awslogs-group"] == "/aws/batch/refrag"


def test_the_validation_would_notice_a_wrong_definition(definitions):
    request = definitions["single"]
    request["containerProperties"]["linuxParameters"]["sharedMemorySize"] = "8192"
    with pytest.raises(AssertionError, match="sharedMemorySize"):
        validate("RegisterJobDefinition", request)


def test_the_mocked_runs_parse():
    with (ROOT / "infra" / "tests" / "defaults.tftest.hcl").open() as file:
        blocks = plain(hcl2.load(file))
    names = [name for run in blocks["run"] for name in run]
    assert names[:2] == ["defaults", "everything_on"]


def test_the_log_group_is_the_one_that_jobs_name(parsed, resolve):
    group = parsed["resource"]["aws_cloudwatch_log_group.this"]
    assert resolve(group["name"]) == KNOWN["aws_cloudwatch_log_group.this.name"]


def test_names_are_those_of_the_submission(parsed, resolve, definitions):
    settings = Settings()
    name = parsed["resource"]["aws_batch_job_queue.this"]["name"]
    queues = {
        key: resolve(name.replace("${each.key}", key)) for key in resolve("${local.all_queues}")
    }
    assert queues == {
        "cpu": settings.cpu_queue,
        "cpu-spot": settings.cpu_spot_queue,
        "gpu": settings.gpu_queue,
        "gpu-spot": settings.gpu_spot_queue,
    }
    assert set(parsed["variable"]["max_vcpus"]["default"]) == set(queues)
    assert definitions["single"]["jobDefinitionName"] == settings.single_definition
    assert definitions["multi"]["jobDefinitionName"] == settings.multi_definition
    assert resolve("${local.checkout_prefix}") == settings.prefix
    given = parsed["output"]["settings"]["value"]
    names = re.findall(r"(\w+)\s*=", given)
    assert given.startswith("${yamlencode({") and names == [
        field.name for field in fields(settings)
    ]


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_a_submission_overrides_what_the_definition_has(definitions, num_nodes):
    job = Job(name="hello", command=["hello"], num_nodes=num_nodes, num_gpus=1, vcpus=8)
    kind = "single" if num_nodes == 1 else "multi"
    request = submit_request(
        job,
        queue=Settings().gpu_queue,
        definition=asdict(Settings())[f"{kind}_definition"],
        address="s3://bucket/checkouts/x.tar.gz",
        sha256="0" * 64,
        commit="none",
    )
    validate("SubmitJob", request)
    assert request["jobDefinition"] == definitions[kind]["jobDefinitionName"]
    if num_nodes > 1:
        nodes = definitions["multi"]["nodeProperties"]
        targets = [node_range["targetNodes"] for node_range in nodes["nodeRangeProperties"]]
        overridden = request["nodeOverrides"]["nodePropertyOverrides"]
        # Batch refuses targets that the definition lacks, and another number without an open range.
        assert [override["targetNodes"] for override in overridden] == targets == ["0:"]
        assert nodes["mainNode"] == 0


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_copy_with_more_shared_memory_can_be_made_of_them(definitions, kind):
    copy = with_shared_memory(definitions[kind], 65536)
    validate("RegisterJobDefinition", copy)
    container = (
        copy.get("containerProperties")
        or (copy["nodeProperties"]["nodeRangeProperties"][0]["container"])
    )
    assert container["linuxParameters"] == {"initProcessEnabled": True, "sharedMemorySize": 65536}
    # The policy for people allows copies under such names.
    assert re.fullmatch(r"refrag-.*-shm-.*", copy["jobDefinitionName"])


def test_secrets_come_by_their_address_only(parsed, definitions):
    container = definitions["single"]["containerProperties"]
    assert not [pair for pair in container["environment"] if is_secret_name(pair["name"])]
    assert parsed["locals"]["container"]["secrets"] == (
        "${[for name, arn in var.secret_arns : {name = name, valueFrom = arn}]}"
    )
    first = parsed["variable"]["secret_arns"]["validation"][0]["condition"]
    assert set(re.findall(r'"(\w+)"', first)) == set(docker.SECRETS)


def statements(parsed) -> list[dict[str, Any]]:
    found = []
    for body in parsed["data"].values():
        found += body.get("statement", [])
        for dynamic in body.get("dynamic", []):
            found += dynamic["statement"]["content"]
    return found


def test_rights_are_narrow(parsed):
    allowed = [given for given in statements(parsed) if given.get("effect") != "Deny"]
    assert len(allowed) > 15
    for given in allowed:
        assert not [action for action in given["actions"] if "*" in action]
    # The Service Authorization Reference lists no resource types for these.
    assert {
        action
        for given in allowed
        if given.get("resources") == ["*"]
        for action in given["actions"]
    } == {
        "ecr:GetAuthorizationToken",
        "ec2:DescribeTags",
        "ecs:DiscoverPollEndpoint",
        "batch:DescribeComputeEnvironments",
        "batch:DescribeJobDefinitions",
        "batch:DescribeJobQueues",
        "batch:DescribeJobs",
        "batch:ListJobs",
    }
    (denied,) = [given for given in statements(parsed) if given.get("effect") == "Deny"]
    assert denied["condition"] == [
        {"test": "Bool", "variable": "aws:SecureTransport", "values": ["false"]}
    ]


def test_people_cancel_their_own_project_s_jobs_and_submissions_are_tagged_so(parsed, resolve):
    """The ARN of a job does not say whose it is; by the service's reference its tags may."""
    (submit,) = [
        body["statement"] for name, body in parsed["data"].items() if name.endswith(".submit")
    ]
    conditions = {
        given["sid"]: {
            (each["test"], each["variable"]): resolve(each["values"])
            for each in given.get("condition", [])
        }
        for given in submit
        if any("batch:" in action for action in given["actions"]) and "job/*" in str(given)
    }
    project = Settings().project
    assert conditions == {
        "Cancel": {("StringEquals", "aws:ResourceTag/Project"): [project]},
        "TagJobs": {
            ("StringEquals", "aws:RequestTag/Project"): [project],
            ("StringEqualsIfExists", "aws:ResourceTag/Project"): [project],
        },
    }
    (cancel,) = [given for given in submit if given["sid"] == "Cancel"]
    assert cancel["actions"] == ["batch:CancelJob", "batch:TerminateJob"]
    for num_nodes in (1, 4):
        request = submit_request(
            Job(name="a", command=["hello"], num_nodes=num_nodes),
            **{"queue": "q", "definition": "d", "address": "s3://b/k", "sha256": "", "commit": ""},
        )
        validate("SubmitJob", request)
        assert request["tags"] == {"Project": project}


def test_definitions_are_the_project_s_own(parsed, definitions):
    """`refrag-single*` would be the definitions of a project called refrag-singleton as well."""
    arns = parsed["locals"]["definition_arns"]
    assert [re.findall(r"definition\.(\w+)\.name", arn) for arn in arns] == [["single"], ["multi"]]
    assert "-shm-*" in parsed["locals"]["copy_arns"]
    for statement in statements(parsed):
        if "batch:SubmitJob" in statement["actions"]:
            assert '"${arn}:*"' in str(statement["resources"])
            assert "*" not in str(statement["resources"]).replace('"${arn}:*"', "")


def test_nothing_is_open_and_nothing_idles(parsed):
    resources = parsed["resource"]
    access = resources["aws_s3_bucket_public_access_block.this"]
    assert {name: value for name, value in access.items() if name != "bucket"} == {
        "block_public_acls": True,
        "block_public_policy": True,
        "ignore_public_acls": True,
        "restrict_public_buckets": True,
    }
    (versioning,) = resources["aws_s3_bucket_versioning.this"]["versioning_configuration"]
    assert versioning["status"] == "Enabled"
    assert resources["aws_ecr_repository.this"]["image_tag_mutability"] == "IMMUTABLE"
    (metadata,) = resources["aws_launch_template.this"]["metadata_options"]
    assert metadata["http_tokens"] == "required" and metadata["http_put_response_hop_limit"] == 1
    (mapping,) = resources["aws_launch_template.this"]["block_device_mappings"]
    assert mapping["ebs"][0]["encrypted"] is True
    # Calls come from the same group only.
    ingress = [name for name in resources if "ingress" in name]
    assert ingress == ["aws_vpc_security_group_ingress_rule.nodes"]
    assert "cidr_ipv4" not in resources[ingress[0]]
    (compute,) = resources["aws_batch_compute_environment.this"]["compute_resources"]
    assert compute["min_vcpus"] == 0


def commands(document: str, script: str) -> list[list[str]]:
    text = (ROOT / document).read_text().replace("\\\n", " ")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    found = [line for line in lines if line.startswith(f"python scripts/{script}")]
    return [shlex.split(line, comments=True)[2:] for line in found]


@pytest.mark.parametrize(
    ("document", "script", "number"),
    [("infra/README.md", "submit_batch.py", 3), ("docs/docker.md", "run_docker.py", 5)],
)
def test_commands_of_the_documents_can_be_parsed(document, script, number, capsys):
    found = commands(document, script)
    assert len(found) == number
    for words in found:
        if script == "run_docker.py":
            assert docker.main(["--dry-run", *words]) == 0
            continue
        _, unknown = batch_command.parser().parse_known_args(words[: words.index("--")])
        assert unknown == []


def test_outputs_of_the_readme_exist(parsed):
    text = (ROOT / "infra" / "README.md").read_text()
    named = set(re.findall(r"\boutput (?:-raw )?(\w+)", text))
    assert named == {"settings", "image", "region", "runs", "submit_policy_arn"}
    assert named <= set(parsed["output"])
    assert set(re.findall(r"`(\w+\.tf)`", text)) <= {path.name for path in FILES}
