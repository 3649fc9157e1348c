"""The README's pictures: the demo's learning curve, and the page of its run in a browser of 1280 pixels.

Usage: python -m docs.pictures [FOLDER]

FOLDER is that of a run of ``trlx demo``, such as ckpts/randomwalks/ppo; without it the demo runs first, in minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from trlx.launch import demo
from trlx.launch.report import write_report

PICTURES = Path(__file__).parent / "pictures"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SIZE = (1280, 1120)


def browser() -> str | None:
    """The program of a browser that `drive` can use; None if none is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def drive(page: Path, *options: str) -> str:
    """Opens a page in a browser without a window, and returns what it prints.

    Raises:
        FileNotFoundError: there is no browser.
    """
    program = browser()
    if program is None:
        raise FileNotFoundError(f"no browser: install one of {', '.join(BROWSERS)}")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --virtual-time-budget=2000".split()
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *flags, f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def draw(folder: Path) -> None:
    """Writes the pictures of the demo's run in `folder`, with 64 colours, which halves them."""
    curve, page = write_report(folder, "Shortest paths on a random graph: PPO")
    shot = PICTURES / "report.png"
    drive(page, f"--window-size={SIZE[0]},{SIZE[1]}", "--hide-scrollbars", f"--screenshot={shot}")
    for source, picture in ((curve, PICTURES / "demo.png"), (shot, shot)):
        Image.open(source).convert("RGB").quantize(64).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of a run of the demo")
    folder = parser.parse_args().folder
    if folder is not None:
        return draw(folder)
    with tempfile.TemporaryDirectory() as out:
        demo.run("ppo", Path(out))
        return draw(Path(out) / "ppo")


if __name__ == "__main__":
    main()
