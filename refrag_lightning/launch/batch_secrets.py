"""Secrets do not go into a job's command or variables: whoever may describe a job reads those.

Batch hands them to the container itself, from Secrets Manager, where the job definition lists them
under `secrets`. What looks like a secret elsewhere is refused before anything else reads the
command line, so that no message can repeat it. Three things are looked at:

- values that this process has in variables with a secret's name (WANDB_API_KEY, HF_TOKEN, AWS's
  keys and the like), wherever they stand, in a file of the checkout too;
- text with the form of a well-known secret (`hf_...`, AWS's key ids, GitHub's tokens, private keys,
  addresses with a password);
- names: a variable or an option that is called a token, a password or an API key. Options such as
  `--pad_token` are no secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_NAME = re.compile(
    r"(api_?key|access_?key(_id)?|private_?key|secret|passw(or)?d"
    r"|(^|hf_|hub_|hugging_?face_|auth_|access_|session_|bearer_|github_|wandb_|api_)token)$",
    re.IGNORECASE,
)
_FORMS = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{20,}")),
    ("a Weights & Biases key", re.compile(r"\bwandb_v\d+_[A-Za-z0-9_]{20,}")),
    ("an AWS key id", re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("a GitHub token", re.compile(r"\b(gh[opsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,})")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{30,}")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")),
    ("an address with a password", re.compile(r"://[^/\s:@]+:[^/\s@]+@")),
)
# Shorter values would turn up in other words by chance.
_SHORTEST = 8
_HOW = (
    "keep it in Secrets Manager and name it under `secrets` of the job definition (docs/batch.md)"
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option is named like a secret: `HF_TOKEN`, `--logger.api_key`."""
    last = name.lstrip("-").replace("-", "_").rpartition(".")[2]
    return _NAME.search(last) is not None


def secret_values(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of an environment, by the names of their variables."""
    return {
        name: value.strip()
        for name, value in environment.items()
        if is_secret_name(name) and len(value.strip()) >= _SHORTEST
    }


def refuse_secrets(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuses a command line that holds a secret.

    Args:
        words: The words of the command line, of the job's command too.
        environment: This process's variables.

    Raises:
        ValueError: If a word holds a secret or an option is named like one. The message has no part
            of the value.
    """
    known = secret_values(environment)
    for name, value in known.items():
        if any(value in word for word in words):
            raise ValueError(f"the command line holds the value of {name}: {_HOW}")
    for kind, form in _FORMS:
        if any(form.search(word) for word in words):
            raise ValueError(f"the command line holds {kind}: {_HOW}")
    for name in _names(words):
        if is_secret_name(name):
            raise ValueError(f"{name} would be readable in the job: {_HOW}")


def _names(words: Iterable[str]) -> Iterable[str]:
    """What words name: `--option`, `--option=value`, `NAME=value` of `--env`."""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-") or (equals and name.isidentifier()):
            yield name
        # --env=NAME=value
        if name == "--env" and value:
            yield value.partition("=")[0]
