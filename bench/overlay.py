"""Run a script or a module with athanor.kernels taken from another folder: an older revision, or a copy with a planted bug.

    python bench/overlay.py KERNELS_FOLDER script.py [arguments]
    python bench/overlay.py KERNELS_FOLDER -m module [arguments]
"""

import importlib.machinery
import importlib.util
import runpy
import sys
from pathlib import Path


class KernelsFrom:
    """A finder that stands before all others and answers for the package athanor.kernels alone; its modules follow from the package's path."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != "athanor.kernels":
            return None
        return importlib.util.spec_from_file_location(name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)])


def main() -> None:
    if len(sys.argv) < 3 or not (Path(sys.argv[1]) / "__init__.py").is_file():
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    sys.meta_path.insert(0, KernelsFrom(folder))
    if sys.argv[2] == "-m":
        sys.argv = sys.argv[3:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[2:]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
