"""Python code that lies in a model's folder never runs, and nobody is asked whether it may."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from refrag_lightning import RefragModel, RefragTokenizer, hub
from refrag_lightning.inference.export import ExportOptions, export_folder
from refrag_lightning.model import PlainModel
from refrag_lightning.model.load import is_refrag, load
from refrag_lightning.retrieval.dense import embedder

ROOT = Path(__file__).parents[1]
AUTO = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoFeatureExtractor",
)


@pytest.fixture
def answers(monkeypatch):
    """Standard input that says yes to everything; nothing of it may be read."""
    text = "yes\n" * 50
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    yield
    assert sys.stdin.read() == text


@pytest.fixture
def spoil(tmp_path):
    """Puts code into folders, and names it in all their JSON files; it leaves a mark if it runs."""
    mark = tmp_path / "the code ran"

    def spoil(folder, *, known=True):
        code = f"open({str(mark)!r}, 'w')\n"
        classes = dict.fromkeys(AUTO, "evil.Evil")
        for name in ("config", "tokenizer_config", "processor_config", "preprocessor_config"):
            path = folder / f"{name}.json"
            values = json.loads(path.read_text()) if path.is_file() else {}
            values["auto_map"] = {**classes, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
            if not known:
                values |= {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
            for part in ("encoder_config", "decoder_config"):
                if part in values:
                    values[part]["auto_map"] = classes
            path.write_text(json.dumps(values))
            (folder / "evil.py").write_text(code + "class Evil: pass\n")
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(code)
        return folder

    yield spoil
    assert not mark.exists()


@pytest.fixture
def models(tiny_cache, tmp_path):
    """Folders of an encoder, of a decoder, and of a whole REFRAG model of both."""
    pair = {"encoder": "tiny/encoder", "decoder": "tiny/decoder"}
    for part, name in pair.items():
        shutil.copytree(tiny_cache[name], tmp_path / part)
    RefragModel.from_encoder_decoder(**pair, compression=4).save_pretrained(
        tmp_path / "whole", full=True
    )
    RefragTokenizer.from_encoder_decoder(**pair, compression=4).save_pretrained(tmp_path / "whole")
    return tmp_path


LOADERS = {
    "the kind of a model": ("decoder", is_refrag),
    "a decoder and its tokenizer": ("decoder", load),
    "a decoder": ("decoder", PlainModel.from_pretrained),
    "a pair, its decoder": (
        "decoder",
        lambda folder: RefragModel.from_encoder_decoder("tiny/encoder", folder, compression=4),
    ),
    "a pair, its encoder": (
        "encoder",
        lambda folder: RefragModel.from_encoder_decoder(folder, "tiny/decoder", compression=4),
    ),
    "a model folder": ("whole", load),
    "an embedder": ("encoder", embedder),
    "an export": (
        "decoder",
        lambda folder: export_folder(
            folder, Path(folder).parent / "out", options=ExportOptions(dtype="bfloat16")
        ),
    ),
}


# sentence-transformers reads the processor's files too, and of BERT there is none but the folder's.
@pytest.mark.parametrize("what", [each for each in LOADERS if each != "an embedder"])
def test_a_class_of_the_library_is_taken(models, spoil, answers, what):
    part, loader = LOADERS[what]
    loader(str(spoil(models / part)))


@pytest.mark.parametrize("what", [each for each in LOADERS if each != "a model folder"])
def test_a_model_that_needs_its_code_is_refused_in_one_line(models, spoil, answers, what):
    part, loader = LOADERS[what]
    with pytest.raises(ValueError, match="code from model folders is never run here") as error:
        loader(str(spoil(models / part, known=False)))
    assert str(models / part) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_tokenizers_of_a_model_folder(models, spoil, answers, part):
    spoil(models / "whole" / f"{part}_tokenizer", known=False)
    with pytest.raises(ValueError, match="code from model folders is never run here"):
        RefragTokenizer.from_pretrained(models / "whole")


def test_a_configuration_inside_a_configuration(models, spoil, answers):
    """transformers has no causal language model of this kind, so it would take the folder's."""
    path = spoil(models / "whole") / "config.json"
    config = json.loads(path.read_text())
    config["decoder_config"] = {**config["encoder_config"], "model_type": "vit"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="code from model folders is never run here"):
        load(models / "whole")


def test_modules_and_pickles_of_an_embedder(models, answers, tmp_path):
    pytest.importorskip("sentence_transformers")
    mark = tmp_path / "the code ran"
    folder = models / "encoder"
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="code from model folders is never run here"):
        embedder(str(folder))

    class Evil:
        def __reduce__(self):
            return open, (str(mark), "w")

    modules[0]["type"] = "sentence_transformers.models.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    torch.save(Evil(), folder / "pytorch_model.bin")
    options = {"use_safetensors": False, "weights_only": False, "trust_remote_code": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps({"model_args": options}))
    embedder(str(folder))
    assert not mark.exists()


def test_nothing_else_in_the_package_loads_models():
    """Every `from_pretrained` is hub's, one of our own classes, or says that code may not run."""
    ours = {"cls", "RefragModel", "RefragTokenizer", "RefragConfig", "RefragPipeline", "PlainModel"}
    # JSON that names no class.
    ours |= {"GenerationConfig"}
    found = 0
    for path in [*(ROOT / "refrag_lightning").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(node.func, "value", None)
            options = {each.arg: each.value for each in node.keywords}
            place = f"{path.name}:{node.lineno}"
            if name in ("from_pretrained", "from_config", "SentenceTransformer", "CrossEncoder"):
                if isinstance(owner, ast.Name) and owner.id in ours:
                    continue
                trusts = options.get("trust_remote_code")
                assert isinstance(trusts, ast.Constant) and trusts.value is False, place
                found += 1
            elif name in ("AutoPeftModel", "pipeline", "load_adapter", "load_custom_generate"):
                assert name == "load_adapter" and isinstance(node.func, ast.Name), place
            elif name in ("load", "loads") and isinstance(owner, ast.Name):
                # Pickles are code.
                assert owner.id not in ("pickle", "joblib"), place
                assert owner.id != "torch" or "weights_only" in options, place
                assert owner.id != "np" or "allow_pickle" not in options, place
    assert found >= 4
    assert {"build", "load"} <= set(hub.__all__)
