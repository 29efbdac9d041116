"""The plan as people read it: whole texts, each counted by other tests too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from longspan import plan
from longspan.kernel import plan as plan_module
from longspan.kernel.native import native
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)

PRINTED = [
    (
        Causal(),
        {"length": 1000, "heads": 2, "kernel": "sdpa"},
        """\
Plan
  pattern    Causal()
  heads      2, width 64, float32
  queries    0 to 999 reading keys 0 to 999
  pairs      1,001,000, 50.05% of all
  most keys  1,000 for one query
  blocks     56 full, 16 partial, 56 empty
  layout     contiguous
  computed   1,001,000, 1.00 times the pairs
  flops      256,256,000 forward
  workspace  1.0 MB forward, 6.2 MB backward at most
  kernel     sdpa
  heads 0 and 1
    1 x causal 1,000 queries by 1,000 keys""",
    ),
    (
        SlidingWindow(512),
        {"length": 8192, "heads": 8},
        """\
Plan
  pattern    SlidingWindow(512)
  heads      8, width 64, float32
  queries    0 to 8,191 reading keys 0 to 8,191
  pairs      32,507,904, 6.06% of all
  most keys  512 for one query
  blocks     1,488 full, 992 partial, 30,288 empty
  layout     contiguous
  computed   33,460,224, 1.03 times the pairs
  flops      8,322,023,424 forward
  workspace  493.6 kB forward, 394.0 kB backward at most
  kernel     native
  heads 0 to 7
    1 x causal 512 queries by 512 keys
    60 x masked 128 queries by 640 keys, 80% of it read""",
    ),
    (
        LongNet((256, 1024), (1, 4)),
        {"length": 4096, "heads": 4, "kernel": "sdpa"},
        """\
Plan
  pattern    LongNet((256, 1024), (1, 4))
  heads      4, width 64, float32
  queries    0 to 4,095 reading keys 0 to 4,095
  pairs      2,631,680, 3.92% of all
  most keys  512 for one query
  blocks     80 full, 160 partial, 3,856 empty
  layout     every 4; contiguous blocks would compute 11,542,528
  computed   2,631,680, 1.00 times the pairs
  flops      673,710,080 forward
  workspace  2.2 MB forward, 12.8 MB backward at most
  kernel     sdpa
  head 0
    16 x causal 256 queries by 256 keys
    4 x causal 256 queries by 256 keys, every 4
  head 1
    16 x causal 256 queries by 256 keys
    4 x causal 256 queries by 256 keys, every 4
  head 2
    16 x causal 256 queries by 256 keys
    4 x causal 256 queries by 256 keys, every 4
  head 3
    16 x causal 256 queries by 256 keys
    4 x causal 256 queries by 256 keys, every 4""",
    ),
    (
        S2(1024),
        {"length": 4096, "heads": 2, "kernel": "sdpa"},
        """\
Plan
  pattern    S2(1024)
  heads      2, width 64, float32
  queries    0 to 4,095 reading keys 0 to 4,095
  pairs      3,936,256, 11.73% of all
  most keys  1,024 for one query
  blocks     208 full, 64 partial, 1,776 empty
  layout     contiguous
  computed   3,936,256, 1.00 times the pairs
  flops      1,007,681,536 forward
  workspace  2.2 MB forward, 12.7 MB backward at most
  kernel     sdpa
  head 0
    4 x causal 1,024 queries by 1,024 keys
  head 1
    1 x causal 512 queries by 512 keys
    3 x causal 1,024 queries by 1,024 keys
    1 x causal 512 queries by 512 keys""",
    ),
    (
        SCCA(512),
        {"length": 4096, "heads": 2, "kernel": "sdpa"},
        """\
Plan
  pattern    SCCA(512)
  heads      2, width 64, float32
  queries    0 to 4,095 reading keys 0 to 4,095
  pairs      3,016,960, 8.99% of all
  most keys  512 for one query
  blocks     166 full, 36 partial, 1,846 empty
  layout     contiguous
  computed   3,016,960, 1.00 times the pairs
  flops      772,341,760 forward
  workspace  2.2 MB forward, 12.7 MB backward at most
  kernel     sdpa
  head 0
    8 x causal 512 queries by 512 keys
  head 1
    7 x plain  512 queries by 512 keys
    1 x causal 512 queries by 512 keys""",
    ),
    (
        SCCA(512, flow=4),
        {"length": 4096, "heads": 4, "kernel": "sdpa"},
        """\
