"""Runs pip for the Makefile. Prints a line for each download of a megabyte or more, and at least one line every 20 seconds.

python .ci/install.py NAME [arguments of pip install]
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

LARGE = re.compile(r"\s*Downloading (?:\S*/)?(\S+) \(([\d.]+ [MG]B)\)")
SILENCE = 20  # seconds


class Progress:
    """Prints what pip does, with the seconds since it began."""

    def __init__(self, name: str):
        self.name, self.step, self.begun = name, "resolving versions", time.monotonic()
        self.printed, self.ended = self.begun, threading.Event()

    def say(self, step: str) -> None:
        self.step, self.printed = step, time.monotonic()
        print(f"setup: {self.name}: {step} ({self.printed - self.begun:.0f} s)", flush=True)

    def read(self, line: str) -> None:
        if found := LARGE.match(line):
            self.say(f"downloading {found[1]}, {found[2]}")
        elif line.startswith("Installing collected packages"):
            self.say(f"unpacking {line.count(',') + 1} packages")

    def repeat(self) -> None:
        while not self.ended.wait(1):
            if time.monotonic() - self.printed > SILENCE:
                self.say(self.step)


def main(name: str, arguments: list[str]) -> int:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--progress-bar",
        "off",
        *arguments,
    ]
    progress, log = Progress(name), []
    progress.say(progress.step)
    threading.Thread(target=progress.repeat, daemon=True).start()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        for line in pip.stdout:
            log.append(line)
            progress.read(line)
    progress.ended.set()
    if pip.returncode:
        print("".join(log[-20:]), file=sys.stderr)
        print(
            f"setup: pip could not install {name}, see above. PIP_ARGS names another index or a proxy.",
            file=sys.stderr,
        )
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
