"""The image's files, and the docker commands that are made for it."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refrag_lightning.launch import docker

ROOT = Path(__file__).parents[2]
# In two parts, so that this file may travel with the checkout.
TOKEN = "hf_" + "thisIsTheSecretValue"


@pytest.fixture
def caller(monkeypatch, tmp_path):
    """A caller with a home, an id, and both secrets in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("REFRAG_CACHE", raising=False)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 99)
    monkeypatch.setattr(docker, "commit", lambda root: "abc123-dirty")
    return tmp_path


def commands(capsys, *arguments: str) -> list[str]:
    assert docker.main(["--dry-run", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def error(capsys, *arguments: str) -> str:
    assert docker.main(["--dry-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_dry_run_prints_the_whole_commands(caller, capsys):
    build, run = commands(capsys, "--", "fit", "--config", "configs/align.yaml")
    assert build == (
        f"docker build --file {ROOT}/Dockerfile --tag refrag_lightning:cpu "
        f"--build-arg VARIANT=cpu {ROOT}"
    )
    assert run == (
        "docker run --rm --init --interactive --shm-size 8g --user 1234:99 "
        f"--mount type=bind,source={ROOT},target=/workspace "
        f"--mount type=bind,source={ROOT}/runs,target=/workspace/runs "
        f"--mount type=bind,source={caller}/.cache/refrag_lightning,target=/cache/refrag_lightning "
        f"--mount type=bind,source={caller}/hub,target=/cache/huggingface "
        "--env HF_TOKEN --env WANDB_API_KEY --env GIT_COMMIT=abc123-dirty "
        "refrag_lightning:cpu fit --config configs/align.yaml"
    )


def test_the_index_of_the_cpu_build_is_passed_on(caller, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX_URL", "file:///wheels")
    build, _ = commands(capsys, "--", "hello")
    assert "--build-arg VARIANT=cpu --build-arg TORCH_INDEX_URL=file:///wheels" in build
    build, _ = commands(capsys, "--gpus", "all", "--", "hello")
    assert "TORCH_INDEX_URL" not in build


def test_dry_run_with_every_option(caller, capsys):
    (caller / "my texts").mkdir()
    build, run = commands(
        capsys,
        *("--variant", "cuda", "--gpus", "2", "--tag", "mine:1", "--shm", "16g"),
        *("--user", "1:2", "--no-checkout", "--build-arg", "EXTRAS=aws"),
        *("--mount", f"{caller}/my texts:/texts:ro", "--env", "HF_HUB_OFFLINE=1"),
        *("--env", "NOTE=two words", "--", "chat", "--question", "it's $HOME?"),
    )
    assert build.split()[4:] == [
        *("--tag", "mine:1", "--build-arg", "VARIANT=cuda", "--build-arg", "EXTRAS=aws"),
        str(ROOT),
    ]
    assert run == (
        "docker run --rm --init --interactive --shm-size 16g --user 1:2 --gpus 2 "
        f"--mount type=bind,source={ROOT}/runs,target=/workspace/runs "
        f"--mount type=bind,source={caller}/.cache/refrag_lightning,target=/cache/refrag_lightning "
        f"--mount type=bind,source={caller}/hub,target=/cache/huggingface "
        f"--mount 'type=bind,source={caller}/my texts,target=/texts,readonly' "
        "--env HF_TOKEN --env WANDB_API_KEY --env GIT_COMMIT=abc123-dirty "
        "--env HF_HUB_OFFLINE=1 --env 'NOTE=two words' "
        "mine:1 chat --question 'it'\"'\"'s $HOME?'"
    )


def test_jupyter_listens_on_this_machine_only(caller, capsys):
    build, run = (shlex.split(line) for line in commands(capsys, "--jupyter", "--port", "9000"))
    assert build[-3:-1] == ["--build-arg", "JUPYTER=true"]
    assert run[run.index("--publish") + 1] == "127.0.0.1:9000:9000"
    assert run[run.index("refrag_lightning:cpu-jupyter") + 1 :] == [
        *("--exec", "jupyter", "lab", "--ip=0.0.0.0", "--port=9000"),
        *("--ServerApp.port_retries=0", "--no-browser"),
    ]


@pytest.mark.parametrize(
    ("gpus", "variant", "option"),
    [("none", "cpu", None), ("all", "cuda", "all"), ("device=0,2", "cuda", '"device=0,2"')],
)
def test_gpus_choose_the_variant(caller, capsys, gpus, variant, option):
    _, run = commands(capsys, "--gpus", gpus)
    words = shlex.split(run)
    assert words[-1] == f"refrag_lightning:{variant}"
    # Docker's documentation of --gpus: a device list needs quotes that reach docker.
    assert option == (words[words.index("--gpus") + 1] if "--gpus" in words else None)


@pytest.mark.parametrize(
    "tag",
    [
        *["mine", "mine:1", "a/b-c__d.e:V1.2_3-x", "localhost:5000/a/b:1", "[::1]:5000/a"],
        *["111122223333.dkr.ecr.eu-central-1.amazonaws.com/refrag:v1", f"a@sha256:{'0' * 64}"],
    ],
)
def test_names_of_images_that_docker_takes(caller, capsys, tag):
    _, run = commands(capsys, "--tag", tag, "--", "hello")
    assert shlex.split(run)[-2:] == [tag, "hello"]


def test_no_build_and_a_terminal(caller, capsys):
    (run,) = commands(capsys, "--no-build")
    assert "--tty" not in run
    options = docker.parse(["--no-build"])
    assert "--tty" in docker.run_command(options, [], {}, terminal=True)


def test_a_comma_in_a_path_is_quoted_as_docker_reads_it(caller, capsys):
    (caller / "a,b").mkdir()
    _, run = commands(capsys, "--mount", f"{caller}/a,b:/data")
    mounts = [word for word in shlex.split(run) if word.startswith("type=bind")]
    assert mounts[-1] == f'type=bind,"source={caller}/a,b",target=/data'


def test_secrets_are_passed_on_by_name(caller, capsys):
    out = "\n".join(commands(capsys, "--env", "HF_TOKEN", "--env", "WANDB_API_KEY", "--jupyter"))
    assert TOKEN not in out
    assert out.count("--env HF_TOKEN") == out.count("--env WANDB_API_KEY") == 1


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"]
)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(caller, capsys, name):
    message = error(capsys, "--env", f"{name}=hunter2-and-more")
    assert name in message and "hunter2" not in message
    assert TOKEN not in error(capsys, "--env", f"{name}={TOKEN}")


def test_a_variable_that_only_looks_like_a_secret_is_set(caller, capsys):
    _, run = commands(capsys, "--env", "TOKENIZERS_PARALLELISM=false")
    assert "--env TOKENIZERS_PARALLELISM=false" in run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit"], "'fit' is no option; what the container shall run follows --"),
        (["--gpus", "some"], "--gpus takes all, a number, device=0,1 or none, not 'some'"),
        (["--gpus", "0"], "--gpus takes all, a number, device=0,1 or none, not '0'"),
        (["--gpus", "1", "--variant", "cpu"], "--gpus 1 needs --variant cuda, not cpu"),
        (["--variant", "rocm"], "argument --variant: invalid choice: 'rocm'"),
        (["--mount", "/tmp"], "--mount takes SRC:DST or SRC:DST:ro, not '/tmp'"),
        (["--mount", "/tmp:/x:rx"], "--mount takes SRC:DST or SRC:DST:ro, not '/tmp:/x:rx'"),
        (["--mount", "/nowhere/at/all:/x"], "there is no /nowhere/at/all"),
        (["--mount", "/tmp:x"], "'x' has to be an absolute path"),
        (["--env", "REFRAG_NOT_SET"], "REFRAG_NOT_SET is not set here"),
        (["--env", "A-B=1"], "--env takes NAME or NAME=VALUE, not 'A-B=...'"),
        (["--build-arg", "EXTRAS"], "--build-arg takes NAME=VALUE, not 'EXTRAS'"),
        (["--jupyter", "--", "fit"], "--jupyter takes no command, and was given 'fit'"),
        (["--tag=--privileged"], "--tag takes an image's name, such as refrag_lightning:cpu, not"),
        *[
            (["--tag", tag], f"not {tag!r}")
            for tag in (
                "Mine",
                "a/../b",
                "a:-b",
                "a b",
                "a//b",
                "a:b:c",
                "a@sha256:0",
                "",
                "a" * 500,
            )
        ],
        (["--shm=--privileged"], "--shm takes a size such as 8g, not '--privileged'"),
        (["--user=--privileged"], "--user takes UID:GID, not '--privileged'"),
        (["--gpus=device=-1"], "--gpus takes all, a number, device=0,1 or none, not 'device=-1'"),
        (["--port", "0", "--jupyter"], "--port takes 1 to 65535, not 0"),
        (["--mount", "/tmp:/x/../../etc"], "has to be an absolute path without '..'"),
        (["--build-arg=--x=1"], "--build-arg takes NAME=VALUE, not '--x=...'"),
        (["--env", "DB_PASS=x"], "DB_PASS would be readable by others: export it and give"),
        (["--build-arg", "NPM_TOKEN=x"], "NPM_TOKEN would be readable by others"),
        (["--env", f"X={TOKEN}ButLonger"], "the command line holds"),
    ],
)
def test_errors_are_one_line(caller, capsys, arguments, expected):
    assert expected in error(capsys, *arguments)


# All that the script needs of the package.
PARTS = [
    *("__init__.py", "git_state.py", "plain_text.py", "launch/__init__.py"),
    *("launch/batch_secrets.py", "launch/docker.py", "launch/checkout.py"),
]

# A docker that notes what it was called with, and fails as it is told to.
FAKE = """#!{python} -S
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("HF_TOKEN")]) + "\\n")
sys.exit(int(os.environ[sys.argv[1].upper() + "_CODE"]))
"""


@pytest.fixture
def script(tmp_path):
    def run(*arguments, build_code=0, run_code=0):
        fake = tmp_path / "bin" / "docker"
        fake.parent.mkdir()
        fake.write_text(FAKE.format(python=sys.executable))
        fake.chmod(0o755)
        # A checkout of its own, since the folder of the runs is made in it.
        for name in ("scripts/run_docker.py", *(f"refrag_lightning/{part}" for part in PARTS)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        environment = {
            "PATH": str(fake.parent),
            "HOME": str(tmp_path / "home"),
            "CALLS": str(tmp_path / "calls"),
            "BUILD_CODE": str(build_code),
            "RUN_CODE": str(run_code),
            "HF_TOKEN": TOKEN,
        }
        # -S: without installed packages.
        done = subprocess.run(
            [sys.executable, "-S", str(tmp_path / "scripts" / "run_docker.py"), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done, calls

    return run


def test_builds_then_runs_and_ends_with_the_containers_code(script, tmp_path):
    done, calls = script("--", "fit", "--config", "a b.yaml", run_code=7)
    assert done.returncode == 7
    assert [arguments[0] for arguments, _ in calls] == ["build", "run"]
    run, token = calls[1]
    assert run[-4:] == ["refrag_lightning:cpu", "fit", "--config", "a b.yaml"]
    # The value reaches docker by its environment, and nobody else.
    assert token == TOKEN
    assert TOKEN not in json.dumps(run) + done.stdout + done.stderr
    assert (tmp_path / "home" / ".cache" / "refrag_lightning").is_dir()
    assert (tmp_path / "runs").is_dir()


def test_a_failed_build_runs_nothing(script):
    done, calls = script("--", "fit", build_code=3)
    assert done.returncode == 3
    assert [arguments[0] for arguments, _ in calls] == ["build"]


def test_without_docker_there_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert docker.main(["--", "fit"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: there is no docker here; --dry-run prints what would be run\n"


# The files


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def arguments_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def sources() -> list[str]:
    words = [shlex.split(rest) for rest in arguments_of("COPY")]
    return [word for copy in words for word in copy[:-1] if not word.startswith("--")]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out, by the part of its rules that the file uses."""
    rules = [line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    parts = path.split("/")
    return any(
        any(fnmatch.fnmatchcase(part, rule[3:]) for part in parts)
        if rule.startswith("**/")
        else fnmatch.fnmatchcase(parts[0], rule)
        for rule in rules
    )


def test_what_is_copied_is_there_and_not_left_out():
    assert {"setup.cfg", "constraints.txt", "refrag_lightning", "configs"} <= set(sources())
    for source in sources():
        assert (ROOT / source).exists() and not ignored(source)
    listed = subprocess.run(
        ["git", "ls-files", "--", *sources()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = listed.stdout.splitlines()
    assert "refrag_lightning/cli.py" in files
    assert [file for file in files if ignored(file)] == []


def test_packages_are_installed_before_the_code_is_copied():
    steps = [f"{name} {rest}" for name, rest in instructions()]
    install = next(
        place for place, step in enumerate(steps) if "pip install -c constraints" in step
    )
    extras = next(place for place, step in enumerate(steps) if "-e " in step)
    code = steps.index("COPY --chown=refrag:refrag refrag_lightning refrag_lightning")
    assert install < extras < code
    early = {word for step in steps[:extras] if step.startswith("COPY") for word in step.split()}
    # Of the package only the file that setup.cfg reads the version from.
    assert {word for word in early if "refrag_lightning" in word} == {
        "refrag_lightning/__init__.py",
        "refrag_lightning/",
    }


def test_the_image_is_what_the_rest_expects():
    (entry,) = arguments_of("ENTRYPOINT")
    words = json.loads(entry)
    assert words == ["python", "-m", "refrag_lightning.launch.bootstrap"]
    assert importlib.util.find_spec(words[2]) is not None
    (user,) = arguments_of("USER")
    assert user == "1000:1000"
    assert any("useradd --uid 1000 " in step for step in arguments_of("RUN"))
    assert arguments_of("WORKDIR") == [docker.WORKSPACE]
    (variables,) = arguments_of("ENV")
    values = dict(pair.split("=", 1) for pair in shlex.split(variables))
    assert values["HF_HOME"] == docker.HF_CACHE
    assert values["REFRAG_CACHE"] == docker.REFRAG_CACHE


def test_build_arguments_and_extras_exist(caller, capsys):
    defaults = dict(rest.partition("=")[::2] for rest in arguments_of("ARG"))
    build, _ = commands(capsys, "--jupyter", "--gpus", "all")
    given = re.findall(r"--build-arg (\w+)=", build)
    assert given == ["VARIANT", "JUPYTER"]
    assert set(given) <= set(defaults)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(defaults["EXTRAS"].split(",")) <= set(setup["options.extras_require"])
    assert defaults["VARIANT"] in ("cpu", "cuda")


def test_what_git_ignores_is_not_sent_to_docker():
    def rules(path):
        lines = [line.strip() for line in path.read_text().splitlines()]
        return {line for line in lines if line and not line.startswith("#")}

    here = rules(ROOT / ".dockerignore")
    for file in (ROOT / ".gitignore", ROOT / "infra" / ".gitignore"):
        assert {f"**/{rule}" for rule in rules(file)} <= here
    for path in (
        "refrag_lightning/text/__pycache__/batch.cpython-311.pyc",
        "runs/align/2026-01-01/model/model.safetensors",
        "infra/terraform.tfstate",
        "configs/.env",
        ".git/config",
    ):
        assert ignored(path)
