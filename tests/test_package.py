from __future__ import annotations

import configparser
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import refrag_lightning

ROOT = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_imports_point_one_way():
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "setup.cfg"), no_cache=True) == 0


def test_importing_the_package_loads_no_heavy_library():
    heavy = ["torch", "transformers", "lightning", "tokenizers", "numpy", "huggingface_hub"]
    code = "import refrag_lightning, refrag_lightning.hub, sys; "
    code += f"sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 1


def test_public_names_are_imported_when_they_are_used():
    from refrag_lightning.model import RefragConfig, RefragModel
    from refrag_lightning.text.tokenizer import RefragTokenizer

    assert refrag_lightning.RefragConfig is RefragConfig
    assert refrag_lightning.RefragModel is RefragModel
    assert refrag_lightning.RefragTokenizer is RefragTokenizer
    assert set(dir(refrag_lightning)) == set(refrag_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'RefragModle'"):
        refrag_lightning.RefragModle  # noqa: B018


def requirements() -> list[Requirement]:
    config = setup_cfg()
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values():
        lines += extra.splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def constraints() -> dict[str, str]:
    """Package -> the one version that constraints.txt allows it on this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None and "+" not in specifier.version
        versions[pin.name.lower().replace("_", "-")] = specifier.version
    return versions


def test_every_requirement_is_pinned_within_its_range():
    pinned = constraints()
    for requirement in requirements():
        name = requirement.name.lower().replace("_", "-")
        if name != "refrag-lightning":
            assert requirement.specifier.contains(pinned[name]), requirement


def test_bad_releases_of_lightning_are_out_of_range():
    (lightning,) = [item for item in requirements() if item.name == "lightning"]
    assert not lightning.specifier.contains("2.6.2") and not lightning.specifier.contains("2.6.3")


def test_dev_takes_every_extra():
    extras = setup_cfg()["options.extras_require"]
    (dev,) = [Requirement(line) for line in extras["dev"].splitlines() if line]
    assert dev.extras == set(extras) - {"dev"}


def test_the_tests_and_the_run_install_what_they_need():
    # Run by `make test`, this make would take over the other one's options and variables.
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    inherited += ("VENV", "ARGS", "PYTHON", "JOBS")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}

    def commands(target: str) -> str:
        done = subprocess.run(
            ["make", "--always-make", "--dry-run", target, "ARGS=--some option", "JOBS=3"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for target, last in {
        "test": "HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 3 --dist loadfile --some option",
        "align": ".venv/bin/python -m refrag_lightning fit --config configs/align.yaml "
        "--some option",
    }.items():
        lines = commands(target).splitlines()
        assert lines[-1] == last
        for step in ("-m venv", "pip install", "scripts/fetch_models.py"):
            assert any(step in line for line in lines), step
