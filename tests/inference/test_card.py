"""The model card: what is there, nothing else, and what is not known."""

import json
import re

import pytest
import torch
import yaml

from refrag_lightning.inference.card import CardFacts, is_on_hub, model_card
from refrag_lightning.inference.export import ExportOptions, export_folder
from refrag_lightning.inference.history import read_history
from refrag_lightning.inference.mark import CARD
from refrag_lightning.model import PlainModel
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.inference.exporting import METRICS, write_model, write_report, write_run

MINILM, SMOLLM = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that began from another one, with a report on it beside."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    write_run(runs / "align" / "1", module="AlignmentModule", metrics=METRICS)
    run = write_run(runs / "sft" / "2", init_from=runs / "align" / "1", metrics=METRICS)
    write_report(runs / "eval-answers" / "3", run)
    return write_model(run)


@pytest.fixture
def folder(run, tmp_path):
    """The exported folder."""
    export_folder(str(run), tmp_path / "mine")
    return tmp_path / "mine"


def header(card):
    opening, text, rest = card.split("---\n", 2)
    assert opening == "" and rest.startswith("\n# ")
    return yaml.safe_load(text)


def section(card, name):
    return re.split(r"^## ", card.split(f"\n## {name}\n")[1], flags=re.MULTILINE)[0]


def with_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_header_has_what_is_known(folder):
    # The tiny models are on no Hub.
    assert header((folder / CARD).read_text()) == {
        "library_name": "refrag_lightning",
        "pipeline_tag": "text-generation",
        "tags": ["refrag", "retrieval-augmented-generation"],
    }
    with_config(folder, encoder_name=MINILM, decoder_name=SMOLLM)
    fields = header(model_card(CardFacts(folder, "me/mine", license="apache-2.0")))
    assert fields["base_model"] == [SMOLLM, MINILM]
    assert fields["license"] == "apache-2.0"


def test_what_the_model_is(folder):
    table = section((folder / CARD).read_text(), "What it is")
    for row in (
        "| encoder | `tiny/encoder`, bert, `sha256:",
        "| decoder | `tiny/decoder`, llama, `sha256:",
        "| tokens a row | 4 or 8; 4 by default |",
        "| vectors a row | 1 |",
        "| rows are cut by | the encoder's tokens |",
        "| pooling | concat |",
        "| the encoder reads | a document at a time |",
        "| differs from the bases | projector, encoder |",
        "| LoRA on the decoder | rank 2, alpha 6 |",
        "| needs the base models | yes |",
    ):
        assert row in table, row
    assert "The base encoder is no model of the Hub" in table
    assert "each row of 4 or 8 tokens reaches the decoder as one vector" in (
        (folder / CARD).read_text()
    )


def test_a_full_folder_needs_nothing_else(run, tmp_path):
    export_folder(str(run), tmp_path / "full", options=ExportOptions(full=True, merge_lora=True))
    card = (tmp_path / "full" / CARD).read_text()
    assert "| needs the base models | no |" in card
    assert "| LoRA on the decoder | none |" in card
    assert "The folder holds every weight" in section(card, "Use")
    assert "no model of the Hub" not in card
    model_parameters = sum(
        tensor.numel() for tensor in PlainModel.from_pretrained("tiny/decoder").parameters()
    )
    count = int(re.search(r"in this folder \| ([\d,]+) parameters", card)[1].replace(",", ""))
    assert count > model_parameters


@pytest.mark.parametrize("chat", [True, False])
def test_the_code_in_the_card_runs(run, tmp_path, chat, capsys, monkeypatch):
    export_folder(str(run), tmp_path / "mine")
    if not chat:
        tokenizer = RefragTokenizer.from_pretrained(tmp_path / "mine")
        tokenizer.decoder.chat_template = None
        (tmp_path / "mine" / "decoder_tokenizer" / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(tmp_path / "mine")
    card = model_card(CardFacts(tmp_path / "mine", "mine"))
    assert ("apply_chat" in card) is chat
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    assert 'load("FOLDER")' in code
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code.replace("FOLDER", "mine").replace("max_new_tokens=64", "max_new_tokens=3"), {})
    assert len(capsys.readouterr().out) > 0


def test_the_code_of_a_pushed_model_names_it(folder):
    card = model_card(CardFacts(folder, "me/mine"))
    assert 'load("me/mine")' in card and card.split("---\n")[2].startswith("\n# me/mine\n")


