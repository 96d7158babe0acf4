"""What is a secret, for everything that leaves this machine: command lines, variables and files.

Whoever may describe a job reads its command and its variables, and whoever may read the bucket
reads the checkout. Batch hands secrets to the container itself, from Secrets Manager, where the job
definition lists them under `secrets`; docker takes them from the environment by name. What looks
like a secret elsewhere is refused, and no message repeats it. Looked at are:

- names: a variable or an option that is called a token, a password, a key (`is_secret_name`).
  Options such as `--pad_token` are no secrets;
- values that this process has in variables with such names, wherever they stand;
- forms: text that looks like a well-known secret (`hf_...`, AWS's keys, private keys, addresses
  with a password);
- files that are known to hold secrets (`.env`, `id_rsa`, `terraform.tfstate`; `file_secrets`).

Only shapes with a mark of their own are in the table of forms: what merely looks random (a hash, an
image in a notebook) is no finding. A file with a NUL byte among its first 8000 is binary, as for
git, and is not searched for forms, unless it begins with UTF-16's mark; archives are not opened.
"""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

# Names

# Words of a name: WANDB_API_KEY, dbPassword, HFToken, --logger.api-key.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORD = re.compile(
    r"\w*passw(or)?ds?|\w*passphrase|\w*passcode|secret(s|key|token|value|id)?|\w+secrets?"
    r"|credentials?|creds|\w*apikeys?|jwt|htpasswd"
    r"|(access|auth|private|secret|ssh|signing|encryption|master|account|openai|wandb|hf)keys?"
)
# At a name's end. "pass" and "pwd" alone, or behind another word: a PASS_RATE is no secret.
_SECRET_END = re.compile(r"token|key|pass|pw|pwd|pat|dsn|cookie|authorization|bearer|webhook|sas")
_KEY_OWNERS = "api access private secret signing encryption ssh auth service account master deploy"
_PLURALS = f"{_KEY_OWNERS} session bearer refresh hf github gitlab wandb slack bot".split()
# What the word before says is a model's or a table's: pad_token, cache_key, first_pass.
_ORDINARY = {
    "token": "pad padding bos eos eot eom unk unknown mask sep separator cls stop end start begin "
    "image audio video special control per by next previous prev first last new max min num n on "
    "one each every added doc document row answer prompt placeholder fim tool think prefix suffix "
    "middle boundary newline space word char sub single bad forced decoder encoder text query "
    "value latent memory register target sample de pre re",
    "key": "public sort primary foreign partition cache group hot text field column dict index "
    "lookup metric monitor query num row title id name map config state data batch",
    "pass": "num n first second third single one two multi forward backward low high band max min "
    "last pre post by",
}
_ORDINARY_BEFORE = {word: set(before.split()) for word, before in _ORDINARY.items()}
# Alone, PWD is the folder that one is in.
_ORDINARY_BEFORE["pwd"] = _ORDINARY_BEFORE["pw"] = {"", "old"}
# Behind the name proper: OPENAI_KEY_2, GITHUB_TOKEN_PROD, SSH_KEY_BASE64.
_SUFFIXES = {"prod", "production", "dev", "test", "live", "staging", "old", "new", "base", "b"}
# Where a secret lies is none.
_PLACES = {"file", "files", "path", "paths", "dir", "folder", "name", "arn", "arns", "store"}

# Forms


class _Form(NamedTuple):
    """What a secret looks like.

    Attributes:
        kind: What it is, with its article.
        mark: A piece that every such secret has, in small letters: a quick first look.
        pattern: The whole; the group, where there is one, is the part that is secret.
    """

    kind: str
    mark: str
    pattern: re.Pattern[str]


def _form(kind: str, mark: str, pattern: str) -> _Form:
    # A pattern that begins with a word is looked for by that word, and only then is it asked
    # whether one begins there: the other way round every character would be tried.
    begins = re.match(r"\\b([\w-]+)(?![?*+{])", pattern)
    if begins is not None:
        word = begins[1]
        pattern = rf"{word}(?<=\b{word}){pattern[begins.end() :]}"
    return _Form(kind, mark, re.compile(pattern))


