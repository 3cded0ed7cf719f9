"""What is done when another package is imported, and not before: PEFT takes seconds to import, and
the command line's help needs none of it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def import_with(package: str, module: str) -> None:
    """Import a module as soon as a package has been: now, if it was.

    Args:
        package: of somebody else.
        module: of svdtune, which adds to it.
    """
    if package in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Arrival(package, module))


class _Arrival(MetaPathFinder):
    """Finds the package as others do, once, and has the module imported after it."""

    def __init__(self, package: str, module: str):
        self.package, self.module = package, module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.package or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(self.module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec
