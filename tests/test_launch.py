"""Launch files: what they start is a torchrun that its own parser accepts, on every node; Slurm and a cluster are played by scripts."""

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from athanor import launch

FOLDER = Path(launch.__file__).parent
SLURM, KUBERNETES, ENVIRONMENT = FOLDER / "slurm.sbatch", FOLDER / "kubernetes.yaml", FOLDER / "environment.sh"
WORDS = ["tiny", "--name", "two words", "--parallel.shard", "0"]

# Plays torchrun, writing down what it was given; plays the python that a dry run asks for with the status in DRY_RUN.
FAKES = {
    "torchrun": """#!PYTHON
import json, os, signal, sys, time
names = ("GLOO_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "NCCL_DEBUG")
with open(f"{os.environ['CALLS']}/torchrun.{os.getpid()}", "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": {name: os.environ.get(name) for name in names}}, file)
if os.environ.get("WAITS"):
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
    open(f"{os.environ['CALLS']}/waits.{os.getpid()}", "w").close()
    time.sleep(30)
sys.exit(int(os.environ.get("TORCHRUN", 0)))
""",
    "python": """#!/bin/bash
if [[ "$*" == *--dry-run* ]]; then echo "$*" > "$CALLS/dry_run"; exit ${DRY_RUN:-0}; fi
exec PYTHON "$@"
""",
    "scontrol": """#!/bin/bash
echo "$*" >> "$CALLS/scontrol"
[ "$1" != show ] || printf 'node3\\nnode4\\n'
""",
    # One task per node; a signal goes to all of them, and so does a failure.
    "srun": """#!PYTHON
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
tasks = [subprocess.Popen(words, env=os.environ | {"SLURM_NODEID": str(i)}) for i in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
""",
}


@pytest.fixture
def cluster(tmp_path):
    """Environment in which the names of FAKES are found first; calls are files in CALLS."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(text.replace("PYTHON", sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCH", "NCCL", "GLOO", "ATHANOR"))}
    return kept | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


def slurm(cluster: dict, **more: str) -> dict[str, str]:
    return cluster | {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_GPUS_ON_NODE": "4"} | more


def calls(cluster: dict) -> list[dict]:
    return [json.loads(path.read_text()) for path in Path(cluster["CALLS"]).glob("torchrun.*")]


def parsed(call: dict):
    """torchrun's own reading of its arguments."""
    from torch.distributed.run import config_from_args, get_args_parser

    options = get_args_parser().parse_args(call["arguments"])
    assert options.module and options.training_script == "athanor.train" and not options.standalone
    if options.nproc_per_node != "gpu" or torch.cuda.is_available():
        assert config_from_args(options)[0].rdzv_backend == "c10d"
    return options


def test_scripts_are_bash_and_files_are_printed():
    for path in (SLURM, ENVIRONMENT):
        assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    for name, path in (("slurm", SLURM), ("kubernetes", KUBERNETES), ("environment", ENVIRONMENT)):
        done = subprocess.run([sys.executable, "-m", "athanor.launch", name], capture_output=True, text=True)
        assert done.stdout == path.read_text() and done.returncode == 0
    assert subprocess.run([sys.executable, "-m", "athanor.launch", "mesos"], capture_output=True).returncode == 2


