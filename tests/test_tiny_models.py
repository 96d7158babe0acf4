from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from refrag_lightning import tiny_models
from refrag_lightning.biographies import Biographies

DECODERS = ["tiny/decoder", "tiny/gemma", "tiny/llama3", "tiny/qwen3", "tiny/biography-decoder"]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


def test_the_files_are_the_same_in_every_process(tmp_path, tiny_cache):
    # Hash seeds differ between processes; the cached folders come from yet another process.
    code = (
        "import sys; from pathlib import Path; from refrag_lightning import tiny_models\n"
        "for name in tiny_models.NAMES:\n"
        "    folder = Path(sys.argv[1], name); folder.mkdir(parents=True)\n"
        "    tiny_models.build(name, folder)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name, folder in tiny_cache.items():
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in (tmp_path / name).iterdir())
        for file in names:
            assert (folder / file).read_bytes() == (tmp_path / name / file).read_bytes(), file


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    random_state = random.getstate()
    tiny_models.build("tiny/decoder", tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == random_state


def test_an_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="'tiny/other'; there are tiny/encoder, "):
        tiny_models.build("tiny/other", tmp_path)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_sizes_and_initialisation(name, tiny_cache):
    kind = AutoModelForCausalLM if name in DECODERS else AutoModel
    model = kind.from_pretrained(tiny_cache[name])
    tokenizer = AutoTokenizer.from_pretrained(tiny_cache[name])
    of_biographies = "biography" in name
    assert model.config.hidden_size == (128 if of_biographies else 64)
    assert model.config.num_hidden_layers == (4 if name == "tiny/biography-decoder" else 2)
    table_VD = model.get_input_embeddings().weight
    assert len(tokenizer) == len(table_VD) == model.config.vocab_size
    low, high = (1100, 1400) if of_biographies else (1900, 2300)
    assert low < len(tokenizer) < high
    assert table_VD.std().item() == pytest.approx(0.5, rel=0.02)
    matrices = [
        parameter
        for key, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in key
    ]
    assert len(matrices) >= 12
    for matrix in matrices:
        assert matrix.std().item() == pytest.approx(0.05, rel=0.1)


def test_architectures(tiny_cache):
    kinds = {name: AutoConfig.from_pretrained(folder) for name, folder in tiny_cache.items()}
    assert {name: config.model_type for name, config in kinds.items()} == {
        "tiny/encoder": "bert",
        "tiny/encoder-cased": "roberta",
        "tiny/decoder": "llama",
        "tiny/gemma": "gemma3_text",
        "tiny/llama3": "llama",
        "tiny/qwen3": "qwen3",
        "tiny/biography-encoder": "bert",
        "tiny/biography-decoder": "llama",
    }
    assert all(kinds[name].tie_word_embeddings for name in DECODERS)


def test_gemma_scales_inside_the_embedding_module(tiny_cache):
    embedding = AutoModelForCausalLM.from_pretrained(
        tiny_cache["tiny/gemma"]
    ).get_input_embeddings()
    ids = torch.tensor([5, 300])
    assert torch.allclose(embedding(ids), embedding.weight[ids] * 8)  # sqrt(64)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate(name, tiny_cache):
    model = AutoModelForCausalLM.from_pretrained(tiny_cache[name])
    tokenizer = AutoTokenizer.from_pretrained(tiny_cache[name])
    batch = tokenizer("The with statement", return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape[1] == batch["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", ["tiny/encoder-cased", "tiny/decoder", "tiny/llama3"])
def test_byte_level_tokenizers_give_every_text_back(name, tiny_cache):
    tokenizer = AutoTokenizer.from_pretrained(tiny_cache[name])

    @given(st.text())
    def gives_back(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text

    gives_back()


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_gemmas_tokenizer_gives_back_all_but_its_space_mark(text, tiny_cache):
    tokenizer = AutoTokenizer.from_pretrained(tiny_cache["tiny/gemma"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_biographies_are_whole_words_to_their_tokenizers(tiny_cache):
    world, rng = Biographies(seed=0), random.Random(0)
    for name in ("tiny/biography-encoder", "tiny/biography-decoder"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_cache[name])
        for number in range(20):
            people = world.group(number, 2)
            texts = [world.text(person, rng) for person in people]
            texts += [question.text for question in world.questions(people, rng)]
            for text in texts:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                tokens = tokenizer.convert_ids_to_tokens(ids)
                words = re.findall(r"\w+|[^\w\s]", text)
                assert tokens == [w.lower() if "encoder" in name else w for w in words]
        assert tokenizer.decode(ids) == text or "encoder" in name


def test_the_uncased_encoder_normalises(tiny_cache):
    tokenizer = AutoTokenizer.from_pretrained(tiny_cache["tiny/encoder"])
    ids = tokenizer("The Größe 漢")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "[CLS]" and tokens[1] == "the" and tokens[-2:] == ["[UNK]", "[SEP]"]
    assert ids == tokenizer("the Grosse 漢".replace("ss", "ß"))["input_ids"]


def test_control_tokens_are_single_and_put_first_where_the_family_does(tiny_cache):
    control = {
        "tiny/decoder": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "tiny/gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
        "tiny/llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"],
    }
    first = {"tiny/decoder": None, "tiny/gemma": "<bos>", "tiny/llama3": "<|begin_of_text|>"}
    for name, tokens in control.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_cache[name])
        ids = tokenizer("".join(tokens), add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        assert all(tokenizer.added_tokens_decoder[token_id].special for token_id in ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""
        start = tokenizer.convert_ids_to_tokens(tokenizer("with")["input_ids"])[0]
        assert start == (first[name] or start) and (start in tokens) == (first[name] is not None)


def test_chat_templates(tiny_cache):
    def render(name: str, conversation: list[dict[str, str]]) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_cache[name])
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )

    assert render("tiny/decoder", CONVERSATION) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render("tiny/decoder", CONVERSATION[1:2]).startswith(
        "<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n<|im_start|>user\n"
    )
    assert render("tiny/gemma", CONVERSATION) == (
        "<bos><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n"
        "<start_of_turn>model\nTwo.<end_of_turn>\n<start_of_turn>user\nThree?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="must take turns"):
        render("tiny/gemma", CONVERSATION[2:])
    assert render("tiny/llama3", CONVERSATION[:2]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_fingerprint_is_cheap_and_of_the_recipe():
    code = "import sys; from refrag_lightning import tiny_models; print(tiny_models.fingerprint());"
    code += "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == tiny_models.fingerprint(), done.stderr
    assert Path(tiny_models.__file__).exists() and len(tiny_models.fingerprint()) == 12
