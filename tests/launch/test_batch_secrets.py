"""What looks like a secret is refused, and what only sounds like one is not."""

from __future__ import annotations

import ast
import base64
import time
from pathlib import Path

import pytest
import yaml

from refrag_lightning.launch.batch_secrets import (
    file_secrets,
    is_secret_name,
    refuse_secrets,
    secret_values,
)

ROOT = Path(__file__).parents[2]

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
        *["DB_PASS", "DB_PASS2", "REDIS_PASS", "PGPASSWORD", "MYSQL_PWD", "GPG_PASSPHRASE", "PASS"],
        *["OPENAI_KEY", "OPENAI_KEY_2", "OPENAI_APIKEY", "API_KEYS", "STRIPE_KEY", "KEY"],
        *["SSH_KEY_BASE64", "ENCRYPTION_KEY", "DJANGO_SECRET_KEY", "MY_SECRET_THING", "JWT_SECRET"],
        *["CLIENTSECRET", "GH_PAT", "SLACK_TOKEN", "TELEGRAM_BOT_TOKEN", "GITHUB_TOKEN_PROD"],
        *["HFTOKEN", "HFToken", "apiKey", "dbPassword", "npm_config__authToken", "SENTRY_DSN"],
        *["GOOGLE_CREDENTIALS", "SLACK_WEBHOOK_URL", "AZURE_STORAGE_CONNECTION_STRING"],
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
        *["MAX_TOKENS", "NUM_TOKENS", "EOS_TOKEN", "TOKEN_LIMIT", "KEYBOARD", "MONKEY", "TURKEY"],
        *["NUM_KEYS", "KEYS", "CACHE_KEY", "SORT_KEY", "PUBLIC_KEY", "PASSAGES", "COMPASS"],
        *["BYPASS", "PASS_RATE", "FIRST_PASS", "PATH", "PATTERN", "PWD", "OLDPWD", "SECRETARY"],
        # Where a secret lies is none.
        *["SSH_AUTH_SOCK", "GIT_ASKPASS", "DB_PASSWORD_FILE", "AWS_SHARED_CREDENTIALS_FILE"],
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


