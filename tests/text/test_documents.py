from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refrag_lightning.text.documents import (
    Document,
    DocumentSyntaxError,
    escape,
    find_citations,
    format,
    parse,
    unescape,
)
from tests.strategies import parts, texts


@given(parts())
@example([Document("</doc><doc id='2'>", id="\"'", title='a\n"b" & <doc></doc>')])
@example(["&lt;doc", Document("&amp;lt;/doc", id="&quot;"), "&amp;amp;lt;doc"])
@example(["<", Document("<", id="<"), "<", Document("&", id="&amp;lt;"), "/doc>"])
def test_parse_undoes_format(x):
    assert parse(format(x)) == x
    assert parse(format(x), strict=False) == x


@given(texts())
@example("<doc")
@example("</doc")
@example("&" + "amp;" * 5 + "lt;doc")
def test_every_string_round_trips_as_text_title_and_id(x):
    assert parse(format([x])) == ([x] if x else [])
    assert unescape(escape(x)) == x
    document = Document(x, id=x or "1", title=x, attributes={"source": x})
    assert parse(format([document])) == [document]


@given(texts())
def test_not_strict_takes_every_text(x):
    texts_and_documents = parse(x, strict=False)
    kept = sum(len(part if isinstance(part, str) else part.text) for part in texts_and_documents)
    assert kept <= len(x)
    assert parse(format(texts_and_documents)) == texts_and_documents


def test_only_what_could_be_a_tag_is_escaped():
    assert escape("a < b && c &lt; <p>&amp;</p> &lt;div") == "a < b && c &lt; <p>&amp;</p> &lt;div"
    assert escape("<doc> </doc> &lt;doc &amp;lt;/doc") == (
        "&lt;doc> &lt;/doc> &amp;lt;doc &amp;amp;lt;/doc"
    )


@pytest.mark.parametrize("text", ["", " ", "no tags", "a < b", "<docs>", "x <DOC> <document>", "&"])
def test_text_without_tags_is_one_string(text):
    assert parse(text) == ([text] if text else [])


@pytest.mark.parametrize(
    ("tag", "id", "title", "attributes"),
    [
        ('<doc id="7" title="Rivers">', "7", "Rivers", {}),
        ("<doc title='Rivers' id='7'>", "7", "Rivers", {}),
        ("<doc id=7 title=Rivers>", "7", "Rivers", {}),
        ("<doc id=1>", "1", "", {}),
        ("<doc>", "1", "", {}),
        ("<doc >", "1", "", {}),
        ('<doc id="">', "1", "", {}),
        ("<doc id>", "1", "", {}),
        ("<doc title='only a title'>", "1", "only a title", {}),
        ('<doc\n\tid = "7"\n  title\n=\n"a\nb"\n>', "7", "a\nb", {}),
        (
            '<doc url=https://x.org/a?b id=7 lang="en" draft>',
            "7",
            "",
            {"url": "https://x.org/a?b", "lang": "en", "draft": ""},
        ),
        ("<doc id=7/>", "7/", "", {}),
        ('<doc id=\'say "hi"\' title="it\'s">', 'say "hi"', "it's", {}),
        ('<doc id="a>b" title="&quot;&lt;&gt;&#39;&amp;quot;">', "a>b", "\"<>'&quot;", {}),
    ],
)
def test_attributes(tag, id, title, attributes):
    assert parse(f"{tag}text</doc>") == [Document("text", id, title, attributes)]


def test_white_space_is_kept_inside_and_outside():
    assert parse(" a \n<doc>\n b\t </doc >\r\n ") == [" a \n", Document("\n b\t ", "1"), "\r\n "]
    assert parse("<doc></doc><doc> </doc>") == [Document("", "1"), Document(" ", "2")]


