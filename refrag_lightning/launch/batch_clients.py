"""Clients of AWS, and what went wrong with them on one line."""

from __future__ import annotations

from typing import Any


def client(service: str, region: str | None) -> Any:
    """A boto3 client that retries what may pass.

    Args:
        service: `s3`, `batch` or `logs`.
        region: AWS region; None leaves it to AWS_REGION or the profile.

    Raises:
        ValueError: If boto3 is not installed.
        botocore.exceptions.NoRegionError: If there is no region.
    """
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError:
        raise ValueError("boto3 is not installed: pip install 'refrag-lightning[aws]'") from None
    config = Config(retries={"mode": "standard", "total_max_attempts": 6})
    return boto3.client(service, region_name=region, config=config)


def aws_message(error: Exception) -> str | None:
    """What AWS or the way to it refused, or None for an error of another kind."""
    try:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            NoRegionError,
        )
    except ModuleNotFoundError:
        return None
    if isinstance(error, NoRegionError):
        return (
            "no AWS region: give --region, set REFRAG_BATCH_REGION or AWS_REGION, or put `region:` "
            "into the settings file"
        )
    if isinstance(error, NoCredentialsError):
        return "no AWS credentials: set AWS_PROFILE, or run `aws configure` or `aws sso login`"
    if isinstance(error, ClientError):
        said = error.response.get("Error", {})
        return f"AWS refused {error.operation_name}: {said.get('Code')}: {said.get('Message')}"
    if isinstance(error, BotoCoreError):
        return str(error)
    return None


def is_passing(error: Exception) -> bool:
    """Whether an error of AWS may be gone at the next attempt."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        return status >= 500 or status == 429 or "Throttl" in code or "TooManyRequests" in code
    # Missing credentials, for one, stay missing.
    return isinstance(error, ConnectionError | HTTPClientError)
