"""README and docs/: every Python snippet of docs/ runs, every command is one that exists, every relative link leads somewhere."""

import json
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
        for target in re.findall(r"""(?:\]\(|src=")([^)#\s"]+)""", page.read_text()):
            assert re.match(r"https?://", target) or (page.parent / target).exists(), f"{page.name}: {target}"


def checked(words, folder):
    """What is run instead of a command, as `python` would get it, and the options that its --help must know: a training command with --dry-run,
    pytest with --collect-only, everything else with --help.  None for installs and environments, which .ci/run and test_package.py do for real."""
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if words[0] in ("pip", ".", "export", "cd", "sbatch", "kubectl", "git", "python3") or words[:3] == ["python", "-m", "pip"]:
        return None
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0] == "athanor":
        words = ["python", "-m", "athanor", *words[1:], "--help"]
    if "my_recipe.toml" in words:
        words = [str(folder / word) if word == "my_recipe.toml" else word for word in words]
    if words[0] == "pytest":
        words = ["python", "-m", "pytest", *words[1:]]
    options = set()
    assert words[0] == "python", f"{words}: add what this command needs to be tested"
    assert words[1] == "-m" or (ROOT / words[1]).is_file(), words[1]
    module, evaluation = words[1] == "-m", words[2:3] == ["eval"]
    if words[1:3] == ["-m", "pytest"]:
        words += ["--collect-only", "-q"]
    elif module or evaluation or words[1] != "engine/train.py":
        options = {word.partition("=")[0] for word in words[3:] if word.startswith("-")}
        words = [*words[: 3 if module or evaluation else 2], "--help"]
    elif not {"--help", "--plan", "--list"} & set(words):
        words += ["--dry-run"]
    return words[1:], set() if words[1:3] == ["-m", "athanor"] else options


# Runs commands one after the other, each in a fork of a process that has imported what takes longest.  A line in: the arguments of `python`.  A
# line out: exit status and output.
FORKS = """
import json, os, runpy, signal, sys, tempfile, traceback
import torch, pydantic, jinja2, safetensors, tokenizers, athanor.pipeline, athanor.evaluation, athanor.generate, athanor.transcripts

def run(arguments):
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")

def status(arguments):
    try:
        run(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            signal.alarm(600)
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            code = status(json.loads(line))
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps([code, output.read().decode()]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.multiproc
def test_commands_are_accepted(tmp_path):
    shutil.copy(ROOT / "engine" / "recipes" / "tiny.toml", tmp_path / "my_recipe.toml")
    wanted = {}  # arguments -> the pages that have such a command, and the options that must be known
    for page, words in commands():
        if (command := checked(words, tmp_path)) is not None:
            arguments, options = command
            pages, known = wanted.setdefault(tuple(arguments), (set(), set()))
            pages.add(page)
            known |= options
    assert len(wanted) >= 25
    lines = "".join(json.dumps(arguments) + "\n" for arguments in wanted)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, input=lines, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = []
    for (arguments, (pages, options)), answer in zip(wanted.items(), done.stdout.splitlines(), strict=True):
        code, output = json.loads(answer)
        if code != 0:
            wrong.append(f"{sorted(pages)}: {' '.join(arguments)}: status {code}\n{output[-1500:]}")
        elif missing := sorted(option for option in options if option not in output):
            wrong.append(f"{sorted(pages)}: {arguments[:2]} does not know {missing}")
    assert not wrong, "\n\n".join(wrong)
