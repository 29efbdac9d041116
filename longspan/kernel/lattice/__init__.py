"""Blocks as lattices of rectangles: strided views that a few batched calls take."""
