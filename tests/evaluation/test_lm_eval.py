"""The adapter for lm-evaluation-harness: a local task, and likelihoods against transformers."""

import copy
import json
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from refrag_lightning.evaluation.lm_eval import RefragLM
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.text.segments import Segment
from tests.text.spaces import KINDS, spaced


def _request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _plain(context, continuation):
    """What transformers gives: the continuation's log-likelihood, and whether it is greedy."""
    plain = PlainModel.from_pretrained("tiny/decoder")
    from transformers import AutoTokenizer

    from refrag_lightning import hub

    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("tiny/decoder", weights=False).path)
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    before = before or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    with torch.no_grad():
        logits = plain.decoder(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    total = -F.cross_entropy(logits, torch.tensor(after), reduction="sum").item()
    return total, logits.argmax(-1).tolist() == after


@pytest.mark.parametrize("name", ["model", "tiny/decoder"])
def test_likelihoods_are_those_of_transformers(name, folder, caplog):
    with caplog.at_level(logging.WARNING, logger="refrag_lightning"):
        lm = RefragLM(str(folder) if name == "model" else name, device="cpu", batch_size=2)
    assert "nothing is compressed" in caplog.text
    pairs = [("The river flows", " through Paris"), ("", "Rivers"), ("Rivers: ", "the Loire is")]
    got = lm.loglikelihood([_request("loglikelihood", *pair) for pair in pairs])
    # White space at a context's end counts to the continuation.
    expected = [_plain(*pair) for pair in (*pairs[:2], ("Rivers:", " the Loire is"))]
    for (total, greedy), (wanted, is_greedy) in zip(got, expected, strict=True):
        assert total == pytest.approx(wanted, rel=1e-4) and greedy == is_greedy


def test_the_greedy_continuation_is_known():
    lm = RefragLM("tiny/decoder", device="cpu")
    decoder = lm.reader.tokenizer.plain_decoder
    known = 0
    for context in ("The river flows", "Rivers", "It is said that", "Paris and", "In the north"):
        ids = torch.from_numpy(decoder([context])[0].ids)[None]
        with torch.no_grad():
            best = lm.reader.model.decoder(ids).logits[0, -1].argmax()
        written = lm.reader.tokenizer.decode(best[None])
        # Only what is read as the token that was written.
        if decoder([written])[0].ids.tolist() == [int(best)]:
            known += 1
            pairs = [(context, written), (context, written + "x")]
            got = lm.loglikelihood([_request("loglikelihood", *pair) for pair in pairs])
            assert [greedy for _, greedy in got] == [True, _plain(*pairs[1])[1]]
    assert known


def test_generation_stops_before_a_stop_string():
    lm = RefragLM("tiny/decoder", device="cpu")
    options = {"until": [], "max_gen_toks": 8}
    (written,) = lm.generate_until([_request("generate_until", "The river flows", options)])
    assert len(written) > 1
    stop = written[1]
    (cut,) = lm.generate_until(
        [_request("generate_until", "The river flows", {**options, "until": [stop]})]
    )
    assert cut == written[: written.index(stop)]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_options_of_generation_under_every_name(name):
    lm = RefragLM("tiny/decoder", device="cpu")
    context = "The river flows"
    greedy, other, same = lm.generate_until(
        [
            _request("generate_until", context, {name: 3}),
            _request("generate_until", context, {name: 6, "do_sample": False, "top_p": 0.5}),
            _request("generate_until", context, {name: 3, "temperature": 0.0, "until": [""]}),
        ]
    )
    ids = lm.reader.tokenizer.plain_decoder([context])[0].ids
    tokens = lm.reader.model.decoder.generate(
        torch.from_numpy(ids)[None], max_new_tokens=6, do_sample=False
    )[0, len(ids) :]
    assert greedy == same == lm.reader.tokenizer.decode(tokens[:3])
    assert other == lm.reader.tokenizer.decode(tokens)
    torch.manual_seed(0)
    hot = {name: 6, "temperature": 50.0}
    written = lm.generate_until([_request("generate_until", context, hot) for _ in range(4)])
    assert len({*written}) > 1


def test_an_answer_ends_with_its_turn_though_the_base_model_would_go_on(monkeypatch):
    lm = RefragLM("tiny/decoder", device="cpu")
    end = lm.reader.tokenizer.decoder.convert_tokens_to_ids("<|im_end|>")
    monkeypatch.setattr(lm.reader.model.decoder.generation_config, "eos_token_id", None)
    asked = []
    generate = lm.reader.model.generate

    def generating(**options):
        asked.append(options["generation_config"].eos_token_id)
        return generate(**options)

    monkeypatch.setattr(lm.reader.model, "generate", generating)
    lm.generate_until([_request("generate_until", "The river", {"max_gen_toks": 2})])
    assert asked == [[end]]


def test_of_a_long_context_the_end_is_read(caplog):
    text = "The Seine flows through Paris and on to the sea, far from here."
    whole = RefragLM("tiny/decoder", device="cpu")
    short = RefragLM("tiny/decoder", device="cpu", max_length=16)
    decoder = short.reader.tokenizer.plain_decoder
    tokens, after = decoder([text, " It is"])
    kept = text[tokens.starts[len(after.ids) - 16] :]
    assert len(tokens.ids) > 16
    with caplog.at_level(logging.WARNING, logger="refrag_lightning"):
        got = short.loglikelihood([_request("loglikelihood", text, " It is")])
    assert "max_length (16)" in caplog.text
    expected = whole.loglikelihood([_request("loglikelihood", kept, " It is")])
    assert got[0][0] == pytest.approx(expected[0][0], rel=1e-5)
    options = {"max_gen_toks": 12}
    (written,) = short.generate_until([_request("generate_until", text, options)])
    (wanted,) = whole.generate_until(
        [_request("generate_until", text[tokens.starts[-4] :], options)]
    )
    assert written == wanted
    with pytest.raises(ValueError, match=r"max_gen_toks \(256\) leaves nothing of max_length"):
        short.generate_until([_request("generate_until", text, {})])


def test_documents_of_a_long_context_stay_or_go_as_a_whole(folder):
    lm = RefragLM(str(folder), documents="tags", device="cpu", rate=8)
    first, second = "The Seine flows through Paris. " * 4, "The Loire is long."
    context = f"Read: <doc>{first}</doc><doc>{second}</doc>Where?"
    text = lm._segments(context)
    batch = lm.reader.tokenizer.at(8).build([text])
    positions = int(batch["attention_mask"].sum())
    assert lm._fitted(text, positions) == text
    # Without room for its rows, the first document goes with all that stands before it.
    (place, _) = [n for n, segment in enumerate(text) if segment.document]
    after = text[place + 1 :]
    behind = int(lm.reader.tokenizer.at(8).build([after])["attention_mask"].sum())
    (packed,) = lm.reader.tokenizer.at(8).pack([first])
    for room, kept in ((packed.num_rows - 1, after), (packed.num_rows, text[place:])):
        assert [s.text for s in lm._fitted(text, behind + room)] == [s.text for s in kept]


def test_rolling_likelihood_of_a_long_text_counts_every_token_once():
    text = "The Seine flows through Paris and on to the sea."
    whole = RefragLM("tiny/decoder", device="cpu")
    (total,) = whole.loglikelihood_rolling([_request("loglikelihood_rolling", text)])
    assert total == pytest.approx(_plain("", text)[0], rel=1e-4)
    short = RefragLM("tiny/decoder", device="cpu", max_length=8)
    pieces = list(short._stretches(text))
    assert "".join(s.text for piece in pieces for s in piece if s.train) == text
    assert len(pieces) == 3
    # One token before the second stretch; the last one has all that there is room for.
    sizes = [
        [len(short.reader.tokenizer.plain_decoder([s.text])[0].ids) for s in piece]
        for piece in pieces[1:]
    ]
    assert sizes[0] == [1, 7] and sum(sizes[1]) == 8 and sizes[1][0] > 1
    (parts,) = short.loglikelihood_rolling([_request("loglikelihood_rolling", text)])
    # Random weights: less context changes the figure, but not by much a token.
    assert parts == pytest.approx(total, rel=0.2) and parts != total


@pytest.mark.parametrize(
    ("documents", "context"),
    [
        ("tags", 'Read: <doc title="T">The Seine flows through Paris.</doc>Where?'),
        (
            r"Passage: (?P<title>\w+) \((?P<doc>.*?)\)",
            "Read: Passage: T (The Seine flows through Paris.)Where?",
        ),
    ],
)
def test_documents_of_a_context_are_read_as_rows(folder, documents, context):
    lm = RefragLM(str(folder), documents=documents, device="cpu", rate=8)
    text = lm._segments(context)
    assert [s.text for s in text if s.document] == ["The Seine flows through Paris."]
    assert "".join(s.text for s in text if s.kind == "header") == "[1] T\n"
    batch = lm.reader.tokenizer.at(8).build([text])
    (packed,) = lm.reader.tokenizer.at(8).pack(["The Seine flows through Paris."])
    assert int((batch["slot_ids"] >= 0).sum()) == packed.num_rows > 0
    rows = lm.loglikelihood([_request("loglikelihood", context, " Paris")])
    full = RefragLM(str(folder), documents=documents, read="full", device="cpu")
    assert rows != full.loglikelihood([_request("loglikelihood", context, " Paris")])


def test_no_document_where_one_was_expected_is_said(folder, caplog):
    lm = RefragLM(str(folder), documents="tags", device="cpu")
    with caplog.at_level(logging.WARNING, logger="refrag_lightning"):
        lm.loglikelihood([_request("loglikelihood", "<doc>A river.</doc>", "x")])
        assert not caplog.text
        bare = RefragLM(str(folder), documents="tags", device="cpu")
        bare.loglikelihood([_request("loglikelihood", "A river.", "x")])
    assert "no context so far holds a document (documents='tags')" in caplog.text


def test_bad_settings_are_named(folder):
    with pytest.raises(ValueError, match="needs a group"):
        RefragLM(str(folder), documents="Passage: (.*)")
    with pytest.raises(ValueError, match="read \\('vectors'\\)"):
        RefragLM(str(folder), read="vectors")
    with pytest.raises(ValueError, match=r"max_length \(3\) must be at least 4"):
        RefragLM(str(folder), max_length=3)
    # Names that it does not know are no silent wish.
    with pytest.raises(TypeError, match="documnets"):
        RefragLM(str(folder), documnets="tags")
    with pytest.raises(ValueError, match="cannot read rows@3"):
        RefragLM(str(folder), documents="tags", rate=3)


def test_a_local_task_without_documents_generates_in_the_chat_template(folder, tmp_path, caplog):
    rows = [{"question": f"Which is {n}?", "answer": str(n)} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    }
    with caplog.at_level(logging.WARNING, logger="refrag_lightning"):
        found = simple_evaluate(
            "refrag",
            model_args={"init_from": str(folder), "device": "cpu", "documents": "tags"},
            tasks=[task],
            batch_size=2,
            apply_chat_template=True,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    assert "no context so far holds a document" in caplog.text
    lm = RefragLM(str(folder), device="cpu")
    model, tokenizer = lm.reader.model, lm.reader.tokenizer
    right = 0
    for sample in found["samples"]["numbers"]:
        row = rows[sample["doc_id"]]
        # Another way to the same: the tokenizer's own chat template.
        batch = tokenizer.apply_chat([{"role": "user", "content": row["question"]}])
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
        written = tokenizer.decode(tokens[0]).split("\n")[0]
        assert sample["resps"] == [[written]]
        right += written == row["answer"]
    assert found["results"]["numbers"]["exact_match,none"] == pytest.approx(right / 3)


def test_a_local_task_runs(folder, tmp_path):
    rows = [
        {"passage": f"Number {n} is {place}.", "question": f"Which is {n}?", "answer": place}
        for n, place in enumerate(["Paris", "Rome", "Oslo"])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "places",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "<doc>{{passage}}</doc>{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": ["Paris", "Rome", "Oslo"],
        "metric_list": [{"metric": "acc"}],
    }
    results = {}
    for documents in ("none", "tags"):
        lm = RefragLM(str(folder), documents=documents, device="cpu")
        found = simple_evaluate(
            lm,
            tasks=[dict(task)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        results[documents] = found["results"]["places"]["acc,none"]
        samples = found["samples"]["places"]
        # The accuracy is that of the likelihoods which the adapter gives.
        right = 0
        for sample in samples:
            place = rows[sample["doc_id"]]
            context = f"<doc>{place['passage']}</doc>{place['question']}"
            pairs = [(context, f" {choice}") for choice in task["doc_to_choice"]]
            totals = [
                t for t, _ in lm.loglikelihood([_request("loglikelihood", *p) for p in pairs])
            ]
            right += task["doc_to_choice"][totals.index(max(totals))] == place["answer"]
        assert results[documents] == pytest.approx(right / 3)


def _sized(**kwargs):
    """A data set as RULER makes it: the tokenizer is loaded by the name that the harness gives."""
    from datasets import Dataset
    from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name

    tokenizer = get_tokenizer(resolve_tokenizer_name(kwargs))
    text = "The Seine flows through Paris."
    size = len(tokenizer(text).input_ids)
    return {"test": Dataset.from_list([{"text": text, "size": size, "wanted": kwargs["wanted"]}])}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("model", "evaluate"),
        ("tiny/decoder", "evaluate"),
        ("model", "task manager"),
        ("model", "model_args"),
    ],
)
def test_tasks_that_make_their_texts_get_the_decoders_tokenizer(name, way, folder, monkeypatch):
    pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    # The index of all the harness's tasks takes a while.
    bare = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", bare)
    init_from = str(folder) if name == "model" else name
    lm = RefragLM(init_from, device="cpu")
    task = {
        "task": "sized",
        "dataset_path": "",
        "custom_dataset": _sized,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{size}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 2},
        "metric_list": [{"metric": "exact_match"}],
    }
    options = {"bootstrap_iters": 0}
    metadata = {"wanted": 64}
    if way == "evaluate":
        found = lm.evaluate([task], metadata=metadata, **options)
    elif way == "task manager":
        manager = TaskManager(include_defaults=False, metadata={**lm.metadata, **metadata})
        found = lm.evaluate([task], task_manager=manager, **options)
    else:
        arguments = {"init_from": init_from, "device": "cpu", **lm.metadata}
        found = simple_evaluate("refrag", arguments, [task], metadata=metadata, **options)
    (sample,) = found["samples"]["sized"]
    ids = lm.reader.tokenizer.decoder("The Seine flows through Paris.")["input_ids"]
    assert (sample["doc"]["size"], sample["doc"]["wanted"]) == (len(ids), 64)


def test_the_tokenizer_that_tasks_load_names_no_code():
    lm = RefragLM("tiny/decoder", device="cpu")
    lm.reader.tokenizer.decoder.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    with open(f"{lm.metadata['tokenizer']}/tokenizer_config.json") as settings:
        assert "auto_map" not in json.load(settings)


def test_what_the_decoder_has_no_room_for(monkeypatch):
    """The model's own window is the default, and a longer `max_length` reads not one more."""
    monkeypatch.setattr("refrag_lightning.model.plain.num_positions", lambda model: 20)
    assert RefragLM("tiny/decoder", device="cpu").max_length == 20
    request = _request("loglikelihood", "The river flows through the town. " * 9, "to the sea")
    with pytest.raises(ValueError, match=r"request 0 takes .* the decoder has 20: give a shorter"):
        RefragLM("tiny/decoder", device="cpu", max_length=500).loglikelihood([request])
    monkeypatch.setattr("refrag_lightning.model.plain.num_positions", lambda model: None)
    assert RefragLM("tiny/decoder", device="cpu").max_length == 2048


@pytest.fixture(
    scope="module", params=[(*kind, opens) for kind in KINDS for opens in (False, True)]
)
def harness(request, tmp_path_factory):
    """A tiny decoder whose tokenizer puts a space, as ours and as the harness has it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    model, way, opens = request.param
    tokenizer = spaced(model, way, opens=opens)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    decoder = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape, **heads)
    )
    folder = tmp_path_factory.mktemp("decoders") / way
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    theirs = HFLM(pretrained=decoder.eval(), tokenizer=tokenizer, batch_size=1, device="cpu")
    return RefragLM(str(folder), device="cpu"), theirs, opens


def test_likelihoods_are_the_harness_own(harness):
    ours, theirs, opens = harness
    pairs = [
        ("the river", " flows through"),
        ("the town ", "by"),
        ("", "the town"),
        ("", " the town"),
        (" ", "the town"),
        ("a town<br>", "the river<br>the town"),
        ("user\nthe river", " flows\nassistant"),
    ]
    requests = [_request("loglikelihood", *pair) for pair in pairs]

    def straddles(context, continuation):
        own = theirs.tokenizer
        before, whole = (own(text)["input_ids"] for text in (context, context + continuation))
        return whole[: len(before)] != before

    # A context of white space alone leaves its model without a token to predict from.
    kept = [r for r in requests if (opens or r.args[0] != " ") and not straddles(*r.args)]
    assert len(kept) >= 4
    wanted = theirs.loglikelihood(kept, disable_tqdm=True)
    got = ours.loglikelihood(kept)
    assert [nats for nats, _ in got] == pytest.approx([nats for nats, _ in wanted], abs=1e-4)
    assert [hit for _, hit in got] == [hit for _, hit in wanted]
    if not opens:
        # Where it does open texts with a token, it has that token written too.
        text = [_request("loglikelihood_rolling", "the river flows by the town")]
        assert ours.loglikelihood_rolling(text) == pytest.approx(
            theirs.loglikelihood_rolling(text, disable_tqdm=True), abs=1e-4
        )


def test_stretches_of_a_text_have_the_tokens_of_the_whole(harness):
    ours, _, _ = harness
    text = " the river has no boat at all"
    (whole,) = ours.reader.tokenizer.plain_decoder([text], "nothing")
    lm = copy.copy(ours)
    lm.max_length = 5 + len(lm.reader.tokenizer.opening_ids)
    pieces = list(lm._stretches(text))
    assert len(pieces) > 2
    written = []
    for piece in pieces:
        (read,) = lm.reader.tokenizer.decoder_tokens([piece])
        written += read[-1].ids.tolist()
        assert sum(len(r.ids) for r in read) <= 5
    assert written == whole.ids.tolist()
    # What is left of a long context has the tokens that it has in the whole.
    left = lm._fitted([Segment(text, "text"), Segment(" by", "text", train=True)])
    (read,) = lm.reader.tokenizer.decoder_tokens([left])
    both = [*whole.ids, *lm.reader.tokenizer.plain_decoder([" by"])[0].ids]
    assert [i for r in read for i in r.ids] == both[-5:]
