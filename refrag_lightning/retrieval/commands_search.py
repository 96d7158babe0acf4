"""The subcommand `index evaluate`: how often search finds the passage that holds the answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from refrag_lightning.cache import write_text
from refrag_lightning.retrieval.search import Method

if TYPE_CHECKING:
    from refrag_lightning.retrieval.dense import Embedder
    from refrag_lightning.retrieval.recall import Recall


def index_evaluate(
    index: str,
    questions: list[str],
    model: str | None = None,
    embedder: str | None = None,
    methods: list[Method] | None = None,
    ks: list[int] = [1, 5, 10],  # noqa: B006 - the command line shows it as the default
    language: str = "english",
    limit: int | None = None,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """Measures search: recall of the gold passages of questions over everything in an index.

    Args:
        index: The index's folder or address.
        questions: JSON lines files or patterns, gzipped or not, of `id, question, answers,
            passages`; a passage has `text`, `gold` and perhaps `id` and `title`. The index must
            hold these passages; they are recognised by equal texts, or by id and title.
        model: The model whose encoder gave the index its vectors, for dense search.
        embedder: The embedding model that gave the index its vectors, if it was another one.
        methods: Any of bm25, dense and fused; by default all three with a model or an embedder,
            bm25 alone without.
        ks: How many hits count.
        language: Of the passages, for bm25: a language of PyStemmer, or none.
        limit: Most questions.
        device: Where dense vectors are computed, such as cuda.
        out: A JSON file for the results, beside the table that is printed.
    """
    from refrag_lightning.data.questions import JsonLinesQuestions
    from refrag_lightning.retrieval.loading import load_models
    from refrag_lightning.retrieval.recall import gold_questions, recall_at
    from refrag_lightning.retrieval.search import Searcher
    from refrag_lightning.retrieval.store import PassageStore

    dense = model is not None or embedder is not None
    if methods is None:
        methods = ["bm25", "dense", "fused"] if dense else ["bm25"]
    if not dense and (needing := [method for method in methods if method != "bm25"]):
        raise ValueError(
            f"methods {needing} need --model or --embedder, for the questions' vectors"
        )
    store = PassageStore.open(index)
    rows = list(JsonLinesQuestions(questions, limit=limit).questions("train"))
    embed = None
    if set(methods) != {"bm25"}:
        wanted = None if embedder is not None else model
        embed = load_models(wanted, embedder=embedder, device=device).embedder
    golden = gold_questions(store.passages(), rows)
    results = []
    for method in methods:
        searcher = Searcher(store, method, embed, language=language)
        results.append(recall_at(searcher, golden, ks))
    _print(results)
    if out is not None:
        write_text(out, json.dumps(_as_json(results, embed), indent=2) + "\n")


def _print(results: list[Recall]) -> None:
    from rich.console import Console
    from rich.table import Table

    from refrag_lightning.evaluation.gap import MIN_GROUPS

    ks = list(results[0].at)
    table = Table("method", *(f"recall@{k}" for k in ks), f"MRR@{max(ks)}", "ms each")
    for result in results:
        intervals = [*result.at.values(), result.mean_reciprocal_rank]
        table.add_row(
            result.method,
            *(f"{i.value:.3f}" + f"\n{i.low:.2f} to {i.high:.2f}" * i.known for i in intervals),
            f"{1000 * result.seconds_per_question:.1f}",
        )
    console = Console()
    console.print(table)
    first = results[0]
    line = f"questions: {first.num_questions}; "
    if intervals[0].known:
        line += "95 % intervals of the bootstrap over questions"
        if first.num_groups < first.num_questions:
            line += f" in {first.num_groups} sets with the same gold passages"
    else:
        line += f"too few for intervals, which need {MIN_GROUPS} on different gold passages"
    if first.num_without_gold:
        line += f"; {first.num_without_gold} without a gold passage left out"
    if first.num_not_indexed:
        line += f"; {first.num_not_indexed} with a gold passage that is not in the index"
    console.print(line, soft_wrap=True)


def _as_json(results: list[Recall], embed: Embedder | None) -> dict[str, object]:
    from refrag_lightning.evaluation.report import plain

    rows = []
    for result in results:
        row = asdict(result)
        row["at"] = {str(k): plain(interval) for k, interval in result.at.items()}
        row["mean_reciprocal_rank"] = plain(result.mean_reciprocal_rank)
        rows.append(row)
    return {"embedder": embed.name if embed is not None else None, "results": rows}