def test_missing_ids_are_numbered_by_position():
    text = "<doc>a</doc><doc id=x>b</doc><doc>c</doc>"
    assert parse(text) == [Document("a", "1"), Document("b", "x"), Document("c", "3")]
    assert parse(text, first_number=5)[2] == Document("c", "7")
    assert format([Document("a"), "-", Document("b")]) == (
        '<doc id="1">a</doc>-<doc id="2">b</doc>'
    )


@pytest.mark.parametrize(
    ("text", "message", "line", "column"),
    [
        ("a\n <doc id=1>b", "<doc> is never closed", 2, 2),
        ("<doc>a</doc>\n\n<doc>", "<doc> is never closed", 3, 1),
        ("<doc>a\nb <doc>c</doc></doc>", "<doc> inside a document that is not closed", 2, 3),
        ("a\nb</doc>", "stray </doc>", 2, 2),
        ("<doc>a</doc></doc>", "stray </doc>", 1, 13),
        ("a <doc id='1>b</doc>", "malformed <doc> tag", 1, 3),
        ("\n\n  <doc id=<doc>>b</doc>", "malformed <doc> tag", 3, 3),
        ("<doc 7>b</doc>", "malformed <doc> tag", 1, 1),
        ("<doc>a</doc\n", "malformed </doc> tag", 1, 7),
        ("<doc>a</doc id=1>", "malformed </doc> tag", 1, 7),
        ("see <doc", "malformed <doc> tag", 1, 5),
        ("<doc id=1\n id=2>b</doc>", "<doc> has 'id' twice", 1, 1),
        ("é👍\n👍<doc a=1 b a>b</doc>", "<doc> has 'a' twice", 2, 2),
    ],
)
def test_errors_give_line_and_column(text, message, line, column):
    with pytest.raises(DocumentSyntaxError) as caught:
        parse(text)
    assert str(caught.value) == f"{message} at line {line}, column {column}"
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <doc id=1>b", ["a <doc id=1>b"]),
        ("a</doc> b", ["a</doc> b"]),
        ("<doc>a <doc id=x>b</doc> c</doc>", ["<doc>a ", Document("b", "x"), " c</doc>"]),
        ("<doc 7>b</doc> <doc>c</doc>", ["<doc 7>b</doc> ", Document("c", "1")]),
        ("<doc a=1 a=2>b</doc>", ["<doc a=1 a=2>b</doc>"]),
        ("<doc>a</doc", ["<doc>a</doc"]),
        # A value does not run over the next tag.
        ('<doc a="<doc>b</doc>"', ['<doc a="', Document("b", "1"), '"']),
        ('<doc a="<doc>b</doc>">c</doc>', ['<doc a="', Document("b", "1"), '">c</doc>']),
        ("<doc>a</doc x>b</doc>", [Document("a</doc x>b", "1")]),
    ],
)
def test_not_strict_keeps_broken_tags_as_text(text, expected):
    assert parse(text, strict=False) == expected


@pytest.mark.parametrize("name", ["id", "title", "", "a b", "a=", "7", "<doc", 'a"'])
def test_format_refuses_attribute_names_that_parse_could_not_read(name):
    with pytest.raises(ValueError, match="cannot be the name"):
        format([Document("a", attributes={name: "x"})])


