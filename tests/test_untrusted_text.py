"""Nothing that a terminal obeys or nobody sees passes a command or a Markdown file."""

import io
import json
import logging
import warnings

import pytest
import yaml
from rich.console import Console

from refrag_lightning.cli import main
from refrag_lightning.evaluation.report import Report, Table
from refrag_lightning.inference.card import CardFacts, model_card
from refrag_lightning.inference.chat.screen import Screen
from refrag_lightning.inference.chat.session import Session, Turn
from refrag_lightning.inference.chat.transcript import as_dict, as_markdown
from refrag_lightning.inference.history import History, Stage
from refrag_lightning.launch.chain import Chain
from refrag_lightning.text.documents import Document
from tests.inference.chat.scripted import scripted_decoder
from tests.untrusted import EVERYTHING, PROBES, harmful

# What a command line can hold: no byte 0, and no half of a character but those that stand for bytes
# that are not UTF-8.
WORD = EVERYTHING + "\udcff"
HTML = "<script>x</script> | ![p](http://evil/?q) [a](javascript:x) `c`\n# Heading\n"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index whose documents are probes, and a file of questions on them."""
    folder = tmp_path_factory.mktemp("index")
    texts = {name: probe for name, probe in PROBES.items() if name != "surrogate"}
    rows = [
        {"id": f"{name}{probe}", "title": f"T{probe}", "text": f"river {name} {probe} end"}
        for name, probe in texts.items()
    ]
    docs = folder / "docs"
    docs.mkdir()
    (docs / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (docs / f"x{PROBES['clear']}.txt").write_text("a river in a file with a name")
    (docs / f"y.{PROBES['clear']}").write_text("of no kind")
    questions = [
        {"id": f"q{PROBES['title']}", "question": "river", "answers": ["x"],
         "passages": [{"text": row["text"], "title": row["title"], "gold": True}]}
        for row in rows
    ]  # fmt: skip
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def said(capsys, *arguments):
    """What a command prints and warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    return captured.out, captured.err + "".join(str(warning.message) for warning in told)


def test_every_index_command(index, capsys):
    out, err = said(capsys, "index", "build", "--index", index / "i", "--paths", index / "docs")
    assert "left out" in err and not harmful(out + err)
    for words in (
        ["search", "--question", "river", "--top_k", "99"],
        ["info"],
        ["verify"],
        ["evaluate", "--questions", index / "q.jsonl"],
    ):
        out, err = said(capsys, "index", words[0], "--index", index / "i", *words[1:])
        assert out and not harmful(out + err), words[0]
    search = ["index", "search", "--index", index / "i", "--question", "river", "--top_k", "99"]
    out, _ = said(capsys, *search)
    # Each hit has two lines, whatever its title holds.
    assert len(out.splitlines()) == 2 * len(PROBES)


def test_json_is_shown_without_harm_and_loses_nothing(index, capsys):
    said(capsys, "index", "build", "--index", index / "j", "--paths", index / "docs")
    out, _ = said(
        capsys, "index", "search", "--index", index / "j", "--question", "river", "--top_k", "99",
        "--json", "true",
    )  # fmt: skip
    assert not harmful(out)
    ids = {json.loads(line)["passage"]["document_id"] for line in out.splitlines()}
    assert {f"{name}{probe}" for name, probe in PROBES.items() if name != "surrogate"} <= ids
    assert not harmful(said(capsys, "index", "info", "--index", index / "j", "--json", "true")[0])


