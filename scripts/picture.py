"""Draw docs/images/demo.svg, the terminal of a real run of the main job, and docs/images/report.png from its report.

    python scripts/picture.py [STORE]

Runs `lepton-ray demo` into STORE (default: a temporary folder) and draws what it printed, unchanged but for the
progress lines between the first and the last. The picture of the report needs Chromium on PATH; without it only the
terminal is drawn, and that is said.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEPS = {"data", "ray", "training", "publish", "deploy", "requests", "metrics", "report"}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def run_demo(store: str) -> list[str]:
    """The lines of a real run."""
    command = [sys.executable, "-m", "lepton_ray.cli", "demo", "--store", store]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout.splitlines()


def draw_terminal(lines: list[str], store: str) -> None:
    """Write demo.svg."""
    console = Console(record=True, width=112, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for the length of this script
    console.print(Text("$ lepton-ray demo", style="bold green"))
    progress = [line for line in lines if line.startswith('{"event": "progress"')]
    for line in lines:
        if line.startswith('{"event": "progress"'):
            if line == progress[-1]:
                last = json.loads(line)
                console.print(
                    f"  step {last['step']}/{last['total_steps']}  epoch {last['epoch']}  loss {last['loss']:.4f}  "
                    f"accuracy {last['evaluation']['accuracy']:.4f}  {last['samples_per_second']:,.0f} samples/s"
                )
            continue
        shown = line.replace(Path(store).resolve().as_uri(), "file:///home/me/lepton-store")
        console.print(Text(shown, style="bold cyan" if line in STEPS else ""))
    console.save_svg(str(IMAGES / "demo.svg"), title="make demo")


def draw_report(store: str) -> None:
    """Write report.png, or say that there is no Chromium."""
    browser = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if browser is None:
        print("report.png not drawn: no Chromium on PATH")
        return
    report = max(Path(store).glob("runs/demo-*/report.html"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", "--window-size=1100,1500",
                   f"--screenshot={IMAGES / 'report.png'}", report.resolve().as_uri()]  # fmt: skip
        subprocess.run(command, capture_output=True, timeout=120, check=True)


def main() -> None:
    """Run the job once and draw both."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        store = sys.argv[1] if len(sys.argv) > 1 else temporary
        lines = run_demo(store)
        draw_terminal(lines, store)
        draw_report(store)
        print(*(path.name for path in sorted(IMAGES.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
