"""`ray job submit --working-dir . -- python jobs/tune.py CONFIG.yaml [key.path=value ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

# the job's working folder holds the package, whether or not it is installed on the cluster's nodes
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> NoReturn:
    """Search on the cluster that runs this job: the same command as `lepton-ray tune`."""
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.argv[1:1] = ["tune"]
    from lepton_ray.cli.main import main as cli

    cli()


if __name__ == "__main__":
    main()
