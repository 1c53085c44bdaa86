"""`python -m ganglion.agent.probe THREADS SIZE FOLDER`: measure, print the figures as JSON."""

import sys
from pathlib import Path

import msgspec

from ganglion.agent.probe.measure import measure

if __name__ == "__main__":
    threads, size, folder = sys.argv[1:4]
    measured = measure(int(threads), "large" if size == "large" else "small", Path(folder))
    sys.stdout.buffer.write(msgspec.json.encode(measured))
