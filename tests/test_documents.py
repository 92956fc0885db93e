"""README and docs/: every Python snippet of docs/ runs, every command is one that exists, every relative link leads somewhere."""

import os
import re
import shlex
import shutil
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


@pytest.mark.slow
@pytest.mark.parametrize("page, words", [pytest.param(page, words, id=f"{page}: {' '.join(words)}"[:110]) for page, words in commands()])
def test_commands_are_accepted(page, words, tmp_path):
    """A training command with --dry-run, pytest with --collect-only; of everything else the options must be known to its --help."""
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if words[0] in ("pip", ".", "export", "cd", "sbatch", "kubectl", "git", "python3") or words[:3] == ["python", "-m", "pip"]:
        return  # installs and environments: what .ci/run and tests/test_package.py do for real
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0] == "athanor":
        words = ["python", "-m", "athanor", *words[1:], "--help"]
    if "my_recipe.toml" in words:
        shutil.copy(ROOT / "engine" / "recipes" / "tiny.toml", tmp_path / "my_recipe.toml")
        words[words.index("my_recipe.toml")] = str(tmp_path / "my_recipe.toml")
    if words[0] == "pytest":
        words = ["python", "-m", "pytest", *words[1:]]
    options = set()
    assert words[0] == "python", f"{page}: {words}: add what this command needs to be tested"
    assert words[1] == "-m" or (ROOT / words[1]).is_file(), f"{page}: {words[1]}"
    module, evaluation = words[1] == "-m", words[2:3] == ["eval"]
    if words[1:3] == ["-m", "pytest"]:
        words += ["--collect-only", "-q"]
    elif module or evaluation or words[1] != "engine/train.py":
        options = {word.partition("=")[0] for word in words[3:] if word.startswith("-")}
        words = [*words[: 3 if module or evaluation else 2], "--help"]
    elif not {"--help", "--plan", "--list"} & set(words):
        words += ["--dry-run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    if words[-1] == "--help" and words[1:3] != ["-m", "athanor"]:
        assert not (missing := sorted(option for option in options if option not in done.stdout)), f"{page}: {words[1:3]} does not know {missing}"
