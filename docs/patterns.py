"""Draw docs/patterns.svg: four patterns side by side on the same grid. Run from anywhere: `make picture`."""

from __future__ import annotations

from pathlib import Path

from longspan.derive.picture import Picture, gallery
from longspan.pattern import Longformer, LongMixed, LongNet, SlidingWindow

ALIKE = {
    "SlidingWindow": SlidingWindow(8),
    "Longformer": Longformer(6, dilation=2, global_tokens=3),
    "LongNet": LongNet((8, 16, 32), (1, 2, 4)),
}
BY_HEAD = {"LongMixed, 4 heads": LongMixed(8)}

if __name__ == "__main__":
    panels = (*gallery(ALIKE, length=32, heads=1).panels, *gallery(BY_HEAD, length=32, heads=4).panels)
    Picture(panels).save(Path(__file__).with_suffix(".svg"))
