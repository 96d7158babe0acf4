"""An adapter for lm-evaluation-harness (`pip install lm_eval`), which brings hundreds of tasks.

    import lm_eval
    from refrag_lightning.evaluation.lm_eval import RefragLM

    lm_eval.simple_evaluate(RefragLM("runs/sft/…/model", documents="tags"), tasks=["mine"])

Once the module is imported, `model="refrag"` names the same class. Tasks know nothing of documents,
so `documents` says which part of a task's context is one. By default none is: the model then reads
every context as text and nothing is compressed, which is said in the log.

As with the harness's own Hugging Face model, white space at a context's end counts to what follows.
Context and continuation are tokenized apart, which gives other tokens than both at once only where
a token would straddle them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from refrag_lightning.evaluation.reader import Reader
from refrag_lightning.evaluation.readings import Reading, documents_of
from refrag_lightning.model.load import load
from refrag_lightning.text.documents import Document, Part, parse
from refrag_lightning.text.segments import Segment, render

logger = logging.getLogger("refrag_lightning")


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
        batch_size: Texts a batch.
        max_length: Most positions of a text; what the decoder can read if None.
        device: Where to run; a GPU where there is one if None.
        dtype: Of the weights; float32 if None.

    Raises:
        ValueError: If `documents` is a regular expression without a group `doc`, or `read` is
            neither.
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
        **kwargs: Any,
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
        model, tokenizer = load(init_from, device=device, dtype=dtype)
        self.reader = Reader(model.eval(), tokenizer)
        compressed = documents != "none" and read == "rows"
        self.reading = Reading("rows", rate or tokenizer.compression) if compressed else None
        if self.reading is not None and not self.reader.can_read(self.reading):
            raise ValueError(f"{init_from} cannot read {self.reading.name}: use read='full'")
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        config: Any = model.decoder.config.get_text_config()
        self.max_length = int(max_length or config.max_position_embeddings)
        self._chat = False
        self._num_documents = 0
        if not compressed:
            logger.warning("refrag: every context is read as text, nothing is compressed")

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template, for the harness's cache."""
        return str(self.reader.tokenizer.decoder.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The decoder's chat template, for the harness's record."""
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
            texts.append([*self._opened(self._segments(bare)), following])
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
            options = dict(requests[numbers[0]].args[1])
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(options.pop("max_gen_toks", 256))
            if until:
                decoder = self.reader.tokenizer.decoder
                options |= {"stop_strings": until, "tokenizer": decoder}
            if not options.get("do_sample", False):
                options = {k: v for k, v in options.items() if k not in ("temperature", "top_p")}
            prompts = [self._opened(self._segments(str(requests[n].args[0]))) for n in numbers]
            self._say_whether_documents_were_found()
            for places in self._batches(prompts):
                written = self.reader.answers(
                    [prompts[place] for place in places],
                    self._reading(),
                    max_new_tokens=most,
                    **options,
                )
                for place, answer in zip(places, written, strict=True):
                    answers[numbers[place]] = _until(answer, until)
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

    def _likelihoods(self, texts: Sequence[list[Segment]]) -> list[tuple[float, bool]]:
        """Nats of each text's targets, and whether each of them is the most likely token."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        for places in self._batches(texts):
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
        tokens = self.reader.tokenizer.plain_decoder([text])[0]
        room, before = self.max_length - 1, ""
        start = 0
        for first in range(0, len(tokens.ids), room):
            stop = min(first + room, len(tokens.ids))
            end = len(text) if stop == len(tokens.ids) else int(tokens.ends[stop - 1])
            opening = self._opened([Segment(before, "text")] if before else [])
            yield [*opening, Segment(text[start:end], "text", train=True)]
            before, start = text[int(tokens.starts[stop - 1]) : end], end


def _matched(pattern: re.Pattern[str], context: str) -> Iterator[Part]:
    done = 0
    for found in pattern.finditer(context):
        if found.start() > done:
            yield context[done : found.start()]
        yield Document(found["doc"], title=found.groupdict().get("title") or "")
        done = found.end()
    if done < len(context):
        yield context[done:]


def _until(answer: str, until: Sequence[str]) -> str:
    ends = [answer.index(stop) for stop in until if stop and stop in answer]
    return answer[: min(ends)] if ends else answer