Plan
  pattern    SCCA(512, flow=4)
  heads      4, width 64, float32
  queries    0 to 4,095 reading keys 0 to 4,095
  pairs      6,557,184, 9.77% of all
  most keys  512 for one query
  blocks     372 full, 56 partial, 3,668 empty
  layout     contiguous
  computed   6,557,184, 1.00 times the pairs
  flops      1,678,639,104 forward
  workspace  2.2 MB forward, 12.8 MB backward at most
  kernel     sdpa
  head 0
    8 x causal 512 queries by 512 keys
  head 1
    7 x plain  512 queries by 512 keys
    1 x causal 512 queries by 512 keys
  head 2
    6 x plain  512 queries by 512 keys
    2 x causal 512 queries by 512 keys
  head 3
    5 x plain  512 queries by 512 keys
    3 x causal 512 queries by 512 keys""",
    ),
    (
        SDA(4),
        {"length": 4096, "heads": 2, "kernel": "sdpa"},
        """\
Plan
  pattern    SDA(4)
  heads      2, width 64, float32
  queries    0 to 4,095 reading keys 0 to 4,095
  pairs      4,197,376, 12.51% of all
  most keys  1,024 for one query
  blocks     224 full, 64 partial, 1,760 empty
  layout     every 4; contiguous blocks would compute 17,805,440
  computed   4,197,376, 1.00 times the pairs
  flops      1,074,528,256 forward
  workspace  2.2 MB forward, 12.7 MB backward at most
  kernel     sdpa
  head 0
    4 x causal 1,024 queries by 1,024 keys, every 4
  head 1
    1 x causal 1,023 queries by 1,023 keys, every 4
    3 x causal 1,024 queries by 1,024 keys, every 4""",
    ),
    (
        LongMixed(1024),
        {"length": 1048576, "heads": 8, "kernel": "sdpa"},
        """\
Plan
  pattern    LongMixed(1024)
  heads      8, width 64, float32
  queries    0 to 1,048,575 reading keys 0 to 1,048,575
  pairs      552,977,564,672, 6.29% of all
  most keys  262,144 for one query
  blocks     33,726,392 full, 49,168 partial, 503,095,352 empty
  layout     every 4; contiguous blocks would compute up to 2,202,909,230,848
  computed   552,977,564,672, 1.00 times the pairs
  flops      141,562,256,556,032 forward
  workspace  83.9 MB forward, 167.8 MB backward at most
  kernel     sdpa
  refused    reference: would need 35184.4 GB for the scores, limit is 8 GB
  heads 0 and 1
    1,024 x causal 1,024 queries by 1,024 keys
  heads 2 and 3
    1,023 x plain  1,024 queries by 1,024 keys
    1 x causal 1,024 queries by 1,024 keys
  head 4
    4 x causal 262,144 queries by 262,144 keys, every 4
  head 5
    1 x causal 262,143 queries by 262,143 keys, every 4
    3 x causal 262,144 queries by 262,144 keys, every 4
  head 6
    2 x causal 262,143 queries by 262,143 keys, every 4
    2 x causal 262,144 queries by 262,144 keys, every 4
  head 7
    3 x causal 262,143 queries by 262,143 keys, every 4
    1 x causal 262,144 queries by 262,144 keys, every 4""",
    ),
    (
        Streaming(508),
        {"length": 1048576, "heads": 8, "kernel": "sdpa"},
        """\
Plan
  pattern    Streaming(508)
  heads      8, width 64, float32
  queries    0 to 1,048,575 reading keys 0 to 1,048,575
  pairs      4,293,920,768, 0.05% of all
  most keys  512 for one query
  blocks     196,552 full, 196,560 partial, 536,477,800 empty
  layout     contiguous
  computed   5,400,806,480, 1.26 times the pairs
  flops      1,099,243,716,608 forward
  workspace  93.7 MB forward, 169.2 MB backward at most
  kernel     sdpa
  refused    reference: would need 35184.4 GB for the scores, limit is 8 GB
  heads 0 to 7
    1 x masked 128 queries by 384 keys, 83% of it read
    1 x masked 128 queries by 512 keys, 88% of it read
    1 x causal 256 queries by 256 keys
    8,188 x masked 128 queries by 640 keys, 79% of it read
    1 x plain  7,680 queries by 4 keys
    127 x plain  8,192 queries by 4 keys
    1 x causal 4 queries by 4 keys""",
    ),
    (
        Longformer(256),
        {"length": 4096, "heads": 1, "kernel": "sdpa"},
        """\
