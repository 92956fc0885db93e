"""Map the folders of this repository to import names and build the C++ modules; everything else is in pyproject.toml.

engine/ -> athanor, kernels/ -> athanor.kernels, csrc/host/ -> athanor._host, csrc/cpu/ -> athanor.kernels._native, and csrc/cuda/, sources that are
compiled for the GPU at hand, -> data in athanor/kernels/csrc (kernels/_cuda.py).  A top-level package named `kernels` would shadow the HuggingFace
package that transformers probes for, and `engine` is no name to import from another project.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_namespace_packages, setup

ParallelCompile("ATHANOR_BUILD_JOBS").install()  # one compiler per processor, or as many as the variable says


def mapped_packages(folder: str, name: str) -> list[str]:
    # Folders of data alone (recipes) count as packages too, or setuptools would leave them out of the wheel one day.
    folders = find_namespace_packages(folder, exclude=["*__pycache__*"])
    return [name, *(f"{name}.{package}" for package in sorted(folders))]


setup(
    package_dir={"athanor": "engine", "athanor.kernels": "kernels", "athanor.kernels.csrc": "csrc/cuda"},
    packages=mapped_packages("engine", "athanor") + mapped_packages("kernels", "athanor.kernels") + ["athanor.kernels.csrc"],
    package_data={"": ["*.toml", "*.json", "*.html", "*.j2", "*.sh", "*.sbatch", "*.yaml"], "athanor.kernels.csrc": ["*.cu", "*.cuh"]},
    ext_modules=[
        Pybind11Extension(
            "athanor._host",
            sorted(glob("csrc/host/*.cpp")),
            depends=sorted(glob("csrc/host/*.hpp")),
            cxx_std=17,
            extra_compile_args=["-Wall", "-Wextra"],
        ),
        # No -ffast-math: NaN must stay NaN, and sums keep the order in which they are written.
        Pybind11Extension(
            "athanor.kernels._native",
            sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/cpu/*.hpp") + glob("csrc/cpu/*.inl")),
            cxx_std=17,
            extra_compile_args=["-Wall", "-Wextra", "-Wno-psabi", "-O3", "-fno-math-errno", "-ffp-contract=fast"],
        ),
    ],
)
