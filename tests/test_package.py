"""What an installer gets: every way of installing gives the same modules and recipes, and every dependency is pinned."""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BUILT = {".so", ".pyc"}  # everything else in engine/ and kernels/ is source, recipe or template and has to arrive
# Run with the installed package in an empty folder; prints where it lies and which files it has.
PROBE = """
import json, numpy
import athanor, athanor.kernels, athanor._host, athanor.kernels._cuda
from importlib.resources import files
from pathlib import Path
bins, num_bins = athanor._host.best_fit_pack(numpy.array([3, 5, 8]), 8)
assert (bins.tolist(), num_bins) == ([1, 1, 0], 2)
def names(module):
    top = Path(str(files(module)))
    return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file() and path.suffix not in {built!r})
print(json.dumps({{"at": athanor._host.__file__, "athanor": names("athanor"), "athanor.kernels": names("athanor.kernels"),
                  "cuda": sorted(path.name for path in athanor.kernels._cuda.FOLDER.iterdir())}}))
"""


def source_files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in BUILT)


def run(command: list, cwd: Path) -> str:
    # PIP_CONSTRAINT and the like concern what is downloaded, and nothing is.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    ran = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("source") / "athanor"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, copy, ignore=skip))


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"], source)
    return next((source / "dist").glob("*.tar.gz"))


@pytest.fixture
def python(tmp_path) -> Path:
    """A new environment that sees this one's packages but, since .pth files are not nested, not this one's editable athanor."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    Path(purelib, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, cwd: Path, *what) -> None:
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, *what], cwd)


def installed_at(python: Path, cwd: Path) -> Path:
    """Folder of the installed athanor, after comparing its modules, recipes and templates with those of the tree."""
    empty = cwd / "empty"
    empty.mkdir()
    found = json.loads(run([python, "-c", PROBE.format(built=BUILT)], empty))
    assert [name for name in found["athanor"] if not name.startswith("kernels/")] == source_files("engine")
    # the CUDA sources come as a folder of the package, except where it is the tree itself that is imported
    assert [name for name in found["athanor.kernels"] if not name.startswith("csrc/")] == source_files("kernels")
    assert found["cuda"] == source_files("csrc/cuda")
    return Path(found["at"]).parent


@pytest.mark.slow
def test_sdist_installs_everything(sdist, python, tmp_path):
    install(python, tmp_path, sdist)
    assert installed_at(python, tmp_path).is_relative_to(tmp_path / "venv")


@pytest.mark.slow
def test_wheel_installs_everything_and_nothing_else(source, python, tmp_path):
    run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"], source)
    wheel = next((source / "dist").glob("*.whl"))
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"athanor", f"athanor-{importlib.metadata.version('athanor')}.dist-info"}
    install(python, tmp_path, wheel)
    assert installed_at(python, tmp_path).is_relative_to(tmp_path / "venv")


@pytest.mark.slow
def test_editable_install_reads_the_tree(source, python, tmp_path):
    install(python, tmp_path, "-e", source)
    assert installed_at(python, tmp_path) == source / "engine"
    (source / "engine" / "recipes" / "added.toml").write_text("")
    listed = run([python, "-c", "from importlib.resources import files; print((files('athanor') / 'recipes' / 'added.toml').is_file())"], tmp_path)
    assert listed == "True\n"


@pytest.mark.slow
def test_sdist_holds_what_its_tests_need(sdist, source):
    names = {str(Path(*Path(name).parts[1:])) for name in tarfile.open(sdist).getnames()}
    for needed in ["LICENSE", "constraints.txt", "csrc/host/packing.hpp", "csrc/cuda/ptx.cuh", "tests/conftest.py", "tests/test_packing.cpp",
                   "pyproject.toml"]:  # fmt: skip
        assert needed in names
    assert {f"tests/{path.relative_to(source / 'tests')}" for path in (source / "tests").rglob("*") if path.is_file()} <= names


def test_every_dependency_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    wanted = [Requirement(line) for group in [project["dependencies"], *project["optional-dependencies"].values()] for line in group]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} in constraints.txt, pyproject.toml wants {requirement.specifier}"


def test_pins_fit_what_the_installed_packages_ask_for():
    # The CUDA build of torch asks for one exact triton: a pin beside it would make the install unsolvable.
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    for owner in ["torch", "tensorboard", "matplotlib", "pydantic", "reasoning-gym", "transformers"]:
        try:
            asked = [Requirement(line) for line in importlib.metadata.requires(owner) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in asked:
            name = canonicalize_name(requirement.name)
            if name in versions and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                assert versions[name] in requirement.specifier, f"{owner} asks for {requirement}, constraints.txt has {versions[name]}"


def test_every_imported_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("gpu", "flash", "parquet", "trl")  # not the tests' own
    users = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    declared = {canonicalize_name(Requirement(line).name) for group in users for line in group}
    owners = {"cupy": ["cupy-cuda13x"], "flash_attn": ["flash-attn"]} | importlib.metadata.packages_distributions()
    for folder in ("engine", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"athanor"}:
                    wanted = {canonicalize_name(owner) for owner in owners.get(name, [name])}
                    assert wanted & declared, f"{path.relative_to(ROOT)}:{node.lineno}: imports {name}, which pyproject.toml does not declare"
