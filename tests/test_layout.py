"""The tree's rules: floors, names that shadow nothing, a fixed top level, file sizes, and a cheap `import athanor`."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module or folder of engine/ imports only from its own floor and those below it.  A new one is added here, on the lowest floor that serves.
FLOORS = {
    0: "kernels _host",
    1: "atomic batch config config_fields console errors hf_config hf_tensors manifest metrics model_config parallel preemption recipe_draft "
    "recipe_inputs recipe_io registry run_folder samples sampling_config seeds watch_config watchdog",
    2: "advantages contamination detectors judging losses metrics_eval rewards sandbox tasks",
    3: "checkpoint context_parallel expert_parallel mla model moe optim sharding tensor_parallel tokenizer weights",
    4: "chat cpu_graph cpu_steps decode generate generative_judge generator kv_cache prefill reward_models speculation stops stream",
    5: "dispatch rollout sample_store transcript_log",
    6: "stages",
    7: "__main__ adapters catalogue doctor dry_run evaluation evaluation_report launch pipeline planner published recipes report report_charts "
    "shapes transcripts",
    8: "train",
}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units.split()}

# Losses, advantages and rewards see tensors and text, never a process group: that is what makes them embeddable.
WITHOUT_PROCESSES = {"losses", "advantages", "rewards"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
# `torchrun engine/train.py` puts engine/ first on sys.path, so a module there would hide any of these.
WELL_KNOWN = set(
    "accelerate apex bitsandbytes cupy datasets deepspeed diffusers einops evaluate flash_attn huggingface_hub hydra jinja2 jsonschema "
    "liger_kernel math_verify matplotlib megatron ninja numpy nltk omegaconf outlines packaging pandas peft pip pkg_resources platformdirs "
    "psutil pyarrow pybind11 pydantic pydantic_settings pytest ray reasoning_gym regex requests rich ruff safetensors scipy sentencepiece "
    "setuptools sglang six sklearn sympy tensorboard tensorflow tiktoken tokenizers torch torchao torchaudio torchvision tqdm transformers "
    "triton trl typing_extensions verl vllm wandb xformers yaml".split()
)
TOP_LEVEL = set(
    "engine kernels csrc bench tests docs setup.py README.md pyproject.toml constraints.txt LICENSE MANIFEST.in CHANGELOG.md LOG.md .ci "
    ".gitignore".split()
)
SOURCES = ("*.py", "*.cpp", "*.hpp", "*.inl", "*.cu", "*.cuh")


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    """Import name of a file of engine/, kernels/, bench/ or tests/: engine/model/moe.py is athanor.model.moe."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0:1] = {"engine": ["athanor"], "kernels": ["athanor", "kernels"]}.get(parts[0], [parts[0]])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: str | None = None) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands.  `from a import b` is a.b, which may be a module or a name in a."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text() if source is None else source, str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([node.module] if node.module else []))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__") and node.args:
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]  # f"athanor.tasks.{name}" by its fixed part
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                found.append((node.lineno, first.value.rstrip(".")))
    return found


def unit_of(module: str) -> str | None:
    """The module or folder of engine/ that a dotted name lies in; None outside athanor, '' for athanor itself."""
    if module == "athanor":
        return ""
    return module.split(".")[1] if module.startswith("athanor.") else None


def floor_violations(path: Path, source: str | None = None) -> list[str]:
    own = unit_of(module_name(path))
    if own == "":  # athanor/__init__.py is the public face above all floors
        return []
    if own not in FLOOR_OF:
        return [f"{path.relative_to(ROOT)}: '{own}' has no floor; give it one in FLOORS of {Path(__file__).name}"]
    problems = []
    for line, name in imports_of(path, source):
        unit = unit_of(name)
        if unit is None:
            continue
        where = f"{path.relative_to(ROOT)}:{line}: imports {name}"
        if unit not in FLOOR_OF:
            problems.append(f"{where}, which is no module with a floor; inside the tree import athanor.<module>")
        elif own == "kernels" and unit not in ("kernels", "_host"):
            problems.append(f"{where}; kernels/ knows nothing of engine/")
        elif FLOOR_OF[unit] > FLOOR_OF[own]:
            problems.append(f"{where}: floor {FLOOR_OF[unit]} from floor {FLOOR_OF[own]}")
        elif unit == "train":
            problems.append(f"{where}; train.py defines nothing that others import")
    return problems


def test_files_import_only_from_their_own_floor_or_below():
    problems = [problem for folder in ("engine", "kernels") for path in python_files(folder) for problem in floor_violations(path)]
    assert not problems, "\n".join(problems)


def test_modules_do_not_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {}
    for path in python_files("engine"):
        own = unit_of(module_name(path))
        below.setdefault(own, set()).update(unit for _, name in imports_of(path) if (unit := unit_of(name)) and unit != own)
    del below[""]
    while removable := [unit for unit, needs in below.items() if not needs & below.keys()]:
        for unit in removable:
            del below[unit]
    left = [f"{unit} -> {', '.join(sorted(needs & below.keys()))}" for unit, needs in below.items()]
    assert not left, "imports in a circle among: " + "; ".join(left)