def test_no_option_of_the_configurations_is_called_like_a_secret():
    names = set()

    def collect(value):
        if isinstance(value, dict):
            names.update(map(str, value))
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                collect(inner)

    for path in (ROOT / "configs").rglob("*.yaml"):
        collect(yaml.safe_load(path.read_text()))
    # And of the classes that configurations name: fields, and arguments of constructors.
    for path in (ROOT / "refrag_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    names.add(inner.target.id)
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    names |= {each.arg for each in [*inner.args.args, *inner.args.kwonlyargs]}
    assert len(names) > 300
    # The key of a table's lines, which nobody sets.
    assert [name for name in sorted(names) if is_secret_name(name)] == ["key"]


HEX40 = "0123456789abcdef" * 2 + "01234567"
LETTERS = "Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8" * 4


def pem(kind: str, *headers: str, end: str = "\n") -> str:
    lines = [f"-----BEGIN {kind}PRIVATE KEY-----", *headers, "MIIEpAIBAAKCAQEA" * 4]
    return end.join([*lines, f"-----END {kind}PRIVATE KEY-----"])


# In parts, so that this file may travel with the checkout.
FORMS = {
    "pkcs8": ("a private key", pem("")),
    "rsa": ("a private key", pem("RSA ")),
    "ec": ("a private key", pem("EC ")),
    "openssh": ("a private key", pem("OPENSSH ")),
    "encrypted": ("a private key", pem("ENCRYPTED ")),
    "old encrypted": (
        "a private key",
        pem("RSA ", "Proc-Type: 4,ENCRYPTED", "DEK-Info: AES-128-CBC,00112233445566778899", ""),
    ),
    "windows": ("a private key", pem("RSA ", end="\r\n")),
    "in JSON": ("a private key", '{"private_key": "' + pem("", end="\\n") + '"}'),
    "in YAML": ("a private key", "key: |\\n    " + pem("RSA ", end="\n    ")),
    "in Python": ("a private key", 'KEY = ("' + pem("", end='\\n"\n    "') + '")'),
    "in one line": ("a private key", f"KEY={pem('', end=' ')}"),
    "in base64": ("a private key", base64.b64encode(pem("RSA ").encode()).decode()),
    "pgp": (
        "a private key",
        pem("PGP ").replace("KEY-----", "KEY BLOCK-----").replace("\n", "\nVersion: 1\n\n", 1),
    ),
    "putty": ("a private key", "PuTTY-User-Key-File" + "-3: ssh-ed25519\nEncryption: none\n"),
    "aws id": ("an AWS key id", f'id = "{AWS_ID}"'),
    "aws temporary id": ("an AWS key id", "ASIA" + "2345ABCD6789EFGH"),
    "aws secret": ("an AWS secret key", "aws_secret_access_key = " + LETTERS[:38] + "/+"),
    "aws in JSON": ("an AWS secret key", '"SecretAccessKey": "' + LETTERS[:40] + '"'),
    "github": ("a GitHub token", GITHUB),
    "github server": ("a GitHub token", "ghs_" + "a1" * 18),
    "github fine": ("a GitHub token", "github_pat_" + "11ABCDEFG0_" + "a1" * 20),
    "gitlab": ("a GitLab token", "glpat-" + LETTERS[:20]),
    "hub": ("a Hugging Face token", HF),
    "openai": ("an API key", "sk-" + LETTERS[:48]),
    "openai project": ("an API key", "sk-proj-" + LETTERS[:60]),
    "anthropic": ("an API key", "sk-ant-api03-" + LETTERS[:90] + "-AA"),
    "slack": ("a Slack token", "xoxb-" + "123456789012-" + LETTERS[:24]),
    "slack hook": (
        "a Slack webhook",
        "https://hooks.slack.com/services/" + "T0A/B0B/" + LETTERS[:24],
    ),
    "google": ("a Google key", "AIza" + LETTERS[:35]),
    "google user": (
        "a client secret or a refresh token",
        '{"refresh_token": "' + f'1//{LETTERS[:30]}"' + "}",
    ),
    "stripe": ("a Stripe key", "sk_live_" + LETTERS[:24]),
    "npm": ("an npm token", "npm_" + LETTERS[:36]),
    "pypi": ("a PyPI token", "pypi-AgE" + "IcHlwaS5vcmc" + LETTERS),
    "wandb in netrc": ("a Weights & Biases key", f"machine api.wandb.ai password {HEX40}"),
    "wandb in code": ("a Weights & Biases key", f'wandb.login(key="{HEX40}")'),
    "wandb variable": ("a Weights & Biases key", f"export WANDB_API_KEY={HEX40}"),
    "docker": (
        "a registry's password",
        '{"auths": {"ghcr.io": {"auth": "' + 'bWU6aHVudGVyMg=="}}}',
    ),
    "jwt": ("a JSON web token", "eyJ" + f"{LETTERS[:30]}.eyJ{LETTERS[:40]}.{LETTERS[:43]}"),
    "address": ("an address with a password", "postgresql://app:" + "hunter2@db.internal/x"),
    "address without user": ("an address with a password", "redis://:" + "hunter2@cache:6379"),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_are_found_in_any_text_by_their_line(case):
    kind, secret = FORMS[case]
    found = file_secrets("notes/a.md", f"# Notes\r\nhére\n\n{secret}\nmore\n".encode())
    assert (4, kind) in found
    assert not any(part in kind for _, kind in found for part in (HEX40, LETTERS[:16], "hunter2"))


@pytest.mark.parametrize(
    "text",
    [
        "AKIA" + "IOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY",
        "HF_TOKEN=hf_" + "x" * 34,
        "OPENAI_API_KEY=sk-" + "your-key-goes-here-and-is-longer-than-this",
        "-----BEGIN " + "PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        'if "-----BEGIN ' + 'PRIVATE KEY-----" in text:\n    raise ValueError(text)',
        "-----BEGIN CERTIFICATE-----\nMIIEpAIBAAKCAQEAMIIEpAIBAAKCAQEA\n-----END CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----\nMIIEpAIBAAKCAQEAMIIEpAIBAAKCAQEA\n-----END PUBLIC KEY-----",
        "https://user:" + "password@example.com and http://${USER}:" + "${PASS}@host/",
        f"wandb 0.22 at commit {HEX40}, key figures below",
        "class=sk-fading-circle-with-a-very-long-name-of-a-style-sheet",
        # The token that jwt.io shows.
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiw"
        "iaWF0IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
        "hf_hub_download(repo, token=token); model.pad_token = 'a'; password = get_password()",
        "from transformers import AutoModelForCausalLM as hf_" + "AutoModelForCausalLM",
        "image/png;base64," + base64.b64encode(bytes(range(256)) * 20).decode(),
    ],
    ids=range(15),
)
def test_dummies_and_what_only_looks_like_a_secret_pass(text):
    assert file_secrets("docs/a.md", text.encode()) == []


@pytest.mark.parametrize(
    "name",
    [
        *[
            ".env",
            "a/.env",
            ".env.local",
            ".env.production",
            ".ENV",
            ".netrc",
            "_netrc",
            "b/.netrc",
        ],
        *["id_rsa", "keys/id_ed25519", "id_ecdsa", "id_rsa_github", "id_rsa.bak", ".ssh/deploy"],
        *[".git-credentials", ".pgpass", ".htpasswd", "conf/htpasswd", ".aws/credentials"],
        *["x_accessKeys.csv", "kubeconfig", ".kube/config", "prod.kubeconfig", "terraform.tfstate"],
        *["infra/terraform.tfstate.backup", "store.p12", "cert.PFX", ".huggingface/token"],
        *[".cache/huggingface/token", ".vault-token"],
        *[".env~", ".env-prod", ".env_local", ".env copy", ".netrc.bak", ".aws/credentials.old"],
    ],
)
def test_files_that_are_known_to_hold_secrets(name):
    assert [line for line, _ in file_secrets(name, b"anything\n")] == [0]
    assert file_secrets(name, b"\n") == [], "an empty file holds none"


SETTINGS = [
    (".npmrc", "registry=https://r.example\n//r.example/:_authToken=0a1b2c3d\n", 2),
    (".npmrc", "registry=https://r.example\n//r.example/:_authToken=${NPM_TOKEN}\n", None),
    (".pypirc", "[pypi]\nusername = me\npassword = hunter2\n", 3),
    (".pypirc", "[distutils]\nindex-servers = pypi\n", None),
    (".dockercfg", '{"https://index.docker.io/v1/": {"auth": "bWU6aHVudGVyMg=="}}', 1),
    (".docker/config.json", '{"credsStore": "desktop"}', None),
    ("prod.tfvars", 'region = "eu"\ndb_password = "hunter2"\n', 2),
    (
        "terraform.tfvars",
        'secret_arns = {\n  WANDB_API_KEY = "arn:aws:secretsmanager:eu:1:secret:a"\n}',
        None,
    ),
    ("conf/prod.env", "DEBUG=1\nexport DB_PASS=hunter2\n", 2),
    ("conf/prod.env", "DEBUG=1\nMAX_TOKENS=4096\nDB_PASS=\n", None),
    ("kaggle.json", '{"username":"me","key":"0a1b2c3d"}', 1),
    (".env.example", "DB_PASS=hunter2\nHF_TOKEN=\nOPENAI_API_KEY=your-key\n", None),
    (".env.example", "DB_PASS=\nHF_TOKEN=" + HF, 2),
    ("prod.env.bak", "DB_PASS=hunter2\n", 1),
    (".npmrc~", "//r.example/:_authToken=0a1b2c3d\n", 1),
    (".secrets.toml", "[default]\npassword = 'hunter2'\n", 2),
    (".credentials", "[default]\nregion = eu\n", None),
    (".envrc", "use flake\n", None),
    (".environment.md", "about .env\n", None),
    (".env-example", "DB_PASS=\n", None),
    (".env.example.bak", "DB_PASS=\n", None),
    (".env.sample", "A=1\nSERVICE_TOKEN=" + LETTERS[:32], 2),
    (".ssh/known_hosts", "host ssh-ed25519 AAAA\n", None),
    ("id_rsa.pub", "ssh-rsa AAAA me\n", None),
    ("tests/id_rsa.py", "x = 1\n", None),
    ("ca.pem", "-----BEGIN CERTIFICATE-----\nMIIEpAIBAAKCAQEA\n", None),
    ("server.key", "-----BEGIN " + "PRIVATE KEY-----\nshort\n", 1),
    ("environment.yml", "dependencies:\n  - python\n", None),
]


@pytest.mark.parametrize(("name", "text", "line"), SETTINGS, ids=range(len(SETTINGS)))
def test_files_that_may_hold_secrets_are_judged_by_what_is_in_them(name, text, line):
    found = {place for place, _ in file_secrets(name, text.encode())}
    assert found == ({line} if line else set())


def test_what_is_text_and_what_is_not():
    assert file_secrets("a.txt", HF.encode("utf-16")) == [(1, "a Hugging Face token")]
    assert file_secrets("a.txt", b"\xff caf\xe9\n" + HF.encode()) == [(2, "a Hugging Face token")]
    assert file_secrets("a.bin", b"\0" + HF.encode()) == []
    # A key as DER has no text in it; a presentation may have the same ending.
    der = b"\x30\x82\x04\xbd\x02\x01\x00\x30\x0d" + bytes(100)
    assert file_secrets("server.key", der) == [(0, "a private key")]
    assert file_secrets("talk.key", b"PK\x03\x04" + bytes(100)) == []


@pytest.mark.parametrize(
    "unit",
    [
        *["a", "a" * 50 + ":", "://", "://a:", "wandb", "sk-", "A-: ", '"auths":', "eyJ", "\n"],
        *["-----BEGIN " + "PRIVATE KEY-----\n", "key ", "password=", "aws_secret", "eyJa.", "hf_"],
    ],
    ids=range(16),
)
def test_long_files_take_no_longer_than_they_are(unit):
    def seconds(size: int) -> float:
        data = (unit * (size // len(unit))).encode()
        begin = time.process_time()
        for name in ("a.txt", "prod.env"):
            file_secrets(name, data)
        return time.process_time() - begin

    # Four times the text: linear is 4 times as long, quadratic 16 times.
    assert seconds(160_000) < 8 * max(seconds(40_000), 0.02)
