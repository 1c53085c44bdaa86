"""Which bytes are an expert's, and which pages are its alone; every byte once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.paging.layout import PAGE, Initializer, layout_of


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 3 * PAGE), st.integers(PAGE, 5 * PAGE), st.booleans()), min_size=1, max_size=4),
)
def test_pages_and_what_stays_are_every_byte_once(experts: int, ranges: list[tuple[int, int, bool]]) -> None:
    written, at = [], 0
    for number, (gap, stride, packed) in enumerate(ranges):
        span = (at + gap, stride * experts)
        own = Initializer(f"w{number}", (experts, 3), (0, 1) if packed else span, (span, (at, 0)) if packed else ())
        written.append(own)
        at = sum(span)
    written.append(Initializer("bias", (experts,), (at, 40), ()))
    written.append(Initializer("scales", (experts, 8), (at + 40, 999), ()))
    layout = layout_of(written, experts, ("scales",))
    assert layout.unread == ((at + 40, 999),)
    seen = [span for expert in range(experts) for span in layout.pages(expert) if span[1]]
    assert all(offset % PAGE == 0 == length % PAGE for offset, length in seen)
    for expert in range(experts):
        for (offset, length), (first, size) in zip(layout.pages(expert), layout.strides(expert), strict=True):
            assert not length or first <= offset < offset + length <= first + size
    covered = sorted(span for span in (*seen, *layout.resident()) if span[1])
    wanted = sorted(span for one in written[:-1] for span in (one.packed or (one.span,)) if span[1])
    assert _merged(covered) == _merged(wanted)
    assert sum(length for _, length in covered) == sum(length for _, length in wanted)
    assert layout.record_bytes() == max(sum(size for _, size in layout.pages(one)) for one in range(experts))


def _merged(spans: list[tuple[int, int]]) -> list[list[int]]:
    found: list[list[int]] = []
    for offset, length in spans:
        if found and found[-1][1] == offset:
            found[-1][1] += length
        else:
            found.append([offset, offset + length])
    return found
