"""TextBatch: every target with its prediction's position, packed or not, student and teacher."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from refrag_lightning.data.examples import Example, collate
from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment
from refrag_lightning.text.tokenizer import RefragTokenizer

ANSWERS = ["Paris", "It is the Seine, and no other river.", "No"]
TASKS = ["answer", "reconstruct", "answer"]


@pytest.fixture(scope="module")
def tokenizer():
    return RefragTokenizer.from_encoder_decoder(
        "tiny/encoder", "tiny/decoder", compression=4, rates=[4, 8], context="document"
    )


def example(number, *, text="The Seine flows through Paris, and on to the sea.", **options):
    document = Document(text * (number + 1), str(number))
    return Example(
        (
            Segment("Read this: ", "text"),
            Segment(document.text, "document", document),
            Segment(" Answer:", "text"),
            Segment(ANSWERS[number], "text", train=True),
            Segment(" Then?", "text"),
            Segment(" Nothing.", "text", train=True),
        ),
        task=TASKS[number],
        id=f"example {number}",
        **options,
    )


EXAMPLES = [example(number) for number in range(3)]


def expected_targets(tokenizer):
    ids = lambda text: tokenizer.decoder(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [ids(answer) + ids(" Nothing.") for answer in ANSWERS]


@pytest.mark.parametrize("line_length", [None, 200, 5])
@pytest.mark.parametrize("compression", [4, 8])
def test_targets_are_the_trained_tokens_in_the_texts_order(tokenizer, line_length, compression):
    batch = collate(
        EXAMPLES, tokenizer, compression=compression, teacher=True, line_length=line_length
    )
    expected = expected_targets(tokenizer)
    assert batch.targets.tolist() == [i for ids in expected for i in ids]
    assert batch.text_ids.tolist() == [n for n, ids in enumerate(expected) for _ in ids]
    assert batch.tasks == ("answer", "reconstruct")
    assert batch.task_ids.tolist() == [int(n == 1) for n, ids in enumerate(expected) for _ in ids]
    assert batch.ids == ("example 0", "example 1", "example 2")
    assert batch.compression == compression and batch.num_texts == 3
    alone = [collate([e], tokenizer, compression=compression).num_tokens for e in EXAMPLES]
    assert batch.num_tokens == sum(alone)


@pytest.mark.parametrize("line_length", [None, 200])
def test_a_target_stands_right_after_the_position_that_predicts_it(tokenizer, line_length):
    batch = collate(EXAMPLES, tokenizer, teacher=True, line_length=line_length)
    for side, predicting in (
        (batch.student, batch.predicting),
        (batch.teacher, batch.teacher_predicting),
    ):
        ids, places = side["input_ids"].flatten(), side["position_ids"].flatten()
        assert torch.equal(ids[predicting + 1], batch.targets)
        # The same text goes on: one position further, on the same line.
        assert torch.equal(places[predicting + 1], places[predicting] + 1)
        width = side["input_ids"].shape[1]
        assert torch.equal(predicting // width, (predicting + 1) // width)
        if line_length is not None:
            assert torch.equal(side["segment_ids"].flatten()[predicting], batch.text_ids)
            assert len(side["input_ids"]) < 3
        else:
            assert torch.equal(predicting // width, batch.text_ids)
    assert (batch.teacher["slot_ids"] == -1).all()
    assert (batch.student["slot_ids"] >= 0).any()


def test_packing_here_is_the_tokenizers_packing(tokenizer):
    texts = [example.segments for example in EXAMPLES]
    ours = collate(EXAMPLES, tokenizer, line_length=120).student
    theirs = tokenizer.build(texts, padding_side="right", line_length=120)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_text_longer_than_a_line_makes_the_line_longer(tokenizer):
    alone = collate(EXAMPLES, tokenizer).student["attention_mask"].sum(dim=1)
    batch = collate(EXAMPLES, tokenizer, line_length=3)
    assert batch.student["input_ids"].shape[1] == alone.max()
    assert batch.num_tokens == alone.sum()


def test_a_document_that_only_the_teacher_reads_takes_no_target_away(tokenizer):
    # The encoder's tokenizer makes nothing of the control character, the decoder's one token.
    document = Document("\x01", "1")
    segments = (
        Segment(document.text, "document", document),
        Segment("Paris is here", "text", train=True),
    )
    batch = collate([Example(segments), EXAMPLES[0]], tokenizer, teacher=True)
    ids = tokenizer.decoder("Paris is here", add_special_tokens=False)["input_ids"]
    # On the student's side nothing stands before the first token, so neither side predicts it.
    assert batch.targets[batch.text_ids == 0].tolist() == ids[1:]
    for side, predicting in (
        (batch.student, batch.predicting),
        (batch.teacher, batch.teacher_predicting),
    ):
        assert torch.equal(side["input_ids"].flatten()[predicting + 1], batch.targets)


def test_expansion_is_each_examples_own(tokenizer):
    examples = [example(0, expand="all"), example(1, expand=[0]), example(2, expand=0.5)]
    np.random.seed(0)
    batch = collate(examples, tokenizer)
    states = [[row.state for row in trace] for trace in batch.student.trace]
    assert set(states[0]) == {"tokens"}
    assert states[1] == ["tokens"] + ["vector"] * (len(states[1]) - 1)
    assert states[2].count("tokens") == round(len(states[2]) / 2)


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts = [e.segments[:3] for e in EXAMPLES]
    examples = [
        Example(e.segments, prompt=prompt, references=("Paris",), id=e.id)
        for e, prompt in zip(EXAMPLES, prompts, strict=True)
    ]
    batch = collate(examples, tokenizer)
    assert batch.references == (("Paris",),) * 3
    assert (batch.prompts["attention_mask"][:, -1] == 1).all()
    lengths = batch.prompts["attention_mask"].sum(dim=1)
    for number, length in enumerate(lengths.tolist()):
        student = batch.student["input_ids"][number, :length]
        assert torch.equal(batch.prompts["input_ids"][number, -length:], student)
    # An example without a prompt is left out of what is generated.
    some = collate([EXAMPLES[0], examples[1], EXAMPLES[2]], tokenizer)
    assert some.num_texts == 3 and some.references == (("Paris",),)
    length = int(lengths[1])
    assert torch.equal(some.prompts["input_ids"], batch.prompts["input_ids"][1:2, -length:])


@pytest.mark.parametrize("trained", [[], [Segment("", "text", train=True)]])
def test_an_example_without_a_target_is_an_error(tokenizer, trained):
    empty = Example((Segment("nothing to learn", "text"), *trained), id="row 7")
    with pytest.raises(ValueError, match="example 'row 7' has no target"):
        collate([EXAMPLES[0], empty], tokenizer)
    # One token that opens its text has nothing before it to predict it.
    alone = Example((Segment("a", "text", train=True),), id="row 8")
    with pytest.raises(ValueError, match="example 'row 8' has no target"):
        collate([EXAMPLES[0], alone], tokenizer)


def test_without_documents_no_encoder_is_needed():
    tokenizer = RefragTokenizer.from_encoder_decoder(None, "tiny/decoder", compression=1)
    batch = collate([example(0, expand="all")], tokenizer, teacher=True)
    assert torch.equal(batch.student["input_ids"], batch.teacher["input_ids"])
    assert torch.equal(batch.predicting, batch.teacher_predicting)


def test_a_batch_moves_as_a_whole(tokenizer):
    batch = collate(EXAMPLES, tokenizer, teacher=True).to("meta")
    for tensor in (batch.targets, batch.teacher_predicting, batch.student["labels"]):
        assert tensor.device.type == "meta"
    assert batch.teacher["input_ids"].device.type == "meta"
    assert batch.prompts is None and batch.ids[0] == "example 0"


def test_loss_at_the_targets_is_the_models_own_loss(tokenizer):
    """The mean cross-entropy over `targets` is what transformers computes from the labels."""
    from transformers import AutoModelForCausalLM

    from refrag_lightning.hub import resolve

    decoder = AutoModelForCausalLM.from_pretrained(resolve("tiny/decoder").path)
    batch = collate([example(n, expand="all") for n in range(3)], tokenizer)
    side = SimpleNamespace(**batch.student)
    with torch.no_grad():
        output = decoder(side.input_ids, attention_mask=side.attention_mask, labels=side.labels)
    logits = output.logits.flatten(0, 1)[batch.predicting]
    loss = torch.nn.functional.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(loss, output.loss)
