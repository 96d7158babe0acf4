"""A git checkout and an AWS that are made up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REGION = "eu-central-1"


def git(folder: Path, *arguments: str) -> str:
    """Runs git, as somebody."""
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small checkout with one commit that passes for one of this project."""
    folder = tmp_path / "repository"
    write(
        folder,
        {
            ".gitignore": "*.log\nruns/\n",
            "setup.cfg": "[metadata]\n",
            "refrag_lightning/__init__.py": "",
            "refrag_lightning/launch/bootstrap.py": "print('boot')\n",
            "configs/align.yaml": "seed: 1\n",
        },
    )
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture
def aws_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that open nothing, and no settings of whoever runs the tests."""
    for name in os.environ:
        if name.startswith(("AWS_", "REFRAG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def aws(aws_environment: None):
    """moto's S3, Batch and CloudWatch."""
    from moto import mock_aws

    with mock_aws(config={"batch": {"use_docker": False}}):
        yield
