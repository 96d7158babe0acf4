"""A teacher's own answers, generated once: what sequence-level distillation trains on.

The teacher reads each conversation up to its last answer, every document as text, and answers
greedily; the student then learns these answers in place of the gold ones, as in PISCO (arXiv
2501.16075). They are kept as JSON lines in the cache, written batch by batch: a run that was
killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from refrag_lightning.cache import cache_dir, file_sha256
from refrag_lightning.data.conversations import Conversation, fill
from refrag_lightning.data.questions import Passage
from refrag_lightning.text.segments import render_chat

# Part of the cache's key: raise it when the same model and conversations give other answers.
_VERSION = 4
_MODEL_FILES = (".json", ".safetensors")


@dataclass(frozen=True)
class TeacherAnswers:
    """Which teacher answers, and how.

    Attributes:
        model: Its name or folder: a causal LM, or a REFRAG model, which reads text too.
        max_new_tokens: Most tokens of an answer.
        batch_size: Conversations that are answered at once.
        dtype: The weights' type, such as bfloat16; as they are saved if None.
    """

    model: str
    max_new_tokens: int = 64
    batch_size: int = 8
    dtype: str | None = None

    def answers(
        self,
        conversations: Sequence[Conversation],
        passages: Callable[[Conversation], Sequence[Passage]],
        key: dict[str, Any],
        *,
        device: Any = "cpu",
    ) -> list[str]:
        """The teacher's answer to each conversation, from the cache, or generated into it.

        Args:
            conversations: Each ends with an answer, which the teacher does not see.
            passages: The passages that the teacher reads with a conversation.
            key: What the conversations and passages depend on; part of the cache's name.
            device: Where to generate.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            done = _read(path)
            if len(done) < len(conversations):
                self._generate(conversations, passages, path, device=device, start=len(done))
                done = _read(path)
        assert len(done) == len(conversations), path
        return done

    def path(self, key: dict[str, Any]) -> Path:
        """The cache's file for conversations of that key."""
        parts = {
            "version": _VERSION,
            "model": _fingerprint(self.model),
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
            "of": key,
        }
        text = json.dumps(parts, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:20]
        return cache_dir() / "data" / f"answers-{name}.jsonl"

    def _generate(
        self,
        conversations: Sequence[Conversation],
        passages: Callable[[Conversation], Sequence[Passage]],
        path: Path,
        *,
        device: Any,
        start: int,
    ) -> None:
        from refrag_lightning.model.answering import answer
        from refrag_lightning.model.load import load
        from refrag_lightning.model.reading import naming_texts

        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        model, tokenizer = load(self.model, device=device, dtype=dtype)
        model.eval()
        style: dict[str, Any] = {"header": tokenizer.header, "footer": tokenizer.footer}
        with path.open("a", encoding="utf-8") as file:
            for first in range(start, len(conversations), self.batch_size):
                asked = [
                    fill(conversation, passages(conversation))
                    for conversation in conversations[first : first + self.batch_size]
                ]
                texts = [render_chat(tokenizer.decoder, each[:-1], **style) for each in asked]
                batch = tokenizer.build(texts, text_only=True, padding_side="left")
                names = [
                    f"conversation {conversation.id!r}, read as text by the teacher {self.model},"
                    for conversation in conversations[first : first + self.batch_size]
                ]
                with naming_texts(names, "give fewer passages or a smaller max_new_tokens"):
                    answers = answer(
                        model, tokenizer, batch.to(device), max_new_tokens=self.max_new_tokens
                    )
                for text in answers:
                    file.write(json.dumps({"answer": text}) + "\n")
                file.flush()


def _read(path: Path) -> list[str]:
    """The answers in a file; a line that a kill cut off is taken away from it."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(sum(map(len, lines[:-1])))
        lines = lines[:-1]
    return [json.loads(line)["answer"] for line in lines]


def _fingerprint(model: str) -> str:
    """What changes when the model does."""
    from refrag_lightning.hub import resolve
    from refrag_lightning.model.load import model_folder

    source = resolve(model_folder(model), weights=False)
    if source.kind != "local":
        return str(resolve(model).revision)
    # The configuration counts too: it names the models that a REFRAG folder stands on.
    files = [p for p in sorted(Path(source.path).rglob("*")) if p.suffix in _MODEL_FILES]
    digests = [f"{path.name} {file_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
