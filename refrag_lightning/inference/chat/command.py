"""The chat subcommand: a terminal where there is one, otherwise one question and its answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from refrag_lightning.inference.chat.session import Session


def chat(
    model: str,
    index: str | None = None,
    docs: list[str] | None = None,
    question: str | None = None,
    system: str | None = None,
    top_k: int = 5,
    search: Literal["bm25", "dense", "fused"] = "fused",
    embedder: str | None = None,
    expand: Literal["none", "all"] = "none",
    rate: int | None = None,
    prompt: str = "{passages}{question}",
    too_long: Literal["error", "drop", "truncate"] = "drop",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Answers questions on documents, in a terminal or a pipe.

    At a terminal questions are typed; `/help` lists what else can be. Where standard input is no
    terminal, all of it is one question, and the answer alone is printed.

    Args:
        model: A model folder, or a run folder that has one. A causal language model, by its folder
            or name, can be asked too, with documents as text.
        index: An index of passages that `index build` made; each question is searched for in it.
        docs: Files, folders, patterns or data sets whose documents are given to every question.
        question: One question; its answer alone is printed.
        system: The system's message.
        top_k: Passages of the index for a question.
        search: How passages are found: by words, by vectors, or by both.
        embedder: What the index' vectors were made with; the model's encoder if None.
        expand: Hand the documents over as vectors (none) or as text (all).
        rate: Tokens a row, one of the model's rates; its own default if None.
        prompt: How a question is put to the model: `{passages}` stands for the documents,
            `{question}` for the question. Best as in the model's training.
        too_long: Where documents do not fit the decoder: refuse (error), leave out the last ones
            (drop), or cut the last one that fits in part (truncate). What was done is told.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling; 0 takes the most likely token each time.
        top_p: Draws among the fewest tokens whose probabilities sum up to this.
        seed: Of sampling.
        device: Where to run, such as cuda.
        dtype: Of the model's weights while it runs, such as bfloat16; float32 if None.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
    """
    from refrag_lightning.inference.chat.attach import attached

    at_terminal = question is None and sys.stdin.isatty()
    if at_terminal and not sys.stdout.isatty():
        raise ValueError(
            "the answers do not go to a terminal, so no question can be typed; give it as "
            "--question, or on standard input"
        )
    if question is None and not at_terminal:
        question = sys.stdin.read()
    if question is not None and not question.strip():
        raise ValueError("the question is empty")
    documents = attached(docs) if docs else []
    _check_is_there(model)
    options = {
        "search": top_k if index is not None else 0,
        "expand": expand,
        "rate": rate,
        "prompt": prompt,
        "too_long": too_long,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "strict": False,
    }
    loading = {
        "index": index,
        "search": search,
        "embedder": embedder,
        "device": device,
        "dtype": dtype,
        "allow_base_mismatch": allow_base_mismatch,
    }
    if question is None:
        from rich.console import Console

        console = Console(highlight=False)
        with console.status("[dim]loading the model[/dim]", spinner="dots"):
            session = _session(model, system, options, loading)
        session.add(documents)
        facts = [("model", _described(session, rate))]
        if index is not None:
            facts.append(("index", f"{index}, {top_k} passages a question, {search} search"))
        _chat_at(console, session, facts)
    else:
        from refrag_lightning.inference.chat import pipe

        session = _session(model, system, options, loading)
        session.add(documents)
        pipe.answer(session, question)


def _check_is_there(model: str) -> None:
    """Raises at once where there is no such model; loading imports torch first."""
    from refrag_lightning import hub

    if not (Path(model).expanduser() / "model" / "config.json").is_file():
        hub.resolve(model, weights=False)


def _session(
    model: str, system: str | None, options: dict[str, Any], loading: dict[str, Any]
) -> Session:
    from refrag_lightning.inference.chat.session import Session
    from refrag_lightning.inference.pipeline import RefragPipeline

    return Session(RefragPipeline.from_pretrained(model, **loading), model, system, options)


def _described(session: Session, rate: int | None) -> str:
    """The model in a few words."""
    pipeline = session.pipeline
    reads = "documents as text"
    if pipeline.rows is not None:
        reads = f"{rate or pipeline.tokenizer.compression} tokens a row"
    return f"{session.model_name}, {reads}, on {pipeline.device}"


def _chat_at(console: Console, session: Session, facts: list[tuple[str, str]]) -> None:
    from refrag_lightning.cache import cache_dir
    from refrag_lightning.inference.chat import terminal
    from refrag_lightning.inference.chat.screen import Screen

    screen = Screen(console)
    screen.greet(session, facts)
    try:
        terminal.run(session, screen, history=cache_dir() / "chat" / "history")
    finally:
        session.close()