@pytest.mark.parametrize(
    "fragment", ["<doc", "<doc <doc ", '<doc a="', "amp;", "</doc>", "<doc>a</doc>", " "]
)
def test_time_is_linear_in_the_length_whatever_the_text_is(fragment):
    # CPU time: the bounds hold on a busy machine too.
    prefix = {"amp;": "&", " ": "<doc a="}.get(fragment, "")
    whole = fragment.endswith("</doc>") and fragment.startswith("<doc>")
    seconds = []
    for size in (1_000_000, 10_000_000):
        text = prefix + fragment * (size // len(fragment))
        start = time.process_time()
        parsed = parse(text, strict=False)
        assert whole or parsed == [text]
        escaped = escape(text)
        assert unescape(escaped) == text
        seconds.append(time.process_time() - start)
        if whole:
            continue
        start = time.process_time()
        try:
            parse(text)
        except DocumentSyntaxError:
            assert time.process_time() - start < 1
    assert seconds[1] < 8
    assert seconds[1] < 30 * max(seconds[0], 0.02)


IDS = ["1", "2", "3", "12", "a, b", "py:list", "x[1]", "[draft] notes", "A]", "1–9", "two words"]


def cited(answer, ids=IDS):
    return [(answer[start:end], list(names)) for start, end, names in find_citations(answer, ids)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It does [2].", [("[2]", ["2"])]),
        ("[3][1]", [("[3]", ["3"]), ("[1]", ["1"])]),
        ("[ 1,3; 12 ]", [("[ 1,3; 12 ]", ["1", "3", "12"])]),
        ("[1-3] [2 – 2], [1—2]", [("[1-3]", [*"123"]), ("[2 – 2]", ["2"]), ("[1—2]", [*"12"])]),
        ("[1, 2-3, 3]", [("[1, 2-3, 3]", ["1", "2", "3"])]),
        ("是【1】。【2†L5-L9】", [("【1】", ["1"]), ("【2†L5-L9】", ["2"])]),
        (
            "【1、2】［３］【1，１２】",
            [("【1、2】", [*"12"]), ("［３］", ["3"]), ("【1，１２】", ["1", "12"])],
        ),
        ("[[1]] and [[1], 2]", [("[[1]]", ["1"]), ("[1]", ["1"])]),
        # Ids that hold brackets, commas, dashes, spaces; the longest one is meant.
        ("[a, b] [two words]", [("[a, b]", ["a, b"]), ("[two words]", ["two words"])]),
        ("[x[1]] [x[1], 1]", [("[x[1]]", ["x[1]"]), ("[x[1], 1]", ["x[1]", "1"])]),
        ("[[draft] notes] [A]]", [("[[draft] notes]", ["[draft] notes"]), ("[A]]", ["A]"])]),
        ("[1–9]", [("[1–9]", ["1–9"])]),
        # Ids that no document has, beside one that there is, or numbers.
        ("[2, 9] [7]", [("[2, 9]", [*"29"]), ("[7]", ["7"])]),
        ("[other, 2]", [("[other, 2]", ["other", "2"])]),
        ("[2-4]", [("[2-4]", ["2", "3", "4"])]),
        # Numbers that are all of one width.
        ("[01] [09-11]", [("[01]", ["01"]), ("[09-11]", ["09", "10", "11"])]),
    ],
)
def test_citations_are_found(answer, expected):
    assert cited(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "[note] [a] [] [ , ] [see 2] [-1] [①] [1",
        "[1\n] 【1] [2】 [1.5] [3-1] [1-] [1-2-3]",
        "[1-99999] [" + "9" * 5000 + "-" + "9" * 5000 + "]",
        "`x[1]` and ```\ny[2] = 3\n```",
        "so:\n```py\nz[1]",
    ],
    ids=["words", "unclosed", "long ranges", "code", "open fence"],
)
def test_what_is_no_citation(answer):
    assert cited(answer) == []


@given(texts(), st.lists(st.text(min_size=1, max_size=5), max_size=4))
def test_citations_of_any_id_are_found_in_any_text(text, ids):
    for start, end, names in find_citations(text, ids):
        assert 0 <= start < end <= len(text) and names
    for name in ids:
        if name.strip() and not set(name) & set("`~") and ids == [name]:
            ((start, end, names),) = find_citations(f"x [{name}]", ids)
            assert (start, end, names) == (2, 4 + len(name), (name,))


def test_citations_take_linear_time():
    def seconds(count):
        begun = time.process_time()
        find_citations("[[" * count + "[1" * count + "[1, " + "x" * count + "," * count, ["1"])
        return time.process_time() - begun

    seconds(1000)
    assert seconds(40_000) < 8 * seconds(10_000) + 0.2
