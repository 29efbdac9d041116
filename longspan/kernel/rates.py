"""Rates: what a call and a merge cost beside the pairs that they compute, so that kernels compare before any runs.

Everything is counted in pairs of a head 64 wide. The two rates below are reckoned from what a merge moves and what a
call takes to start on a GPU of some hundred TFLOP/s; neither has been measured yet, and flash attention and FlexAttention
are taken to compute a pair equally fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from longspan.derive.tiling import SIZE
from longspan.kernel.flash.band import Band
from longspan.kernel.flash.bands import BandGroup
from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.summary import block_counts

# Reading a part's row, and reading and writing the row that it is added to.
MERGE = 512
# Starting a call, of one kernel and of one that is started by way of a compiled Python function.
CALL, COMPILED = 1 << 19, 1 << 22


@lru_cache(maxsize=256)
def dearer(groups: tuple[HeadGroup, ...], banded: tuple[BandGroup, ...], length: int) -> str | None:
    """Say why FlexAttention does a pattern cheaper than flash attention over bands, or None where it does not.

    What FlexAttention merges too, terms that are read in different layouts, is not counted.

    Args:
        groups: the parts of heads that read alike.
        banded: the same in bands.
        length: number of queries.
    """
    computed = sum(len(group.heads) * band.area for group in banded for band in group.bands)
    merged = sum(len(group.heads) * _merged(group.bands, length) for group in banded)
    # What several groups read alike is called once for all of them.
    number = sum(band.shape[0] for band in {band for group in banded for band in group.bands})
    blocks = sum(len(group.heads) * sum(block_counts(group.parts)) for group in groups)
    # FlexAttention takes the heads that read alike in one call for each layout.
    layouts = {(group.parts, part.query.step) for group in groups for part in group.parts}
    flex = blocks * SIZE**2 + COMPILED * len(layouts)
    if computed + MERGE * merged + CALL * number <= flex:
        return None
    return (
        f"takes {number:,} calls for {computed:,} pairs and {merged:,} merges of a row, "
        f"and flex computes about {blocks * SIZE**2:,} pairs"
    )


def _merged(bands: Sequence[Band], length: int) -> int:
    """Return how many rows of bands in one layout come again."""
    count = 0
    for step in {band.query.step for band in bands}:
        touched = np.zeros(length, dtype=bool)
        for band in bands:
            if band.query.step == step:
                query = band.query
                rows = as_strided(
                    touched[query.start :],
                    (*band.shape, query.places),
                    (query.outer, query.inner, query.step),
                )
                count += int(np.count_nonzero(rows))
                rows[...] = True
    return count
