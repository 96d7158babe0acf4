"""How a pre-training task is put to the decoder: documents, a short instruction, and the target.

    [1]
    <rows of the first document>
    [2]
    <rows of the second document>
    Continue the text above.
    <target>

With `chat` the documents and the instruction are the user's message in the decoder's chat template,
and the target is the assistant's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from refrag_lightning.data.examples import Example, Reading
from refrag_lightning.text.documents import Document, Part
from refrag_lightning.text.segments import Message, Segment, render, render_chat
from refrag_lightning.text.tokenizer import RefragTokenizer

Task = Literal["reconstruct", "continue"]

TASKS: tuple[Task, ...] = get_args(Task)

INSTRUCTIONS: Mapping[str, str] = {
    "reconstruct": "Repeat the text above.",
    "continue": "Continue the text above.",
}


@dataclass(frozen=True)
class PretrainFormat:
    """Puts documents and a target into an `Example`.

    Attributes:
        tokenizer: The model's tokenizer, whose header and footer stand around each document.
        chat: Whether the decoder's chat template is used.
        instructions: What each task's instruction says; nothing stands there if it is empty.
        header: In place of the tokenizer's header.
        footer: In place of the tokenizer's footer.

    Raises:
        ValueError: If an instruction is for no task, or a chat template is wanted and there is
            none.
    """

    tokenizer: RefragTokenizer
    chat: bool = False
    instructions: Mapping[str, str] = field(default_factory=dict)
    header: str | None = None
    footer: str | None = None

    def __post_init__(self) -> None:
        check_tasks("instructions", self.instructions)
        decoder = self.tokenizer.decoder
        if self.chat and not decoder.chat_template:
            raise ValueError(
                f"chat (true) needs a decoder with a chat template, which {decoder.name_or_path!r} "
                "has not: use chat: false"
            )

    def __call__(
        self,
        task: str,
        documents: Sequence[str],
        target: str,
        *,
        id: str = "",
        reading: Reading = "compressed",
        expand_share: float = 0.0,
    ) -> Example:
        """Makes an example.

        Args:
            task: `reconstruct` or `continue`.
            documents: What is read, in order.
            target: What the decoder learns to write.
            id: Names the example.
            reading: How the documents are read.
            expand_share: Share of the rows that stand as tokens where documents are compressed.
        """
        read = documents if reading != "none" else ()
        parts: list[Part] = [Document(text, str(n)) for n, text in enumerate(read, start=1)]
        instruction = self.instructions.get(task, INSTRUCTIONS[task])
        expand: str | float = "all" if reading == "text" else "none"
        if reading == "compressed" and expand_share:
            expand = float(expand_share)
        if self.chat:
            segments = self._chat(task, parts, instruction, target)
        else:
            prompt = [*parts, f"{instruction}\n"] if instruction else parts
            segments = render(prompt, header=self._header, footer=self._footer)
            # The same tokens with and without documents before them.
            segments.append(Segment(target, "text", train=True, after="text"))
        return Example(tuple(segments), task=task, id=id, expand=expand)

    @property
    def _header(self) -> str:
        return self.tokenizer.header if self.header is None else self.header

    @property
    def _footer(self) -> str:
        return self.tokenizer.footer if self.footer is None else self.footer

    def _chat(self, task: str, parts: list[Part], instruction: str, target: str) -> list[Segment]:
        messages: list[Message] = [
            {"role": "user", "content": [*parts, instruction]},
            {"role": "assistant", "content": [target]},
        ]
        segments = render_chat(
            self.tokenizer.decoder,
            messages,
            header=self._header,
            footer=self._footer,
            add_generation_prompt=False,
        )
        if task == "continue":
            # A continuation is broken off anywhere, which must not be learnt as an end.
            segments = [
                replace(segment, train=False) if segment.kind == "template" else segment
                for segment in segments
            ]
        return segments


def check_tasks(name: str, tasks: Mapping[str, object]) -> None:
    """Raises a ValueError where a mapping's keys are not all tasks."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"{name} has {unknown[0]!r}, which is none of {', '.join(TASKS)}")
