"""Files as documents of a chat."""

from __future__ import annotations

from collections.abc import Sequence

from refrag_lightning.text.documents import Document


def attached(paths: Sequence[str]) -> list[Document]:
    """Reads documents that shall stand in the prompt as they are, none of them left out.

    Args:
        paths: Files, folders, patterns and data sets, as `index build` takes them.

    Returns:
        The documents, with where they were read as the attribute `source`, and their file's name
        as the title where they have none.

    Raises:
        ValueError: A file cannot be read as text, or there is no document.
        OSError: A file is not there.
    """
    from refrag_lightning.retrieval.sources import read_documents

    documents = [
        Document(
            found.text,
            title=found.title or found.source.rpartition("/")[2],
            attributes={"source": found.source},
        )
        for found in read_documents(paths)
    ]
    if not documents:
        raise ValueError(f"there is no document in {', '.join(paths)}")
    return documents
