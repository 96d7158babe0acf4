"""Citations in answers, worked by hand."""

from refrag_lightning.inference.citations import resolve
from refrag_lightning.inference.prompt import PlacedDocument
from refrag_lightning.text.documents import Document


def placed(name, **fields):
    return PlacedDocument(Document(f"text of {name}", name, f"title of {name}"), "given", **fields)


DOCUMENTS = [placed(name) for name in ("1", "2", "3", "12", "a, b", "py:list")]


def found(answer):
    citations, unknown = resolve(answer, DOCUMENTS)
    return [citation.id for citation in citations], unknown


def test_the_forms_of_citations():
    assert found("It does [2].") == (["2"], ())
    assert found("It does [3][1].") == (["3", "1"], ())
    assert found("It does [1, 3; 12].") == (["1", "3", "12"], ())
    assert found("It does [a, b] and [py:list].") == (["a, b", "py:list"], ())
    assert found("It does [1-3]\u301012\u2020source\u3011.") == (["1", "2", "3", "12"], ())
    assert found("Nothing here.") == ([], ())


def test_unknown_ids_stand_apart():
    assert found("It does [7] [2, 9] [7].") == (["2"], ("7", "9"))


def test_what_is_no_citation():
    assert found("[note] [a] [] [see 2] [-1] [①]") == ([], ())
    assert found("`x[1]` and ```\ny[2] = 3\n``` and [3]") == (["3"], ())
    # An open fence lasts until the end.
    assert found("so:\n```py\nz[1]") == ([], ())


def test_a_citation_says_where_it_stands_and_comes_from():
    passage = PlacedDocument(
        Document("It flows.", "4", "Seine"),
        "searched",
        document_id="rivers.md",
        passage_id="rivers.md#2",
        source="docs/rivers.md",
        start=100,
    )
    answer = "Yes [4], it flows [4]."
    [citation], unknown = resolve(answer, [placed("4"), passage])
    assert unknown == ()
    assert [answer[start:end] for start, end in citation.mentions] == ["[4]", "[4]"]
    assert citation.mentions[0][0] == 4
    assert (citation.document_id, citation.passage_id) == ("rivers.md", "rivers.md#2")
    assert (citation.source, citation.title) == ("docs/rivers.md", "Seine")
    assert (citation.start, citation.end, citation.text) == (100, 109, "It flows.")
    assert citation.as_dict()["mentions"] == [[4, 7], [18, 21]]
