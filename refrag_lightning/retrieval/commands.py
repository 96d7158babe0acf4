"""The subcommands `index build`, `index search`, `index info` and `index verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from refrag_lightning.cache import write_text
from refrag_lightning.plain_text import as_json, one_line, say
from refrag_lightning.retrieval.search import Method

if TYPE_CHECKING:
    from refrag_lightning.retrieval.build import BuildReport
    from refrag_lightning.retrieval.search import Hit
    from refrag_lightning.retrieval.verify import Comparison


def index_build(
    index: str,
    paths: list[str],
    model: str | None = None,
    rates: list[int] | None = None,
    words: int = 100,
    overlap: int = 0,
    embedder: str | None = None,
    text_field: str = "text",
    title_field: str = "title",
    id_field: str = "id",
    follow_links: bool = False,
    max_mb: float = 64,
    batch_tokens: int = 16_384,
    device: str = "cpu",
    allow_base_mismatch: bool = False,
    keep_others: bool = False,
    prune: bool = False,
    out: str | None = None,
) -> None:
    """Makes an index of documents, or brings one up to date: only what changed is computed.

    It can be killed at any moment; run again, it goes on.

    Args:
        index: The index's folder, or its address such as s3://bucket/index.
        paths: The documents: files (.txt, .md, .html, .jsonl, .jsonl.gz), folders, patterns,
            hub:NAME (or hub:NAME@CONFIG#SPLIT) for a data set of the Hub, or pydoc for the Python
            language reference. What the index holds of others goes.
        model: A model folder or run folder, whose encoder gives the row states. Without one the
            index is only searched, and rows are encoded when they are needed.
        rates: The compressions that row states are stored for; the model's own by default.
        words: Most words of a passage, which ends with a sentence where it can; 0 keeps documents
            whole.
        overlap: Words that a passage repeats of the one before.
        embedder: What gives the vectors of dense search: the name of an embedding model, or none;
            the model's encoder by default.
        text_field: Where rows of JSON lines and data sets keep the text, or a list of passages; a
            dot steps into a nested field.
        title_field: Where they keep the title, if they have one.
        id_field: Where they keep the id, if they have one.
        follow_links: Read what links in folders point to outside of them, too.
        max_mb: Most MB of a document: of a file of text, or a line of JSON lines.
        batch_tokens: Encoder tokens of a batch, about.
        device: Where to compute, such as cuda.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
        keep_others: Leave what the index holds of other documents.
        prune: Remove row states at other rates and of other encoders, and vectors of other
            embedders.
        out: A JSON file for the figures that are printed.
    """
    from refrag_lightning.retrieval.build import build_index
    from refrag_lightning.retrieval.info import index_info as info_of
    from refrag_lightning.retrieval.store import PassageStore

    report = build_index(
        index,
        paths,
        model,
        rates=rates,
        words=words,
        overlap=overlap,
        embedder=embedder,
        text_field=text_field,
        title_field=title_field,
        id_field=id_field,
        follow_links=follow_links,
        max_mb=max_mb,
        batch_tokens=batch_tokens,
        device=device,
        allow_base_mismatch=allow_base_mismatch,
        keep_others=keep_others,
        prune=prune,
    )
    num_bytes = info_of(PassageStore.open(index)).bytes
    _print_build(index, report, num_bytes)
    if out is not None:
        figures = asdict(report) | {
            "passages_per_second": report.passages_per_second,
            "bytes": num_bytes,
        }
        _write(out, figures)


def index_search(
    index: str,
    question: str,
    method: Method | None = None,
    model: str | None = None,
    embedder: str | None = None,
    top_k: int = 5,
    language: str = "english",
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Prints the passages of an index that are found for a question, the best first.

    Args:
        index: The index's folder or address.
        question: What to search for.
        method: Words (bm25), vectors (dense) or both (fused); fused where a model or an embedder
            is given, else bm25.
        model: The model whose encoder gave the index its vectors, for dense and fused.
        embedder: The embedding model that gave them, if it was another one.
        top_k: Passages at most.
        language: Of the passages, for bm25: a language of PyStemmer, or none.
        device: Where the question's vector is computed, such as cuda.
        json: Print a line of JSON for each passage.
    """
    from refrag_lightning.retrieval.loading import load_models
    from refrag_lightning.retrieval.search import Searcher
    from refrag_lightning.retrieval.store import PassageStore

    store = PassageStore.open(index)
    if method is None:
        method = "fused" if model is not None or embedder is not None else "bm25"
    embed = None
    if method != "bm25":
        if model is None and embedder is None:
            raise ValueError(f"method {method} needs --model or --embedder, for the vectors")
        wanted = None if embedder is not None else model
        embed = load_models(wanted, embedder=embedder, device=device).embedder
    searcher = Searcher(store, method, embed, language=language)
    (hits,) = searcher.search([question], k=top_k)
    _print_hits(hits, in_json=json)


def index_info(index: str, json: bool = False) -> None:
    """Says what an index holds.

    Args:
        index: The index's folder or address.
        json: Print it as JSON.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from refrag_lightning.retrieval.info import index_info as info_of
    from refrag_lightning.retrieval.store import PassageStore

    info = info_of(PassageStore.open(index))
    if json:
        say(_dumps(asdict(info)))
        return
    say(
        f"{info.uri}: {info.documents:,} documents, {info.passages:,} passages "
        f"({info.characters:,} characters), {_size(info.bytes)}"
    )
    if info.settings:
        say(f"split at {info.settings['words']} words, overlap {info.settings['overlap']}")
    table = Table("what", "of", "texts", "missing", "on disk")
    for states in info.states:
        about = states.settings
        table.add_row(
            f"row states at {about['compression']}",
            Text(one_line(f"{about['encoder']}, {about['pooling']}, context {about['context']}")),
            f"{states.texts:,}",
            f"{states.missing:,}",
            _size(states.bytes),
        )
    for vectors in info.vectors:
        table.add_row(
            f"vectors of {vectors.size}",
            Text(one_line(vectors.name or vectors.key)),
            f"{vectors.texts:,}",
            f"{vectors.missing:,}",
            _size(vectors.bytes),
        )
    if info.states or info.vectors:
        Console().print(table)
    else:
        say("neither row states nor vectors: it is searched by words alone")


def index_verify(
    index: str,
    model: str | None = None,
    rates: list[int] | None = None,
    embedder: str | None = None,
    batch_tokens: int = 16_384,
    device: str = "cpu",
    allow_base_mismatch: bool = False,
    out: str | None = None,
) -> None:
    """Compares everything in an index with what a model gives now; fails if something differs.

    Args:
        index: The index's folder or address.
        model: The model that the index was built with. Without one no row states are compared.
        rates: The compressions to compare; the model's own by default.
        embedder: The embedding model whose vectors to compare, or none; the model's encoder by
            default.
        batch_tokens: Encoder tokens of a batch, about.
        device: Where to compute, such as cuda.
        allow_base_mismatch: Warn, instead of refusing, where a base model is not the one that the
            folder was trained on.
        out: A JSON file for the figures that are printed.
    """
    from refrag_lightning.retrieval.verify import verify_index

    report = verify_index(
        index,
        model,
        rates=rates,
        embedder=embedder,
        batch_tokens=batch_tokens,
        device=device,
        allow_base_mismatch=allow_base_mismatch,
    )
    problems = report.problems()
    say(f"{report.passages:,} passages")
    _print_comparisons(report.comparisons)
    if out is not None:
        _write(out, asdict(report) | {"problems": problems})
    if problems:
        raise ValueError(f"the index {index!r} is not right: {'; '.join(problems)}")
    say("all of it is right")


def _print_build(index: str, report: BuildReport, num_bytes: int) -> None:
    say(
        f"{report.read:,} documents: {report.added:,} new, {report.changed:,} changed, "
        f"{report.kept:,} as before; {report.removed:,} removed"
    )
    say(f"{report.passages:,} passages, {_size(num_bytes)} in {index}")
    if report.encoded:
        say(
            f"row states of {report.encoded:,} texts in {report.encoding_seconds:.1f} s, "
            f"{report.passages_per_second:,.0f} a second"
        )
    if report.embedded:
        say(f"vectors of {report.embedded:,} texts in {report.embedding_seconds:.1f} s")
    if not report.encoded and not report.embedded:
        say("nothing had to be computed")
    if report.lost:
        say(
            f"of {report.lost:,} texts the encoder's tokenizer cannot read more than 1 % of the "
            "characters"
        )


def _print_hits(hits: list[Hit], *, in_json: bool) -> None:
    if in_json:
        for hit in hits:
            say(as_json(asdict(hit)))
        return
    if not hits:
        say("nothing was found")
    for hit in hits:
        title = f"  {one_line(hit.passage.title)}" if hit.passage.title else ""
        ranks = ", ".join(f"{name} {rank}" for name, rank in hit.ranks.items())
        say(f"{hit.rank}. {one_line(hit.passage.id)}{title}  ({hit.score:.4g}; {ranks})")
        say(f"   {one_line(hit.passage.text)}")


def _print_comparisons(comparisons: list[Comparison]) -> None:
    for each in comparisons:
        say(
            f"{each.what}: {each.compared:,} texts compared, {each.different:,} different, "
            f"{each.missing:,} missing, {each.orphans:,} of no passage, {each.doubles:,} doubled; "
            f"{100 * each.equal:.2f} % of the numbers the same to the bit, the largest difference "
            f"{each.largest:.2g}"
        )


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def _write(file: str, value: dict[str, Any]) -> None:
    write_text(file, _dumps(value) + "\n")


def _dumps(value: Any) -> str:
    return as_json(value, indent=2)
