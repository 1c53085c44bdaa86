"""Generate the Python of the wire contract from the `.proto` files: `python proto/generate.py [--check]`.

Run by an interpreter that has grpcio-tools 1.71.2 (pinned old: its output runs under every newer protobuf and grpcio,
and it needs an older protobuf than the project, so it lives in a virtual environment of its own).
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SCHEMA = ROOT / "schema"
PACKAGE = Path("ganglion/proto")


def generate(into: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `into`; raises SystemExit when protoc fails."""
    includes = str(importlib.resources.files("grpc_tools") / "_proto")
    sources = sorted(str(path.relative_to(SCHEMA)) for path in (SCHEMA / PACKAGE).glob("*.proto"))
    arguments = ["protoc", f"-I{SCHEMA}", f"-I{includes}"]
    arguments += [f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}"]
    if protoc.main(arguments + sources) != 0:
        raise SystemExit("protoc failed")


def main() -> int:
    """Generate in place, or with --check compare with what is committed and exit 1 on a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed files differ")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch) if check else ROOT
        generate(into)
        if not check:
            return 0
        names = sorted(path.name for path in (into / PACKAGE).iterdir())
        _, differing, missing = filecmp.cmpfiles(into / PACKAGE, ROOT / PACKAGE, names, shallow=False)
        for name in differing + missing:
            print(f"out of date: {PACKAGE / name}: run python proto/generate.py", file=sys.stderr)
        return 1 if differing or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
