"""Versions: which release of a package is installed here."""

from __future__ import annotations

from importlib import metadata


def version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed.

    Example:
        >>> version("no-such-package") is None
        True
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