def test_the_environment_leaves_alone_what_is_set(cluster):
    code = f". {ENVIRONMENT}; env"
    found = [subprocess.run(["bash", "-euc", code], capture_output=True, text=True, env=cluster | more).stdout.splitlines()
             for more in ({}, {"ATHANOR_INTERFACE": "ib0", "GLOO_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "INFO"})]  # fmt: skip
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in found[0] and not any("IFNAME" in line for line in found[0])
    assert {"GLOO_SOCKET_IFNAME=eth1", "NCCL_SOCKET_IFNAME=ib0", "NCCL_DEBUG=INFO"} <= set(found[1])


def test_every_variable_is_one_that_torch_reads():
    """NCCL's and gloo's own aside."""
    folder = Path(torch.__file__).parent
    texts = [path.read_bytes() for path in (folder / "include" / "torch" / "csrc" / "distributed" / "c10d").glob("*.hpp")]
    texts += [path.read_bytes() for path in (folder / "distributed" / "elastic" / "rendezvous").glob("*.py")]
    with open(folder / "lib" / "libtorch_cpu.so", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        for name in re.findall(r"export (TORCH_\w+)=", ENVIRONMENT.read_text()):
            assert any(name.encode() in text for text in texts) or library.find(name.encode()) >= 0, name


def test_slurm_starts_one_torchrun_per_node(cluster):
    done = subprocess.run(["bash", SLURM, *WORDS], capture_output=True, text=True, env=slurm(cluster, ATHANOR_INTERFACE="ib0"), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found = [parsed(call) for call in calls(cluster)]
    assert sorted(options.rdzv_conf for options in found) == [f"is_host={i},join_timeout=1800" for i in (0, 1)]
    for options, call in zip(found, calls(cluster), strict=True):
        assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint, options.rdzv_id) == ("2", "4", "node3:23456", "123456")
        assert options.max_restarts == 3 and options.training_script_args == WORDS
        assert call["environment"] == {"GLOO_SOCKET_IFNAME": "ib0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "NCCL_DEBUG": "WARN"}
    assert (Path(cluster["CALLS"]) / "scontrol").read_text() == "show hostnames node[3-4]\n"


def test_slurm_queues_again_after_the_signal_alone(cluster):
    failed = subprocess.run(["bash", SLURM, *WORDS], env=slurm(cluster, TORCHRUN="1"), timeout=60)
    assert failed.returncode == 1 and "requeue" not in (Path(cluster["CALLS"]) / "scontrol").read_text()
    process = subprocess.Popen(["bash", SLURM, *WORDS], env=slurm(cluster, WAITS="1"))
    until = time.time() + 60
    while len(list(Path(cluster["CALLS"]).glob("waits.*"))) < 2:
        assert time.time() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (Path(cluster["CALLS"]) / "scontrol").read_text().endswith("requeue 123456\n")


def test_bad_input_never_reaches_the_nodes(cluster):
    done = subprocess.run(["bash", SLURM, *WORDS], env=slurm(cluster, DRY_RUN="2"), timeout=60)
    assert done.returncode == 2 and not calls(cluster)
    assert (Path(cluster["CALLS"]) / "dry_run").read_text() == "-m athanor.train tiny --name two words --parallel.shard 0 --dry-run\n"


def test_sbatch_knows_its_options():
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task exclusive time signal requeue open-mode output".split()
    given = re.findall(r"^#SBATCH --([a-z-]+)", SLURM.read_text(), re.M)
    assert given == known and SLURM.read_text().startswith("#!/bin/bash\n")
    before = SLURM.read_text().split("#SBATCH")[0]  # sbatch reads no further than the first command
    assert all(line.startswith("#") or not line for line in before.splitlines())


def test_kubernetes_starts_one_torchrun_per_pod(cluster):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (it comes with transformers)")
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == ("v1", "Service", "batch/v1", "Job")
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    given = {entry["name"]: entry.get("value", "10.0.0.7") for entry in container["env"]}
    assert str(spec["completions"]) == str(spec["parallelism"]) == given["NODES"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for index in (0, 1):
        environment = cluster | given | {"JOB_COMPLETION_INDEX": str(index)}
        done = subprocess.run([*container["command"], *container["args"]], capture_output=True, text=True, env=environment, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    found = {options.rdzv_conf: options for options in map(parsed, calls(cluster))}
    assert sorted(found) == ["is_host=0,join_timeout=1800", "is_host=1,join_timeout=1800"]
    for options in found.values():
        assert (options.nnodes, options.rdzv_endpoint, options.local_addr) == ("2", f"{name}-0.{pod['subdomain']}:29400", "10.0.0.7")
        assert options.training_script_args == container["args"][2:]
    refused = subprocess.run([*container["command"], *container["args"]], env=environment | {"DRY_RUN": "2"}, timeout=60)
    failing = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert [refused.returncode] in failing


def test_a_run_that_is_told_to_leave_ends_with_the_status_that_the_launcher_wants(monkeypatch, capsys):
    import importlib.util

    from athanor import preemption

    script = importlib.util.spec_from_file_location("train_script", FOLDER.parent / "train.py")
    train = importlib.util.module_from_spec(script)
    script.loader.exec_module(train)

    def stops(_):
        raise preemption.Stopped("stopped by SIGTERM")

    monkeypatch.setattr(train, "_train", stops)
    monkeypatch.delenv("ATHANOR_STOPPED_STATUS", raising=False)
    assert train.main([]) == 0
    monkeypatch.setenv("ATHANOR_STOPPED_STATUS", "75")
    assert train.main([]) == 75 and "stopped by SIGTERM" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_of_the_files_is_found_as_a_module():
    done = subprocess.run([sys.executable, "-m", "athanor.train", "--list"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "r1_zero" in done.stdout
