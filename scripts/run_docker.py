"""Build the image of this checkout and run the command line in it; `--help` lists the options.

python scripts/run_docker.py -- fit --config configs/align.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

# The package lies beside this folder, and does not have to be installed on the machine.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refrag_lightning.launch.docker import main

if __name__ == "__main__":
    sys.exit(main())
