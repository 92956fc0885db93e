"""Map the folders of this repository to import names."""

from setuptools import setup

setup(
    name="athanor",
    version="0.1.0",
    package_dir={"athanor": "engine", "athanor.kernels": "kernels"},
    packages=["athanor", "athanor.kernels"],
)
