import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from refrag_lightning.model.plain import PlainModel
from refrag_lightning.model.refrag import RefragModel
from refrag_lightning.retrieval import dense
from refrag_lightning.retrieval.dense import (
    EncoderEmbedder,
    SentenceTransformersEmbedder,
    embed_missing,
    embedder,
)
from refrag_lightning.text.tokenizer import RefragTokenizer
from tests.retrieval.stores import TableEmbedder, put, store_of

TEXTS = [
    "The Seine flows through Paris.",
    "a",
    "",
    "Sentences of a text are one after another, and this one is longer than the others are.",
]


@pytest.fixture(scope="module")
def pair():
    names = "tiny/encoder", "tiny/decoder"
    model = RefragModel.from_encoder_decoder(*names, compression=4)
    return model, RefragTokenizer.from_encoder_decoder(*names, compression=4)


def mean_pooled(name, texts):
    """What sentence-transformers does with a model that pools by the mean, written out."""
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    means = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=1).numpy()


def test_the_encoders_vectors_are_means_at_unit_length(pair, tiny_cache):
    vectors = embedder(None, *pair)(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, mean_pooled(tiny_cache["tiny/encoder"], TEXTS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    # The texts are told apart: equality above does not come of vectors that are all the same.
    assert (vectors @ vectors.T)[~np.eye(4, dtype=bool)].max() < 0.99


def test_a_text_alone_and_in_a_batch(pair, monkeypatch):
    embed = embedder(None, *pair)
    together = embed(TEXTS)
    np.testing.assert_allclose(
        np.concatenate([embed([text]) for text in TEXTS]), together, atol=1e-6
    )
    monkeypatch.setattr(dense, "_BATCH_TOKENS", 8)
    np.testing.assert_allclose(embed(TEXTS), together, atol=1e-6)
    assert embed([]).shape == (0, 64)


def test_long_texts_are_read_in_windows(pair, tiny_cache):
    model, tokenizer = pair
    text = "one two three four five six seven eight nine ten eleven twelve " * 2
    embed = EncoderEmbedder(
        model.encoder, tokenizer.encoder, name="short", identity="x", max_length=12
    )
    ids = tokenizer.encoder(text, add_special_tokens=False)["input_ids"]
    count = -(-len(ids) // 10)
    assert count > 2
    windows = [[2, *part.tolist(), 3] for part in np.array_split(ids, count)]
    opening, closing = tokenizer.encoder.cls_token_id, tokenizer.encoder.sep_token_id
    windows = [[opening, *window[1:-1], closing] for window in windows]
    with torch.no_grad():
        states = [
            model.encoder(input_ids=torch.tensor([window])).last_hidden_state[0]
            for window in windows
        ]
    mean = torch.cat(states).mean(0).numpy()
    np.testing.assert_allclose(embed([text])[0], mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(ValueError, match=r"max_length \(2\) leaves no token"):
        EncoderEmbedder(model.encoder, tokenizer.encoder, name="x", identity="x", max_length=2)


def test_values_that_are_no_numbers_are_refused(pair):
    model, tokenizer = pair

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = model.encoder.config
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask=None):
            states = torch.full((*input_ids.shape, 64), torch.nan)
            return SimpleNamespace(last_hidden_state=states)

    embed = EncoderEmbedder(Broken(), tokenizer.encoder, name="broken", identity="x", max_length=64)
    with pytest.raises(ValueError, match="the encoder of broken gives values that are no numbers"):
        embed(["a"])


def test_prompts_go_before_queries_and_documents(pair):
    model, tokenizer = pair

    def make(**options):
        return EncoderEmbedder(
            model.encoder, tokenizer.encoder, name="e", identity="x", max_length=64, **options
        )

    bare = make()
    prompted = make(prompts={"query": "query: ", "document": "passage: "})
    np.testing.assert_array_equal(bare(["a b"], query=True), bare(["a b"]))
    np.testing.assert_array_equal(prompted(["a b"], query=True), bare(["query: a b"]))
    np.testing.assert_array_equal(prompted(["a b"]), bare(["passage: a b"]))
    assert prompted.key() != bare.key()


def test_the_key_is_of_what_vectors_depend_on(pair):
    model, tokenizer = pair
    key = embedder(None, model, tokenizer).key()
    assert len(key) == 16
    names = "tiny/encoder", "tiny/decoder"
    again = RefragModel.from_encoder_decoder(*names, compression=8)
    others = RefragTokenizer.from_encoder_decoder(*names, compression=8)
    # Another compression has the same vectors.
    assert embedder(None, again, others).key() == key
    shorter = RefragTokenizer.from_encoder_decoder(*names, compression=8, max_encoder_length=32)
    assert embedder(None, again, shorter).key() != key
    with torch.no_grad():
        again.encoder.get_input_embeddings().weight[5] += 1
    assert embedder(None, again, others).key() != key


def test_without_an_encoder():
    plain = PlainModel.from_pretrained("tiny/decoder")
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    with pytest.raises(ValueError, match="dense search needs a model with an encoder"):
        embedder(None, plain, tokenizer)
    with pytest.raises(ValueError, match="dense search needs a model with an encoder"):
        embedder(None)


# ---- named models ----------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_cache, tmp_path, monkeypatch):
    """A copy of a tiny encoder, and no sentence-transformers."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    place = tmp_path / "embedder"
    shutil.copytree(tiny_cache["tiny/encoder"], place)
    return place


def write_modules(folder, pooling=None, kinds=("Transformer", "Pooling", "Normalize")):
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{number}_{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "mean"},
        None,
    ],
)
def test_a_named_model_that_pools_by_the_mean(pooling, folder):
    write_modules(folder, pooling)
    named = embedder(str(folder))
    assert named.name == str(folder)
    np.testing.assert_allclose(named(TEXTS), mean_pooled(folder, TEXTS), atol=1e-6)


def test_a_named_model_without_a_list_of_modules(folder):
    np.testing.assert_allclose(
        embedder("tiny/encoder")(TEXTS), mean_pooled(folder, TEXTS), atol=1e-6
    )


def test_a_named_models_own_settings(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "q: ", "passage": "p: ", "document": ""}}'
    )
    named = embedder(str(folder))
    assert named._max_tokens == 4
    assert named.prompts == {"query": "q: ", "document": "p: "}
    assert named.key() != embedder("tiny/encoder").key()


@pytest.mark.parametrize(
    ("pooling", "kinds", "message"),
    [
        ({"pooling_mode_cls_token": True}, ["Transformer", "Pooling"], "does not pool by the mean"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            ["Transformer", "Pooling"],
            "does not pool by the mean",
        ),
        ({"pooling_mode": "lasttoken"}, ["Transformer", "Pooling"], "does not pool by the mean"),
        (None, ["Transformer", "Pooling", "Dense"], "has a module 'Dense'"),
    ],
)
def test_named_models_that_need_sentence_transformers(pooling, kinds, message, folder):
    write_modules(folder, pooling, kinds)
    with pytest.raises(ValueError, match=rf"{message}.*pip install 'refrag-lightning\[dense\]'"):
        embedder(str(folder))


def test_sentence_transformers_where_it_is_installed(tiny_cache, monkeypatch):
    calls = []

    class SentenceTransformer:
        max_seq_length = 256

        def __init__(self, *args, **options):
            calls.append((args, options))

        def named_parameters(self):
            return [("weight", torch.ones(2))]

        def _encode(self, side, texts, options):
            calls.append((side, texts, options))
            return np.ones((len(texts), 2))

        def encode_query(self, texts, **options):
            return self._encode("query", texts, options)

        def encode_document(self, texts, **options):
            return self._encode("document", texts, options)

        def encode(self, texts, **options):
            return self._encode("both", texts, options)

    fake = ModuleType("sentence_transformers")
    fake.SentenceTransformer = SentenceTransformer
    fake.__version__ = "5.6.0"
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    with pytest.raises(ImportError, match=r"5\.6\.0 runs Python code"):
        embedder("tiny/encoder")
    fake.__version__ = "6.0.0"
    named = embedder("tiny/encoder", device="cpu")
    assert isinstance(named, SentenceTransformersEmbedder)
    (place,), options = calls.pop()
    assert place == str(tiny_cache["tiny/encoder"])
    assert options == {
        "revision": None,
        "device": "cpu",
        "trust_remote_code": False,
        "model_kwargs": {"use_safetensors": True, "weights_only": True},
    }
    assert named(("a", "b"), query=True).dtype == np.float32
    side, texts, options = calls.pop()
    assert (side, texts) == ("query", ["a", "b"])
    assert options["normalize_embeddings"] is True
    named(["a"])
    assert calls.pop()[0] == "document"
    del SentenceTransformer.encode_query, SentenceTransformer.encode_document
    named(["a"], query=True)
    assert calls.pop()[0] == "both"
    assert len(named.key()) == 16


def test_sentence_transformers_where_it_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'refrag-lightning\[dense\]'"):
        SentenceTransformersEmbedder("tiny/encoder")


# ---- the store -------------------------------------------------------------------------------


def test_missing_vectors_are_written_batch_by_batch(tmp_path):
    texts = {name: "word " * length for length, name in enumerate("gfedcba", start=1)}
    store = store_of(tmp_path / "index", texts)
    embed = TableEmbedder({text: (len(text), 1) for text in texts.values()})
    sizes = []

    def stop_after_two(size):
        sizes.append(size)
        if len(sizes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_missing(store, embed, batch_size=2, on_batch=stop_after_two)
    assert len(store.vectors("table")[0]) == 4
    assert embed_missing(store, embed, batch_size=2, on_batch=sizes.append) == 3
    assert sizes == [2, 2, 2, 1]
    assert embed_missing(store, embed) == 0
    put(store, {"h": ("A title", "word ")})
    embed.table["A title\nword "] = (0, 1)
    assert embed_missing(store, embed) == 1
    keys, vectors = store.vectors("table")
    assert len(keys) == len(set(keys)) == len(vectors) == 8
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


@pytest.mark.real_models
def test_minilm_gives_the_similarities_of_its_documentation(real_pair, monkeypatch):
    # From sentence-transformers' quick start, for all-MiniLM-L6-v2.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    sentences = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    vectors = embedder(real_pair[0])(sentences)
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)