SAYS = "\x1b]0;own\x07 \x9b2J \u202ex"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A causal language model that answers every chat with escape sequences."""
    return scripted_decoder(tmp_path_factory.mktemp("decoder"), SAYS)


def test_an_answer_printed_by_generate_and_by_chat(decoder, capsys):
    words = ["--model", decoder, "--max_new_tokens", "40"]
    generated, _ = said(capsys, "generate", *words, "--prompt", "Where?", "--chat", "true")
    chatted, _ = said(capsys, "chat", *words, "--question", "Where?")
    assert generated == chatted == "]0;own 2J x\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [WORD],
        ["--" + WORD, "x"],
        ["index", WORD],
        ["index", "search", "--index", WORD, "--question", "x"],
        ["index", "info", "--index", WORD],
        ["index", "build", "--index", "i", "--paths", WORD],
        ["index", "build", "--index", "i", "--paths", f"hub:@{WORD}"],
        ["index", "build", "--index", "i", "--" + WORD, "x"],
        ["index", "verify", "--index", WORD],
        ["index", "evaluate", "--index", WORD, "--questions", WORD],
        ["generate", "--model", WORD, "--prompt", "x"],
        ["chat", "--model", WORD, "--question", "x"],
        ["chain", "--file", WORD, "--out", "x"],
        ["export", "--source", WORD],
        ["fit", "--config", WORD],
        ["fit", "--model", WORD],
        ["hello", "--" + WORD, "x"],
        ["hello", "--name", WORD],
    ],
    ids=lambda arguments: "-".join(a for a in arguments if a.isascii() and a.isprintable()),
)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["short", "debug"])
def test_error_lines_of_every_command(arguments, debug, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*arguments, *debug])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith("error: ") and not harmful(captured.out + captured.err)
    assert sum(line.startswith("error: ") for line in lines) == 1


def test_warnings_and_log_records_of_others(monkeypatch, capsys):
    def run(arguments):
        warnings.warn(EVERYTHING, stacklevel=1)
        logging.getLogger("somebody").warning("a file %s", EVERYTHING)

    monkeypatch.setattr("refrag_lightning.cli_functions.run", run)
    handler = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger("somebody").addHandler(handler)
    before = warnings.showwarning, logging.getLogRecordFactory()
    out, err = said(capsys, "chain")
    logging.getLogger("somebody").removeHandler(handler)
    assert "owned" in err and "owned" in stream.getvalue()
    assert not harmful(out + err + stream.getvalue())
    assert before == (warnings.showwarning, logging.getLogRecordFactory())


def test_reports_cards_and_results_of_chains(tmp_path):
    text = f"{HTML}{EVERYTHING}"
    table = Table(text, ["reading", text], [[text, 0.5], ["x", text]], notes=[text])
    report = Report(text, {text: text}, [table])
    assert not harmful(report.text()) and not harmful("".join(map("".join, table.cells())))
    history = History(
        stages=[
            Stage(text, text, text, began_from=text, options={"lr": text}, figures={text: 1.0})
        ],
        reports=[{"title": text, "settings": {text: text}, "tables": {text: table.data()}}],
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": text, "architectures": [text]}))
    card = model_card(CardFacts(tmp_path, text, history, license=text, base=text, notes=[text]))
    (tmp_path / "chain.yaml").write_text(
        yaml.safe_dump({"title": text, "stages": {"one": "test --x 1"}})
    )
    results = Chain(tmp_path / "chain.yaml", tmp_path / "out", {}).results()
    for written in (report.markdown(), card.partition("\n---\n")[2], results):
        assert is_inert(written)
    assert not harmful(card)
    # A table keeps its shape.
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 4


def test_a_transcript_and_the_screen(decoder):
    class Pipeline:
        device = "cpu"

    session = Session(Pipeline(), f"m{HTML}{EVERYTHING}", HTML + EVERYTHING)
    session.add([Document(EVERYTHING + HTML, title=HTML + EVERYTHING)])
    for answer in (
        HTML + EVERYTHING, "```\nunclosed\n" + EVERYTHING, "![x](http://evil)", "[x](data:text,y)",
        "<!--", "> q\n\n## Where?\n\nyes", "`````\n<b>",
    ):  # fmt: skip
        session.turns.append(Turn(f"Why?\n{HTML}{EVERYTHING}", [], answer))
    written = as_markdown(session)
    assert is_inert(written)
    # Nothing in an answer makes a heading of the file's own.
    headings = [line for line in written.splitlines() if line.startswith("#")]
    assert len(headings) == 1 + len(session.turns)
    assert as_dict(session)["turns"][0]["answer"] == HTML + EVERYTHING
    screen = Screen(Console(file=(shown := io.StringIO()), width=100))
    screen.greet(session, [("model", EVERYTHING)])
    screen.note(EVERYTHING)
    screen.error(ValueError(EVERYTHING))
    screen.error(FileNotFoundError(2, "No such file", WORD))
    screen.documents(session)
    screen.documents(session, "1")
    for turn in session.turns:
        screen.summary(turn)
    assert not harmful(shown.getvalue())


def is_inert(markdown):
    """Whether nothing of a Markdown text is harmful, is HTML, or loads or runs something."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    parser.validateLink = lambda address: True
    tokens = parser.parse(markdown)
    tokens += [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in tokens}
    links = [str(t.attrs["href"]) for t in tokens if t.type == "link_open"]
    return (
        not harmful(markdown)
        and not kinds & {"html_block", "html_inline", "image"}
        and all(link.startswith("http") for link in links)
    )
