"""README and docs/: every Python snippet of docs/ runs, every command is one that exists, every relative link leads somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
def commands():
    """(page, command) of every line in the shell blocks, comments and continuations resolved, `a && b` taken apart."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if words := shlex.split(part, comments=True):
                        yield page.name, words


def test_snippets_run():
    """In one process of their own, each with names of its own: importing PyTorch takes longer than all of them."""
    blocks = [(page.name, block) for page in PAGES[1:] for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)]
    assert len(blocks) >= 7
    program = f"for page, block in {blocks!r}:\n    print(page, flush=True)\n    exec(compile(block, page, 'exec'), {{'__name__': page}})\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert re.match(r"https?://", target) or (page.parent / target).exists(), f"{page.name}: {target}"


# What makes a documented command cheap without changing what it accepts.
CHEAP = {
    "engine/train.py": "--dry-run",
    "bench/run.py": "--list",
}


@pytest.mark.slow
@pytest.mark.parametrize("page, words", [pytest.param(page, words, id=f"{page}: {' '.join(words)}"[:110]) for page, words in commands()])
def test_commands_are_accepted(page, words, tmp_path):
    """A training command with --dry-run, a bench with --list, pytest with --collect-only; a module must exist and its options be known to --help."""
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if words[0] in ("pip", ".", "export", "cd", "sbatch", "kubectl", "git", "python3") or words[:3] == ["python", "-m", "pip"]:
        return  # installs and environments: what .ci/run and tests/test_package.py do for real
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0] == "pytest":
        words = ["python", "-m", "pytest", *words[1:]]
    assert words[0] == "python", f"{page}: {words}: add what this command needs to be tested"
    assert words[1] == "-m" or (ROOT / words[1]).is_file(), f"{page}: {words[1]}"
    if words[1] == "-m" and words[2] == "pytest":
        words += ["--collect-only", "-q"]
    elif words[1] == "-m" or words[2:3] == ["eval"] or words[1] not in CHEAP:
        options = {word.partition("=")[0] for word in words if word.startswith("-")} - {"-m", "-n", "-c"}
        help_ = run([*words[: 4 if words[2:3] == ["eval"] else 3 if words[1] == "-m" else 2], "--help"][: 5], tmp_path)
        assert help_.returncode == 0, help_.stderr[-2000:]
        assert not (missing := sorted(option for option in options if option not in help_.stdout)), f"{page}: {words[1:3]} does not know {missing}"
        return
    elif not {"--help", "--plan", "--list"} & set(words):
        words += [CHEAP[words[1]]]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
