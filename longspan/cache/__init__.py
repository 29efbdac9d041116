"""Caches: the keys and values that later queries may still read, whatever the pattern."""

from longspan.cache.layer import Cache
from longspan.cache.pages import Pages, Pool
from longspan.cache.storage import Plain, Rounded

__all__ = ["Cache", "Pages", "Plain", "Pool", "Rounded"]
