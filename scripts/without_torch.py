"""Print a hashed requirements file without torch and what only its CUDA build needs, for use with a CPU build."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CUDA_ONLY = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")


def main() -> None:
    """Leave out each block (a requirement with its hash lines) that CUDA_ONLY matches."""
    keep = True
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            keep = not CUDA_ONLY.match(line)
        if keep:
            print(line)


if __name__ == "__main__":
    main()