Plan
  pattern    Longformer(256)
  heads      1, width 64, float32
  queries    0 to 4,095 reading keys 0 to 4,095
  pairs      1,019,776, 6.08% of all
  most keys  257 for one query
  blocks     61 full, 62 partial, 901 empty
  layout     contiguous
  computed   1,511,296, 1.48 times the pairs
  flops      261,062,656 forward
  workspace  3.6 MB forward, 28.2 MB backward at most
  kernel     sdpa
  head 0
    1 x causal 256 queries by 256 keys
    30 x masked 128 queries by 384 keys, 67% of it read
    1 x plain  3,840 queries by 1 key""",
    ),
    (
        Causal() & (Window(100) + Dilated(5)),
        {"length": 1000, "heads": 1, "kernel": "sdpa"},
        """\
Plan
  pattern    Causal() & Window(100) + Dilated(5)
  heads      1, width 64, float32
  queries    0 to 999 reading keys 0 to 999
  pairs      195,550, 19.55% of all
  most keys  300 for one query
  blocks     5 full, 25 partial, 34 empty
  layout     every 5; contiguous blocks would compute 799,872
  computed   337,620, 1.73 times the pairs
  flops      50,060,800 forward
  workspace  1.3 MB forward, 4.5 MB backward at most
  kernel     sdpa
  head 0
    1 x masked 128 queries by 128 keys, 48% of it read
    6 x masked 128 queries by 256 keys, 39% of it read
    1 x masked 104 queries by 232 keys, 43% of it read
    5 x causal 200 queries by 200 keys, every 5""",
    ),
    (
        Streaming(508),
        {"length": 5000, "queries": range(4999, 5000), "heads": 4, "kernel": "sdpa"},
        """\
Plan
  pattern    Streaming(508)
  heads      4, width 64, float32
  queries    4999 reading keys 0 to 4,999
  pairs      2,048, 10.24% of all
  most keys  512 for one query
  blocks     20 full, 0 partial, 140 empty
  layout     contiguous
  computed   2,048, 1.00 times the pairs
  flops      524,288 forward
  workspace  3.1 kB forward, 4.2 MB backward at most
  kernel     sdpa
  refused    native: is taken from 16 queries on, got 1
  heads 0 to 3
    1 x plain  1 query by 508 keys
    1 x plain  1 query by 4 keys""",
    ),
    (
        PerHead([Causal(), Nothing()]),
        {"length": 100, "queries": range(90, 100), "heads": 2, "kernel": "sdpa"},
        """\
Plan
  pattern    PerHead([Causal(), Nothing()])
  heads      2, width 64, float32
  queries    90 to 99 reading keys 0 to 99
  pairs      955, 47.75% of all
  most keys  100 for one query
  blocks     0 full, 1 partial, 1 empty
  layout     contiguous
  computed   1,000, 1.05 times the pairs
  flops      244,480 forward
  workspace  17.3 kB forward, 227.4 kB backward at most
  kernel     sdpa
  refused    native: is taken from 16 queries on, got 10
  head 0
    1 x masked 10 queries by 100 keys, 96% of it read
  head 1
    reads nothing""",
    ),
    (
        Causal(),
        {"length": 1, "kernel": "sdpa"},
        """\
Plan
  pattern    Causal()
  heads      1, width 64, float32
  queries    0 reading keys 0
  pairs      1, 100.00% of all
  most keys  1 for one query
  blocks     1 full, 0 partial, 0 empty
  layout     contiguous
  computed   1, 1.00 times the pairs
  flops      256 forward
  workspace  520 bytes forward, 3.1 kB backward at most
  kernel     sdpa
  refused    native: is taken from 16 queries on, got 1
  head 0
    1 x plain  1 query by 1 key""",
    ),
    (
        Nothing(),
        {"length": 64, "heads": 2, "kernel": "sdpa"},
        """\
Plan
  pattern    Nothing()
  heads      2, width 64, float32
  queries    0 to 63 reading keys 0 to 63
  pairs      0, 0.00% of all
  most keys  0 for one query
  blocks     0 full, 0 partial, 2 empty
  layout     contiguous
  computed   0, 0.00 times the pairs
  flops      0 forward
  workspace  1.0 kB forward, 2.0 kB backward at most
  kernel     sdpa
  heads 0 and 1
    read nothing""",
    ),
]


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plan as where the native kernel was built; nothing is run."""
    monkeypatch.setattr(native, "MISSING", "")
    plan_module._plan.cache_clear()
    yield
    plan_module._plan.cache_clear()


@pytest.mark.parametrize(
    ("pattern", "asked", "text"), PRINTED, ids=[f"{pattern}, {asked}" for pattern, asked, _ in PRINTED]
)
def test_a_plan_is_printed_whole(pattern: Pattern, asked: dict[str, Any], text: str):
    assert str(plan(pattern, **asked)) == text
