"""Mixtures over several devices: `python bench/experts.py PART ...`; prints tables, then one line of JSON.

parallel  two one-thread devices: the whole model on one, its columns shared, its experts shared
"""

from __future__ import annotations

import argparse
import json

import expert_parallel


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    expert_parallel.add_arguments(parts.add_parser("parallel", help=expert_parallel.__doc__))
    chosen = parser.parse_args()
    print(json.dumps(expert_parallel.run(chosen)))


if __name__ == "__main__":
    main()
