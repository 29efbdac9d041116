"""Builds the native kernel where there is a C++ compiler; without one the package is whole too, and slower on CPU."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernel(BuildHookInterface):
    """Libraries built beside their source, packed into the wheel, whose tag then names the platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build; `version` is "standard" or "editable", and both want the libraries."""
        compiler = Path(self.root, "longspan", "kernel", "native", "compiler.py")
        libraries, problem = runpy.run_path(str(compiler))["build"]()
        if problem:
            self.app.display_warning(f"The native kernel was not built for every processor: {problem}")
        if libraries:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
            build_data["artifacts"].extend(f"/{path.relative_to(self.root)}" for path in libraries)
