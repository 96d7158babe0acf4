"""An adapter for lm-evaluation-harness (`pip install lm_eval`), which brings hundreds of tasks.

    from refrag_lightning.evaluation.lm_eval import RefragLM

    RefragLM("runs/sft/…/model", documents="tags").evaluate(["mine"])

Once the module is imported, `lm_eval.simple_evaluate("refrag", …)` takes the same class by name.
Tasks that make texts of a given length themselves, such as RULER's (`pip install lm_eval[ruler]`),
load a tokenizer by name: `evaluate` gives them the decoder's own. For `simple_evaluate` put one
into `model_args` as `tokenizer`, or hand on `metadata=lm.metadata`.

Tasks know nothing of documents, so `documents` says which part of a task's context is one. By
default none is: the model then reads every context as text and nothing is compressed, which is said
in the log.

As with the harness's own Hugging Face model, white space at a context's end counts to what follows.
Context and continuation are tokenized apart, which gives other tokens than both at once only where
a token would straddle them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.evaluation.readings import Reading, documents_of
from refrag_lightning.model.load import load
from refrag_lightning.model.reading import naming_texts
from refrag_lightning.text.documents import Document, Part, parse
from refrag_lightning.text.plain import After
from refrag_lightning.text.segments import Segment, render

logger = logging.getLogger("refrag_lightning")

_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MOST = 256
# As in the harness, of a model that nothing limits.
_DEFAULT_LENGTH = 2048
_SHORTER = "give a shorter max_length"
_OF_SAMPLING = ("top_p", "top_k", "min_p")


@register_model("refrag")
class RefragLM(LM):
    """A model folder for the harness.

    Args:
        init_from: Folder of the model, or of the run that made it; a plain causal language model
            works too.
        documents: What of a context is a document: `none`; `tags`, what stands in `<doc>` tags,
            which the task's own template has to write; or a regular expression whose group `doc`
            is a document's text (and `title`, where there is one, its title).
        read: Whether documents are read as `rows` or as `full` text.
        rate: Tokens a row; the model's own if None.
        batch_size: Texts a batch; `auto` takes 8.
        max_length: Most positions of a text, generated ones counted; what the decoder can read if
            None (2,048 where nothing limits it). Of a longer context the end is read, and that is
            said in the log.
        device: Where to run; a GPU where there is one if None.
        dtype: Of the weights; float32 if None.
        max_batch_size: Not read; the harness gives it to every model.
        tokenizer: Not read; the harness gives it to tasks that make their texts themselves.

    Raises:
        ValueError: If `documents` is a regular expression without a group `doc`, `read` is
            neither, or `max_length` is less than 4.
    """

    def __init__(
        self,
        init_from: str,
        documents: str = "none",
        read: str = "rows",
        rate: int | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        if read not in ("rows", "full"):
            raise ValueError(f"read ({read!r}) must be 'rows' or 'full'")
        self.documents = documents
        self._pattern: re.Pattern[str] | None = None
        if documents not in ("none", "tags"):
            self._pattern = re.compile(documents, re.DOTALL)
            if "doc" not in self._pattern.groupindex:
                raise ValueError(f"documents ({documents!r}) needs a group (?P<doc>…)")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, own_tokenizer = load(init_from, device=device, dtype=dtype)
        self.reader = Reader(model.eval(), own_tokenizer)
        compressed = documents != "none" and read == "rows"
        self.reading = Reading("rows", rate or own_tokenizer.compression) if compressed else None
        if self.reading is not None and not self.reader.can_read(self.reading):
            raise ValueError(f"{init_from} cannot read {self.reading.name}: use read='full'")
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = int(max_length or model.window or _DEFAULT_LENGTH)
        if self.max_length < 4:
            raise ValueError(f"max_length ({max_length}) must be at least 4")
        self._chat = False
        self._has_cut = False
        self._num_documents = 0
        if not compressed:
            logger.warning("refrag: every context is read as text, nothing is compressed")

    def evaluate(
        self,
        tasks: Sequence[str | dict[str, Any]],
        *,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Runs tasks with `lm_eval.simple_evaluate`.

        Args:
            tasks: Their names, or their settings.
            metadata: What tasks take beside the tokenizer, such as RULER's `max_seq_lengths`.
            **options: Of `simple_evaluate`. A `task_manager` brings its own metadata; give it
                this object's.

        Returns:
            The harness's results.
        """
        given = {**self.metadata, **(metadata or {})}
        return simple_evaluate(self, tasks=list(tasks), metadata=given, **options)

    @property
    def metadata(self) -> dict[str, str]:
        """What tasks that make their texts themselves read: where the decoder's tokenizer is."""
        return {"tokenizer": self._tokenizer_folder.name}

    @cached_property
    def _tokenizer_folder(self) -> TemporaryDirectory[str]:
        folder = TemporaryDirectory(prefix="refrag-tokenizer-")
        self.reader.tokenizer.decoder.save_pretrained(folder.name)
        # The harness lets a tokenizer's folder name code to run, and ours may come from anywhere.
        settings = Path(folder.name) / "tokenizer_config.json"
        kept = json.loads(settings.read_text(encoding="utf-8"))
        kept.pop("auto_map", None)
        settings.write_text(json.dumps(kept), encoding="utf-8")
        return folder

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template, for the harness's cache."""
        return str(self.reader.tokenizer.decoder.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The decoder's chat template, for the harness's record."""
        # Requests from the harness's cache come without a call of `apply_chat_template`.
        self._chat |= bool(chat_template)
        return str(self.reader.tokenizer.decoder.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; from now on control strings in contexts are control tokens."""
        self._chat = True
        return str(
            self.reader.tokenizer.decoder.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each (context, continuation), and whether it is the greedy one."""
        texts = []
        for request in requests:
            context, continuation = (str(part) for part in request.args)
            bare = context.rstrip()
            following = Segment(context[len(bare) :] + continuation, "text", train=True)
            if not bare:
                # The harness's own models encode it as a text of its own.
                following = replace(following, after="nothing")
            texts.append(self._fitted([*self._opened(self._segments(bare)), following]))
        self._say_whether_documents_were_found()
        return [(-nats, hit) for nats, hit in self._likelihoods(texts)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each text, in stretches of `max_length`, each after one token."""
        texts, owners = [], []
        for number, request in enumerate(requests):
            for text in self._stretches(str(request.args[0])):
                texts.append(text)
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._likelihoods(texts), strict=True):
            totals[number] -= nats
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to one of its stop strings."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            asked = _Generation.of(requests[numbers[0]].args[1])
            room = self.max_length - asked.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks ({asked.max_new_tokens}) leaves nothing of max_length "
                    f"({self.max_length}) to the context"
                )
            prompts = [
                self._fitted(self._opened(self._segments(str(requests[n].args[0]))), room)
                for n in numbers
            ]
            self._say_whether_documents_were_found()
            for places in self._batches(prompts):
                with naming_texts([f"request {numbers[place]}" for place in places], _SHORTER):
                    written = self.reader.answers(
                        [prompts[place] for place in places],
                        self._reading(),
                        max_new_tokens=asked.max_new_tokens,
                        stop=asked.until,
                        # Tasks continue code, too.
                        strip=False,
                        **asked.sampling,
                    )
                for place, answer in zip(places, written, strict=True):
                    answers[numbers[place]] = answer
        return answers

    def _reading(self) -> Reading:
        return self.reading or Reading("full")

    def _segments(self, context: str) -> list[Segment]:
        """A context as segments, documents found as `documents` says."""
        tokenizer = self.reader.tokenizer
        parts: Sequence[Part] = [context]
        if self._pattern is not None:
            parts = list(_matched(self._pattern, context))
        elif self.documents == "tags":
            parts = parse(context, strict=False)
        segments = render(parts, header=tokenizer.header, footer=tokenizer.footer)
        self._num_documents += len(documents_of(segments))
        if self._chat:
            return [Segment(s.text, "template") if s.kind == "text" else s for s in segments]
        return segments

    def _say_whether_documents_were_found(self) -> None:
        if self.documents != "none" and not self._num_documents:
            logger.warning(
                "refrag: no context so far holds a document (documents=%r), so nothing is "
                "compressed",
                self.documents,
            )

    def _opened(self, segments: list[Segment]) -> list[Segment]:
        """Something to predict the first token from, where a text would have nothing."""
        decoder = self.reader.tokenizer.decoder
        if any(s.text for s in segments) or len(self.reader.tokenizer.opening_ids):
            return segments
        return [Segment(str(decoder.bos_token or decoder.eos_token), "template")]

    def _fitted(self, text: list[Segment], room: int | None = None) -> list[Segment]:
        """A text without what is too much of its beginning; what is to be written stays whole.

        Documents stay or go as a whole.
        """
        room = self.max_length if room is None else room
        # No tokenizer makes more tokens than bytes.
        if sum(len(s.text.encode()) for s in text) < room:
            return text
        tokenizer = self.reader.tokenizer
        left = room - len(tokenizer.opening_ids)
        kept: list[Segment] = []
        (read,) = tokenizer.decoder_tokens([text])
        for segment, tokens in zip(reversed(text), reversed(read), strict=True):
            size = len(tokens.ids)
            if segment.document is not None and self.reading is not None:
                at_rate = tokenizer.at(self.reading.rate or tokenizer.compression)
                (packed,) = at_rate.pack([segment.text])
                size = int(at_rate.assembler.slots_of_rows(packed.row_sizes).sum())
            if size > left and not segment.train:
                if segment.document is None and left > 0:
                    kept.append(replace(segment, text=segment.text[tokens.starts[-left] :]))
                # What is read is read as it was in the whole context.
                if kept:
                    kept[-1] = replace(kept[-1], after="text")
                if not self._has_cut:
                    logger.warning(
                        "refrag: of contexts of more than max_length (%d) positions only the end "
                        "is read",
                        self.max_length,
                    )
                self._has_cut = True
                break
            kept.append(segment)
            left -= size
        return kept[::-1]

    def _likelihoods(self, texts: Sequence[list[Segment]]) -> list[tuple[float, bool]]:
        """Nats of each text's targets, and whether each of them is the most likely token."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        for places in self._batches(texts):
            with naming_texts([f"request {place}" for place in places], _SHORTER):
                batch = self.reader.likelihood([texts[place] for place in places], self._reading())
            hits = (batch.hits_B == batch.targets_B).tolist()
            for place, nats, hit in zip(places, batch.nats_B.tolist(), hits, strict=True):
                found[place] = (nats, hit)
        return found

    def _batches(self, texts: Sequence[Sequence[Segment]]) -> Iterator[list[int]]:
        """Places of texts, those of like length together, the longest first."""
        lengths = [sum(len(segment.text) for segment in text) for text in texts]
        order = sorted(range(len(texts)), key=lambda place: -lengths[place])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _stretches(self, text: str) -> Iterator[list[Segment]]:
        """Cuts a text: every token is to be written once, each stretch after what comes before it.

        Before the first stretch stands what opens a text; before the others one token, and before
        the last one as many as there is room for, as in the harness's own models.
        """
        tokenizer = self.reader.tokenizer
        tokens = tokenizer.plain_decoder([text], "nothing")[0]
        room = max(1, self.max_length - 1 - len(tokenizer.opening_ids))
        start = 0
        for first in range(0, len(tokens.ids), room):
            stop = min(first + room, len(tokens.ids))
            end = len(text) if stop == len(tokens.ids) else int(tokens.ends[stop - 1])
            earliest = max(0, stop - room - 1)
            before = text[int(tokens.starts[earliest]) : start]
            # Tokens that split one character end together: the others have nothing left to say.
            if end > start:
                opening: list[Segment] = []
                if before:
                    after: After = "text" if earliest else "nothing"
                    opening = [Segment(before, "text", after=after)]
                after = "text" if before else "nothing"
                target = Segment(text[start:end], "text", train=True, after=after)
                yield [*self._opened(opening), target]
            start = end


class _Generation(NamedTuple):
    """What a request asks of generation.

    Attributes:
        until: Strings that end an answer.
        max_new_tokens: Most tokens of an answer.
        sampling: As `answering.answer_settings` takes it.
    """

    until: list[str]
    max_new_tokens: int
    sampling: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Generation:
        """Reads a request's arguments, under all the names that the harness knows."""
        options = dict(given)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        numbers = [options.pop(name, None) for name in _MOST]
        most = next((int(number) for number in numbers if number is not None), _DEFAULT_MOST)
        # As in the harness: a temperature alone asks for sampling.
        heat = options.pop("temperature", None)
        draws = options.pop("do_sample", bool(heat))
        temperature = float(1.0 if heat is None else heat) if draws else 0.0
        if not temperature:
            options = {k: v for k, v in options.items() if k not in _OF_SAMPLING}
        options["temperature"] = temperature
        return cls(until, most, options)


def _matched(pattern: re.Pattern[str], context: str) -> Iterator[Part]:
    done = 0
    for found in pattern.finditer(context):
        if found.start() > done:
            yield context[done : found.start()]
        yield Document(found["doc"], title=found.groupdict().get("title") or "")
        done = found.end()
    if done < len(context):
        yield context[done:]
