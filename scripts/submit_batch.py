"""Send a run to AWS Batch; the work is done in `refrag_lightning.launch.batch_command`."""

from __future__ import annotations

import sys
from pathlib import Path

# The package lies beside this folder; an installed one would send another checkout's rules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refrag_lightning.launch.batch_command import main

if __name__ == "__main__":
    sys.exit(main())
