"""The limit on pieces' bytes per second: from flag, environment and file to the number that the agent takes."""

from __future__ import annotations

import pytest

from ganglion.cli.settings import load
from ganglion.wire.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("20MB/s", 20_000_000), ("20MiB/s", 20 << 20), ("1.5 MB / s", 1_500_000), ("64k", 64 << 10), ("131072", 1 << 17)],
)
def test_rates_are_sizes_a_second(tmp_path, text, bytes_per_s):
    assert load(tmp_path, {}, bandwidth=text).bandwidth == bytes_per_s
    assert load(tmp_path, {"GANGLION_BANDWIDTH": text}).bandwidth == bytes_per_s
    (tmp_path / "config.toml").write_text(f'bandwidth = "{text}"\n')
    assert load(tmp_path, {}).bandwidth == bytes_per_s
    assert load(tmp_path, {"GANGLION_BANDWIDTH": "1GB/s"}, bandwidth="2GB/s").bandwidth == 2_000_000_000


def test_no_limit_unless_asked_and_nonsense_is_named(tmp_path):
    assert load(tmp_path, {}).bandwidth is None
    for text in ("fast", "20MB/h", "1KB/s", "0"):
        with pytest.raises(InvalidRequest, match="--bandwidth"):
            load(tmp_path, {}, bandwidth=text)