def test_the_training_is_that_of_the_runs(folder):
    training = section((folder / CARD).read_text(), "Training")
    rows = [line for line in training.splitlines() if line.startswith("| ")][2:]
    data = "SFTDataModule (QuestionConversations (HubQuestions (rajpurkar/squad)))"
    assert rows == [
        f"| align | AlignmentModule | {data} | tiny/encoder, tiny/decoder | 20 | 1,600 |",
        f"| sft | SFTModule | {data} | align/1 | 20 | 1,600 |",
    ]
    assert '- sft: lr `{"projector": 0.0001}`, batch_size `4`, precision `32-true`' in training


def test_the_results_are_those_of_the_report(folder):
    results = section((folder / CARD).read_text(), "Results")
    assert "| val/loss | 1.2500 |" in results
    assert "| rows@4 | 1.500 [1.250, 1.750] | 0.500 |" in results
    assert "| none | 3.000 | - |" in results
    assert "Greedy answers." in results
    assert "questions `200`, split `test`" in results


def test_what_is_not_known_is_said(tmp_path):
    write_model(tmp_path / "run")
    export_folder(str(tmp_path / "run"), tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert section(card, "Training").strip().startswith("Not known: no run folder lay beside")
    assert section(card, "Results").strip() == (
        "No report of an evaluation on this model was found."
    )
    assert section(card, "Licence").strip() == "Not stated."
    with_config(tmp_path / "out", decoder_name=SMOLLM, encoder_name=MINILM)
    card = model_card(CardFacts(tmp_path / "out", "out"))
    assert section(card, "Licence").strip() == (
        f"Not stated. The licences of `{SMOLLM}` and `{MINILM}` apply to what was taken from there."
    )


def test_a_run_that_is_gone_and_steps_that_are_unknown(folder, tmp_path):
    run = write_run(tmp_path / "runs" / "sft" / "2", init_from="runs/align/1")
    card = model_card(CardFacts(folder, "mine", read_history(run)))
    training = section(card, "Training")
    assert "| align/1 | unknown | unknown |" in training
    assert "What led to `align/1` is not known" in training


def test_a_local_base_is_named_without_its_folder(folder, tmp_path):
    (tmp_path / "home" / "base").mkdir(parents=True)
    with_config(folder, decoder_name=str(tmp_path / "home" / "base"))
    card = model_card(CardFacts(folder, "mine"))
    assert "| decoder | a local folder, `base`, llama" in card
    assert str(tmp_path) not in card


def test_a_base_that_is_an_offline_copy_is_said_to_be_one(run, tmp_path):
    export_folder(str(run), tmp_path / "first")
    with_config(tmp_path / "first", decoder_name=SMOLLM)
    notes = export_folder(str(tmp_path / "first"), tmp_path / "second")
    assert "encoder is no model of the Hub" in notes[0]
    assert f"decoder was the offline copy of {SMOLLM}" in notes[1]
    assert header((tmp_path / "second" / CARD).read_text())["base_model"] == [SMOLLM]


def test_a_plain_model(tmp_path):
    run = write_run(tmp_path / "runs" / "sft" / "1", encoder=None, metrics=METRICS)
    PlainModel.from_pretrained("tiny/decoder").save_pretrained(run / "model")
    RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1).save_pretrained(
        run / "model"
    )
    export_folder(str(run), tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert header(card)["library_name"] == "transformers"
    assert "| architecture | LlamaForCausalLM |" in card
    assert "| tiny/decoder | 20 | 1,600 |" in section(card, "Training")
    assert "tiny/encoder" not in card
    facts = CardFacts(tmp_path / "out", "me/mine", base=SMOLLM)
    assert header(model_card(facts))["base_model"] == [SMOLLM]
    assert f"| began as | `{SMOLLM}` |" in model_card(facts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SMOLLM, True),
        ("tiny/decoder", False),
        ("/home/me/base", False),
        ("./base/model", False),
        ("~/base", False),
        ("a/b/c", False),
        ("gpt2", False),
    ],
)
def test_names_of_the_hub(name, expected):
    assert is_on_hub(name) is expected


def test_a_revision_says_where_a_base_came_from():
    commit, digest = "0123456789abcdef" * 2 + "01234567", "sha256:" + "0" * 64
    assert is_on_hub("roberta-base", commit)
    assert not is_on_hub("owner/name", digest)
    # The offline copy of a default model.
    assert is_on_hub(SMOLLM, digest)
    assert not is_on_hub(None)


def test_a_folder_of_the_form_of_a_name_is_none(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_on_hub("runs/base")
