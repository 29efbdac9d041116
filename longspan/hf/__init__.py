"""Models: any transformers decoder with a pattern, its position scaling, and a test that it is causal."""

from __future__ import annotations