@pytest.mark.parametrize(
    "path, line, message",
    [
        ("engine/losses/clip.py", "from athanor.model.transformer import Decoder", "floor 3 from floor 2"),
        ("engine/rollout.py", "import athanor.stages.grpo", "floor 6 from floor 5"),
        ("engine/rollout.py", "def f():\n    from athanor import pipeline", "floor 7 from floor 5"),
        ("engine/tasks/a.py", "importlib.import_module(f'athanor.stages.{name}')", "floor 6 from floor 2"),
        ("engine/surprise.py", "", "'surprise' has no floor"),
        ("engine/rollout.py", "from athanor import Generator", "no module with a floor"),
        ("kernels/sample.py", "from athanor.config import ModelConfig", "knows nothing of engine"),
        ("kernels/sample.py", "from ..errors import UserError", "knows nothing of engine"),
        ("engine/train.py", "import athanor.train", "defines nothing"),
    ],
)
def test_a_breach_of_the_floors_is_found(path, line, message):
    problems = floor_violations(ROOT / path, line)
    assert len(problems) == 1 and message in problems[0]


@pytest.mark.parametrize(
    "path, line",
    [
        ("engine/stages/sft.py", "from athanor.stages.training import TrainingLoop\nfrom athanor.kernels import sample"),
        ("kernels/sample.py", "from . import _philox\nfrom ._dispatch import register"),
        ("engine/pipeline.py", "import athanor.report, torch"),
    ],
)
def test_what_the_floors_allow_passes(path, line):
    assert floor_violations(ROOT / path, line) == []


def test_losses_advantages_and_rewards_know_no_process_group():
    for path in python_files("engine"):
        if unit_of(module_name(path)) in WITHOUT_PROCESSES:
            for line, name in imports_of(path):
                assert not f"{name}.".startswith(("athanor.parallel.", "torch.distributed.")), f"{path.relative_to(ROOT)}:{line}: imports {name}"


def test_engine_uses_absolute_imports():
    for path in python_files("engine"):
        relative = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, f"{path.relative_to(ROOT)}: relative import in line {relative[0]}; inside the tree import athanor.<module>"


def test_nobody_imports_train():
    for path in [path for folder in ("engine", "kernels", "bench", "tests") for path in python_files(folder)]:
        for line, name in imports_of(path):
            assert name.split(".")[:2] != ["athanor", "train"] and name.split(".")[0] != "train", f"{path.relative_to(ROOT)}:{line}: imports {name}"


@pytest.mark.parametrize("folder", ["engine", "bench"])  # both stand first on sys.path when their scripts are run
def test_no_module_hides_a_standard_or_well_known_one(folder):
    installed = {name for name, owners in importlib.metadata.packages_distributions().items() if set(owners) != {"athanor"}}
    names = {path.stem for path in (ROOT / folder).glob("*.py")} | {path.parent.name for path in (ROOT / folder).glob("*/*.py")}
    hidden = names & (set(sys.stdlib_module_names) | WELL_KNOWN | installed)
    assert not hidden, f"{folder}/: {', '.join(sorted(hidden))} would hide the module of that name when a script of {folder}/ is run"


def test_every_file_says_in_its_name_what_it_holds():
    for folder in ("engine", "kernels", "bench", "tests"):
        for path in python_files(folder):
            assert not VAGUE & set(path.relative_to(ROOT).with_suffix("").parts), f"{path.relative_to(ROOT)}: name what it holds"


def test_the_top_level_is_fixed():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout: the rule is about what is committed")
    listed = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True)
    extra = {name.split("/")[0] for name in listed.split("\0") if name} - TOP_LEVEL
    assert not extra, f"new at the top level: {', '.join(sorted(extra))}"


def test_package_folders_have_an_init_and_tests_have_none():
    # setup.py finds packages by __init__.py; a folder without one works in an editable install and is missing from the wheel.
    for path in python_files("engine") + python_files("kernels"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)}/ has no __init__.py"
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_have_no_version():
    # transformers takes a top-level `kernels` with a __version__ for the HuggingFace package.
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert "__version__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_no_file_holds_two_ideas():
    for folder in ("engine", "kernels", "csrc", "bench", "tests"):
        for path in sorted(path for pattern in SOURCES for path in (ROOT / folder).rglob(pattern)):
            num_lines = len(path.read_text().splitlines())
            assert num_lines <= 500, f"{path.relative_to(ROOT)} has {num_lines} lines, at most 500 are allowed"
            if num_lines > 400:
                warnings.warn(f"{path.relative_to(ROOT)} has {num_lines} lines; beyond 400 a file probably holds two ideas", stacklevel=1)


def test_import_athanor_is_cheap():
    code = "import sys, athanor; print([name for name in ('torch', 'triton', 'numpy', 'pydantic') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