def _encoded_keys() -> str:
    """Base64 of a private key's first line, as in a kubeconfig: one beginning for each kind."""
    kinds = ("", "RSA ", "EC ", "DSA ", "OPENSSH ", "ENCRYPTED ")
    lines = [f"-----BEGIN {kind}PRIVATE KEY".encode() for kind in kinds]
    # Whole groups of three bytes only: the next ones depend on what follows.
    return "|".join(base64.b64encode(line[: len(line) // 3 * 3]).decode() for line in lines)


_PEM = r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
_FORMS = (
    # The header with the beginning of a key behind it, in a file's lines or in a string's: code
    # that only names the header passes.
    _form(
        "a private key",
        "private key",
        _PEM + r"(?:(?:\s|\\[rn]){1,4}[\s\\\"'+>|#/*]{0,40}"
        r"(?:[A-Za-z-]{3,20}: [^\n\\]{0,200}(?:\s|\\[rn]){1,8}){0,4}n?([A-Za-z0-9+/=]{8,}))",
    ),
    _form("a private key", "ls0tls1crudjti", rf"({_encoded_keys()})"),
    _form(
        "a private key", '"private_key"', r'"private_key"\s{0,9}:\s{0,9}"([^"\s]{12}[^"]{0,4000})'
    ),
    _form("a private key", "putty-user-key-file-", r"PuTTY-User-Key-File-\d: \S"),
    _form("a private key", "age-secret-key-1", r"\bAGE-SECRET-KEY-1[0-9A-Z]{40,}"),
    _form("an AWS key id", "akia", r"(?<![A-Za-z0-9+/])AKIA[A-Z0-9]{16}(?![A-Za-z0-9+/])"),
    _form("an AWS key id", "asia", r"(?<![A-Za-z0-9+/])ASIA[A-Z0-9]{16}(?![A-Za-z0-9+/])"),
    _form(
        "an AWS secret key",
        "secret",
        r"(?i:secret_?access_?key|aws_?secret(?:_?key)?)[\"']?[\s:=>,(]{1,9}[\"']?"
        r"([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+])",
    ),
    _form("an AWS key", "absk", r"\bABSK[A-Za-z0-9+/]{40,}"),
    _form("a Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    _form("a Hugging Face token", "api_org_", r"\bapi_org_[A-Za-z0-9]{30,}"),
    _form("a Weights & Biases key", "wandb_v", r"\bwandb_v\d+_[A-Za-z0-9_]{20,}"),
    # The older ones are 40 hexadecimal digits, as a commit is: only behind "key" or the like.
    _form(
        "a Weights & Biases key",
        "wandb",
        r"(?i:wandb)[^\0]{0,80}?(?i:key|password|login)\W{1,9}([0-9a-f]{40})\b",
    ),
    *(_form("a GitHub token", f"gh{x}_", rf"\bgh{x}_[A-Za-z0-9]{{30,}}") for x in "opsur"),
    _form("a GitHub token", "github_pat_", r"\bgithub_pat_\w{30,}"),
    _form("a GitLab token", "gl", r"\bgl(?:pat|dt|rt|ptt|cbt|oas|ft|soat|agent|imt)-[\w.-]{20,}"),
    # OpenAI, Anthropic and others; a run of letters tells it from the names of style sheets.
    _form("an API key", "sk-", r"(?<![\w-])sk-[A-Za-z0-9_-]{0,60}?[A-Za-z0-9_]{20,}"),
    _form("an API key", "gsk_", r"\bgsk_[A-Za-z0-9]{40,}"),
    _form("an API key", "xai-", r"\bxai-[A-Za-z0-9]{60,}"),
    _form("an API key", "nvapi-", r"\bnvapi-[\w-]{50,}"),
    _form("an API key", "pplx-", r"\bpplx-[A-Za-z0-9]{40,}"),
    _form("an API key", "r8_", r"\br8_[A-Za-z0-9]{37}\b"),
    _form("an API key", "lsv2_", r"\blsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}\b"),
    _form("a Google key", "aiza", r"(?<![\w+/-])AIza[\w-]{35}(?![\w+/-])"),
    _form("a Google client secret", "gocspx-", r"\bGOCSPX-[\w-]{20,}"),
    _form("a Google token", "ya29.", r"\bya29\.[\w-]{30,}"),
    _form(
        "a client secret or a refresh token",
        '"',
        r'"(?:client_secret|refresh_token)"\s{0,9}:\s{0,9}"([^"\s]{16,4000})"',
    ),
    _form("an Azure key", "key=", r"\b(?:Account|SharedAccess)Key=([A-Za-z0-9+/]{40,}={0,2})"),
    _form("a Slack token", "xox", r"\bxox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{10,}"),
    _form("a Slack token", "xapp-", r"\bxapp-\d-[A-Za-z0-9-]{10,}"),
    _form("a Slack webhook", "hooks.slack.com", r"hooks\.slack\.com/services/(T\w+/B\w+/\w{16,})"),
    _form("a Stripe key", "k_live_", r"\b[sr]k_live_[A-Za-z0-9]{16,}"),
    _form("an npm token", "npm_", r"\bnpm_[A-Za-z0-9]{30,}"),
    _form("a PyPI token", "pypi-age", r"\bpypi-AgE[\w-]{30,}"),
    _form("a Docker Hub token", "dckr_", r"\bdckr_[a-z]{3}_[\w-]{20,}"),
    _form(
        "a registry's password",
        '"auths"',
        r'"auths"\s{0,9}:[^\0]{0,400}?"(?:auth|identitytoken)"\s{0,9}:\s{0,9}"([\w+/=.-]{8,})"',
    ),
    _form("a SendGrid key", "sg.", r"\bSG\.[\w-]{20,24}\.[\w-]{40,45}"),
    _form("a Vault token", "hv", r"\bhv[bs]\.[\w-]{24,}"),
    _form("a Databricks token", "dapi", r"\bdapi[0-9a-f]{32}\b"),
    _form("a DigitalOcean token", "_v1_", r"\bdo[opr]_v1_[0-9a-f]{64}\b"),
    # Header and claims both begin with `{"`.
    _form("a JSON web token", "eyj", r"\beyJ[\w-]{10,}\.(eyJ[\w-]{10,}\.[\w-]{20,})"),
    _form(
        "an address with a password",
        "://",
        r"://[^\s/:@\"'<>]{0,100}:([^\s/@\"'<>]{1,200})@[\w\[]",
    ),
)
# A value that nobody takes for a secret, in a file; on a command line there is no need for one.
_DUMMY = re.compile(
    r"(?i)example|placeholder|redacted|dummy|change_?me|your|x{4}|\*{3}|\.{3}"
    # What a shell, a template or a format puts a value in for.
    r"|^\$|\$[{(]|^\{|\{\{|%[s(]|^%.*%$"
    # The payload of jwt.io's token: John Doe.
    r"|eyJzdWIiOiIxMjM0NTY3ODkwIi"
)
_DUMMY_PASSWORDS = re.compile(
    r"(?i)p|pw|pwd|pass|passwd|password|secret|token|key|user|username|foo|bar|test|none|null|x|y|abc"
)

# Files

_KEY_NAME = re.compile(r"id_(rsa|dsa|ecdsa|ed25519|xmss)(?!.*\.(pub|py|md|rst)$)([_.-].*)?")
# What editors and people put behind a name to keep an older file.
_COPY = re.compile(r"(~|\.(bak|backup|old|orig|save))+$")
_TEMPLATE = re.compile(r"[._-](example|sample|template|tmpl|dist)s?\b")
# By the whole path, in small letters. These hold nothing but secrets.
_SECRET_FILES = tuple(
    (kind, re.compile(rf"(?:.*/)?(?:{pattern})"))
    for kind, pattern in (
        ("an environment file", r"\.env([^a-z/][^/]*)?"),
        ("a file of passwords", r"[._]netrc|\.git-?credentials|\.pgpass|pgpass\.conf"),
        ("a file of passwords", r"([^/]*\.)?htpasswd|\.mylogin\.cnf"),
        ("a file of passwords", r"\.vault[-_]pass(word)?(\.txt)?"),
        ("an SSH key", r"\.ssh/(?!known_hosts|authorized_keys|config$)[^/]*(?<!\.pub)"),
        ("a private key", r"\.gnupg/(private-keys-v1\.d/.*|secring\.gpg)"),
        ("a store of keys", r"[^/]*\.(p12|pfx|jks|keystore|kdbx)"),
        ("AWS credentials", r"\.aws/(credentials|(sso|cli)/cache/[^/]*)"),
        ("AWS credentials", r"rootkey\.csv|[^/]*_?accesskeys\.csv"),
        ("a kubeconfig", r"kubeconfig(\.ya?ml)?|[^/]*\.kubeconfig|\.kube/config"),
        ("a Terraform state", r"[^/]*\.tfstate(\.[^/]*)?"),
        ("a token's file", r"(\.cache/|\.)?huggingface/(token|stored_tokens)|\.?hf_token(\.txt)?"),
        ("a token's file", r"\.azure/(accesstokens\.json|msal_token_cache[^/]*)|\.vault-token"),
        ("a token's file", r"(\.config/)?gcloud/(credentials\.db|access_tokens\.db)"),
    )
)
# These hold secrets only if a line gives a secret's name a value.
_SETTINGS_FILES = re.compile(
    r"(?:.*/)?(?:[^/]*\.env|\.envrc|\.npmrc|\.yarnrc(\.yml)?|\.pypirc|\.dockercfg|\.dockerconfigjson"
    r"|\.docker/config\.json|[^/]*\.tfvars(\.json)?|\.my\.cnf|\.s3cfg|\.boto|\.databrickscfg"
    r"|\.?kaggle\.json|\.aws/[^/]*|credentials\.tfrc\.json|\.terraformrc"
    r"|\.?(credentials?|secrets?)(\.(toml|ya?ml|json|ini|txt|csv|env|properties))?|auth\.json"
    r"|\.gradle/[^/]*)"
)
_ASSIGNMENT = re.compile(
    r"(?<![\w.-])([A-Za-z_][\w.-]{0,100})[\"']?\s{0,9}(?:=>?|:)\s{0,9}[\"']?([^\s\"',;#}\[{(<][^\s\"',;#}]{3,})"
)
_SETTINGS_NAMES = {"auth", "_auth", "key", "identitytoken"}
_NO_SECRET = re.compile(r"(?i)true|false|none|null|arn:.*|(var|local|data|env|process\.env)\..*")
_KEY_ENDINGS = (".pem", ".key", ".der", ".ppk", ".asc", ".pk8", ".p8")
# DER: a sequence, its length, and the version number that private keys begin with (RFC 5208, 8017).
_DER_KEY = re.compile(rb"\x30(?:[\x00-\x7f]|\x81.|\x82..|\x83...)\x02\x01[\x00\x01]", re.DOTALL)
_BOMS = (
    # UTF-32's mark begins as UTF-16's does.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Shorter values would turn up in other words by chance.
_SHORTEST = 8
_HOW = (
    "keep it in Secrets Manager and name it under `secrets` of the job definition (docs/batch.md)"
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option is named like a secret: `HF_TOKEN`, `--logger.api_key`."""
    # Of an option, what it sets: --logger.init_args.api_key.
    last = name.strip("-+").rpartition(".")[2]
    words = [word.lower() for word in _WORD.findall(last)]
    if words and words[-1] in _PLACES:
        return False
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _SUFFIXES):
        words.pop()
    if words[-2:] == ["webhook", "url"]:
        words.pop()
    if any(_SECRET_WORD.fullmatch(word) for word in words):
        return True
    for before, word in pairwise(words):
        if word == "key" and before in _KEY_OWNERS.split():
            return True
        if word in ("tokens", "keys") and before in _PLURALS:
            return True
        if (before, word) == ("connection", "string"):
            return True
    return bool(words) and _ends_like_a_secret(words[-1], words[-2] if len(words) > 1 else "")


def _ends_like_a_secret(word: str, before: str) -> bool:
    if not before and word.endswith("token"):
        # HFTOKEN, one word for who writes it.
        before, word = word.removesuffix("token"), "token"
    if not _SECRET_END.fullmatch(word):
        return False
    return before not in _ORDINARY_BEFORE.get(word, ())


def secret_values(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of an environment, by the names of their variables."""
    return {
        name: value.strip()
        for name, value in environment.items()
        if is_secret_name(name) and len(value.strip()) >= _SHORTEST
    }


def refuse_secrets(
    words: Sequence[str], environment: Mapping[str, str], *, how: str = _HOW
) -> None:
    """Refuses a command line that holds a secret.

    Args:
        words: The words of the command line, of the job's command too.
        environment: This process's variables.
        how: What to do instead, for the message.

    Raises:
        ValueError: If a word holds a secret or an option is named like one. The message has no part
            of the value.
    """
    known = secret_values(environment)
    for name, value in known.items():
        if any(value in word for word in words):
            raise ValueError(f"the command line holds the value of {name}: {how}")
    for form in (*_FORMS, _form("a private key", "", _PEM)):
        if any(form.pattern.search(word) for word in words):
            raise ValueError(f"the command line holds {form.kind}: {how}")
    for name in _names(words):
        if is_secret_name(name):
            raise ValueError(f"{name} would be readable by others: {how}")


def file_secrets(name: str, data: bytes) -> list[tuple[int, str]]:
    """What in a file is a secret, or looks like one.

    Args:
        name: Its path; what is known to hold secrets is known by it.
        data: Its content.

    Returns:
        Lines, counted from 1, and what is there (`a private key`); line 0 stands for the whole
        file. Of a kind the first line only.
    """
    path = _COPY.sub("", name.lower())
    base = path.rpartition("/")[2]
    # Made to be read: .env.example.
    template = _TEMPLATE.search(base) is not None
    if data.strip() and not template:
        if _KEY_NAME.fullmatch(base):
            return [(0, "an SSH key")]
        for kind, pattern in _SECRET_FILES:
            if pattern.fullmatch(path):
                return [(0, kind)]
        if base.endswith(_KEY_ENDINGS) and _DER_KEY.match(data):
            return [(0, "a private key")]
    text = _text(data)
    if text is None:
        return []
    places: dict[str, int] = {}
    lowered = text.lower()
    for form in _FORMS:
        if form.kind not in places and form.mark in lowered:
            real = (found for found in form.pattern.finditer(text) if not _is_dummy(found))
            if (first := next(real, None)) is not None:
                places[form.kind] = first.start()
    # Of a file of keys the header is enough.
    if base.endswith(_KEY_ENDINGS) and not template and (header := re.search(_PEM, text)):
        places.setdefault("a private key", header.start())
    if _SETTINGS_FILES.fullmatch(path) or (template and "env" in base):
        for found in _ASSIGNMENT.finditer(text):
            if _is_set(found[1], found[2], template=template):
                places[f"a value of {found[1]}"] = found.start()
                break
    return sorted((text.count("\n", 0, place) + 1, kind) for kind, place in places.items())


def _is_set(name: str, value: str, *, template: bool) -> bool:
    """Whether a line of settings gives a secret's name a value that may be one."""
    if not is_secret_name(name) and name.lower() not in _SETTINGS_NAMES:
        return False
    if _NO_SECRET.fullmatch(value) or _DUMMY.search(value):
        return False
    # A template says "secret" or "hunter2"; a real token is longer.
    long = len(value) >= 20 and re.search("[0-9]", value) and re.search("[A-Za-z]", value)
    return bool(long) or not template


def _is_dummy(match: re.Match[str]) -> bool:
    value = match[1] if match.re.groups else match[0]
    return _DUMMY_PASSWORDS.fullmatch(value) is not None or _DUMMY.search(value) is not None


def _text(data: bytes) -> str | None:
    """A file's text, None for a binary one. Bytes that are no UTF-8 become other characters."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    return None if b"\0" in data[:8000] else data.decode("utf-8", errors="replace")


def _names(words: Iterable[str]) -> Iterator[str]:
    """What words name: `--option`, `--option=value`, `NAME=value` of `--env`."""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-") or (equals and name.isidentifier()):
            yield name
        # --env=NAME=value
        if name in ("--env", "--build-arg") and "=" in value:
            yield value.partition("=")[0]
