"""What looks like a secret is refused, and what only sounds like one is not."""

from __future__ import annotations

import pytest

from refrag_lightning.launch.batch_secrets import is_secret_name, refuse_secrets, secret_values

# Made up; put together here so that no scanner takes this file for a leak.
HF = "hf_" + "AbCdEfGhIj" * 3
AWS_ID = "AKIA" + "ABCDEFGH12345678"
GITHUB = "ghp_" + "a1" * 18


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "OPENAI_API_KEY",
        "DB_PASSWORD",
        "token",
        "--logger.init_args.api-key",
        "--model.hf_token",
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "WANDB_MODE",
        "HF_HOME",
        "AWS_PROFILE",
        "--model.pad_token",
        "--data.tokens",
        "--data.init_args.tokens_per_batch",
        "--model.key_value_heads",
        "--trainer.max_steps",
    ],
)
def test_names_of_other_things(name):
    assert not is_secret_name(name)


def test_only_values_that_cannot_be_there_by_chance_are_looked_for():
    environment = {"WANDB_API_KEY": " 0123456789ab\n", "HF_TOKEN": "short", "PATH": "/usr/bin:/bin"}
    assert secret_values(environment) == {"WANDB_API_KEY": "0123456789ab"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--env", "WANDB_API_KEY=abc"], "WANDB_API_KEY would be readable"),
        (["--env=HF_TOKEN=abc"], "HF_TOKEN would be readable"),
        (["--", "fit", "--logger.api_key", "abc"], "--logger.api_key would be readable"),
        (["--", "fit", "--logger.api_key=abc"], "--logger.api_key would be readable"),
        (["--", "fit", "--x", f"a{HF}"[1:]], "holds a Hugging Face token"),
        (["--env", f"X={HF}"], "holds a Hugging Face token"),
        (["--env", f"X={AWS_ID}"], "holds an AWS key id"),
        (["--", "fit", "--paths", f"x{GITHUB}"[1:]], "holds a GitHub token"),
        (["--", "fit", "--paths", "https://me:pass@host/x"], "holds an address with a password"),
        (["--name", "x-local-value-y"], "holds the value of WANDB_API_KEY"),
        (["--env", "X=local-value"], "holds the value of WANDB_API_KEY"),
    ],
)
def test_a_command_line_with_a_secret_is_refused_without_repeating_it(words, told):
    with pytest.raises(ValueError, match=told) as caught:
        refuse_secrets(words, {"WANDB_API_KEY": "local-value", "PATH": "fit"})
    message = str(caught.value)
    assert "job definition" in message
    for value in ("abc", HF, AWS_ID, GITHUB, "me:pass", "local-value"):
        assert value not in message


def test_an_ordinary_command_line_passes():
    refuse_secrets(
        [
            *[
                "--gpus",
                "1",
                "--env",
                "WANDB_MODE=offline",
                "--env",
                "N=1=2",
                "--bucket",
                "b",
                "--",
            ],
            *["fit", "--config", "configs/align.yaml", "--model.pad_token", "<pad>"],
            *["--runs_dir", "s3://bucket/runs", "--model.revision", "0" * 40],
        ],
        {"WANDB_API_KEY": "f" * 40},
    )
