"""Look for runs of 13 words that training texts share with test texts, and leave them out.

Files are JSON lines, gzipped or not: of `text` (passages or books) or of `passages` (questions). Of
a training file every passage counts, distractors too; of a test file the gold ones. Prints a table.

    python scripts/check_overlap.py train/*.jsonl.gz --against dev.jsonl.gz books_test.jsonl.gz
    python scripts/check_overlap.py train/*.jsonl.gz --against dev.jsonl.gz --clean FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package lies beside this folder; it need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refrag_lightning.cache import write_text
from refrag_lightning.data.overlap import OverlapCheck, table
from refrag_lightning.plain_text import say


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", nargs="+", help="training files")
    parser.add_argument("--against", nargs="+", required=True, metavar="TEST", help="test files")
    parser.add_argument("--words", type=int, default=13, help="words of a run (default: 13)")
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    parser.add_argument(
        "--clean",
        type=Path,
        metavar="FOLDER",
        help="write copies of the training files there, without the passages, paragraphs and "
        "questions that share a run",
    )
    options = parser.parse_args(args)
    try:
        check = OverlapCheck(options.against, options.words)
        text = table((file, check.overlaps(file)) for file in options.train)
        say(text)
        if options.table is not None:
            write_text(options.table, text + "\n")
        if options.clean is not None:
            options.clean.mkdir(parents=True, exist_ok=True)
            for file in options.train:
                path = options.clean / Path(file).name
                records, left_out = check.write_clean(file, path)
                say(f"{path}: {records - left_out} of {records} records")
    except (OSError, ValueError) as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
