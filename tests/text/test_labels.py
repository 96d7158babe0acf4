"""What a batch says is to be learnt, token by token, for three chat templates."""

from __future__ import annotations

import pytest

from refrag_lightning.text.documents import Document
from refrag_lightning.text.segments import Segment
from tests.text.loading import hugging_face, refrag

MESSAGES = [
    {"role": "user", "content": ["Where? ", Document("The Seine.", title="Rivers")]},
    {"role": "assistant", "content": "Paris [1]."},
    {"role": "user", "content": "And Rome?"},
    {"role": "assistant", "content": "No idea."},
]
# Pieces of the conversation as the decoder reads it with every row expanded; "*" before a piece
# that is learnt. Written after the families' documented formats.
EXPECTED = {
    "tiny/decoder": [
        "<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n<|im_start|>user\n",
        "Where? ",
        "[1] Rivers\n",
        "The Seine.",
        "\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "*Paris [1].",
        "*<|im_end|>",
        "\n<|im_start|>user\n",
        "And Rome?",
        "<|im_end|>\n<|im_start|>assistant\n",
        "*No idea.",
        "*<|im_end|>",
        "\n",
    ],
    "tiny/gemma": [
        "<bos><start_of_turn>user\n",
        "Where? ",
        "[1] Rivers\n",
        "The Seine.",
        "\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "*Paris [1].",
        "*<end_of_turn>",
        "\n<start_of_turn>user\n",
        "And Rome?",
        "<end_of_turn>\n<start_of_turn>model\n",
        "*No idea.",
        "*<end_of_turn>",
        "\n",
    ],
    "tiny/llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "Where? ",
        "[1] Rivers\n",
        "The Seine.",
        "\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "*Paris [1].",
        "*<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "And Rome?",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "*No idea.",
        "*<|eot_id|>",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_labels_token_by_token(name):
    tokenizer = hugging_face(name)
    ids, labels = [], []
    for piece in EXPECTED[name]:
        own = tokenizer(piece.removeprefix("*"), add_special_tokens=False)["input_ids"]
        ids += own
        labels += own if piece.startswith("*") else [-100] * len(own)
    batch = refrag("tiny/encoder", name).apply_chat(
        MESSAGES, expand="all", add_generation_prompt=False
    )
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    # The end of a turn is one token, and it is learnt.
    end = tokenizer(EXPECTED[name][7][1:], add_special_tokens=False)["input_ids"]
    assert len(end) == 1
    assert labels.count(end[0]) == 2


@pytest.mark.parametrize("name", EXPECTED)
def test_vectors_stand_for_the_document_and_are_never_learnt(name):
    tokenizer = refrag("tiny/encoder", name)
    options = {"add_generation_prompt": False}
    compressed = tokenizer.apply_chat(MESSAGES, **options)
    expanded = tokenizer.apply_chat(MESSAGES, expand="all", **options)
    learnt = [batch["labels"][batch["labels"] >= 0] for batch in (compressed, expanded)]
    assert learnt[0].tolist() == learnt[1].tolist()
    assert (compressed["labels"][compressed["slot_ids"] >= 0] == -100).all()
    assert (compressed["slot_ids"] >= 0).any()


@pytest.mark.parametrize("name", EXPECTED)
def test_splitting_a_template_changes_no_token(name):
    # The same conversation, nothing of it to be learnt: its template stays in one piece.
    kept = [{**message, "train": False} for message in MESSAGES]
    tokenizer = refrag("tiny/encoder", name)
    split, whole = (tokenizer.apply_chat(messages) for messages in (MESSAGES, kept))
    assert split["input_ids"].tolist() == whole["input_ids"].tolist()
    assert "labels" in split
    assert "labels" not in whole


def test_labels_of_segments_and_of_an_untrained_text_beside_them():
    tokenizer = refrag("tiny/encoder", "tiny/gemma")
    texts = [[Segment("Repeat: ", "text"), Segment("one two", "text", train=True)]]
    texts += [[Segment("x", "text", train=True)], [Segment("not this", "text")]]
    batch = tokenizer.build(texts, padding_side="right")
    own = hugging_face("tiny/gemma")("one two", add_special_tokens=False)["input_ids"]
    assert [label for label in batch["labels"][0].tolist() if label >= 0] == own
    # Gemma's <bos> stands before the text and predicts its first token.
    assert (batch["labels"][1] >= 0).nonzero().flatten().tolist() == [1]
    assert (batch["labels"][2] == -100).all()


def test_packed_lines_hold_the_same_texts():
    tokenizer = refrag(compression=2)
    texts = [
        [Segment("a " * n, "text"), Segment("b " * (n + 1), "text", train=True)] for n in range(6)
    ]
    apart = tokenizer.build(texts)
    packed = tokenizer.build(texts, line_length=20)
    assert len(packed["input_ids"]) < len(texts)
    for number in range(len(texts)):
        alone = apart["attention_mask"][number] == 1
        together = packed["segment_ids"] == number
        for key in ("input_ids", "labels", "position_ids", "slot_ids"):
            assert packed[key][together].tolist() == apart[key][number][alone].tolist(), key
    assert (packed["segment_ids"] >= 0).tolist() == (packed["attention_mask"] == 1).tolist()
    # A text that is longer makes the lines as long as itself.
    longest = int(apart["attention_mask"].sum(dim=1).max())
    assert longest > 12
    assert tokenizer.build(texts, line_length=12)["input_ids"].shape[1] == longest
    with pytest.raises(ValueError, match=r"line_length \(0\) must be at least 1"):
        tokenizer.build(texts, line_length=0)
