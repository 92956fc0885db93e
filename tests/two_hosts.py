"""Two hosts on one machine:  python tests/two_hosts.py [--keep FOLDER]      (Linux, root, iproute2)

Two network namespaces, each with an interface eth0 and an address of its own and nothing else in common but the file system, play the hosts; each
runs torchrun, and ranks meet over gloo.  Three runs of the micro recipe up to its stage `zero`:

    c10d, undisturbed        the bits that the others must end with
    static, undisturbed      --node-rank, --master-addr
    c10d, a host is lost     in the middle its link goes down and all its processes are killed; later it comes back and its torchrun is started again

Prints what happened when, and ends with 1 when a run's tokens, log-probs, weights, optimizer states, metrics or exported models differ.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS))
import chaos  # noqa: E402

HOSTS = {"a": "10.83.7.1", "b": "10.83.7.2"}
WORDS = ("--until", "zero", "--evaluation.stages", '["zero"]', "--deadlines.collective_s", "15")
LAUNCHERS = {
    "c10d": lambda host: ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS['a']}:29411", "--rdzv-id", "two-hosts", "--rdzv-conf",
                          f"is_host={int(host == 'a')}", "--local-addr", HOSTS[host], "--max-restarts", "3"],
    "static": lambda host: ["--node-rank", str(list(HOSTS).index(host)), "--master-addr", HOSTS["a"], "--master-port", "29412"],
}  # fmt: skip
IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
begun = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)


def ip(*words: str) -> str:
    return subprocess.run([IP, *words], check=True, capture_output=True, text=True).stdout


def why_not() -> str:
    """Why there can be no two hosts here; empty when there can."""
    if IP is None:
        return "no `ip` here (iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with network():
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are refused: {error.stderr.strip()}"


@contextlib.contextmanager
def network() -> Iterator[dict[str, str]]:
    """The namespaces' names by host, joined by a pair of interfaces."""
    names = {host: f"athanor-{os.getpid()}-{host}" for host in HOSTS}
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names["a"], "type", "veth", "peer", "name", "eth0", "netns", names["b"])
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                kill(name)
                ip("netns", "del", name)


def kill(name: str) -> int:
    """Kill every process of a host; return how many there were."""
    pids = list(map(int, ip("netns", "pids", name).split()))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def launch(name: str, host: str, launcher: str, folder: Path) -> subprocess.Popen:
    """torchrun on a host; its output goes to FOLDER/HOST.out and .err."""
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *LAUNCHERS[launcher](host)]
    # A store of their own for each start of the ranks (athanor.parallel); gloo would ask for the name of the host, which both share.
    environment = chaos.environment(folder) | {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / f"{host}.out", "a") as out, open(folder / f"{host}.err", "a") as err:
        arguments = [IP, "netns", "exec", name, sys.executable, *torchrun, *chaos.command(folder, 1, *WORDS)[1:]]
        return subprocess.Popen(arguments, stdout=out, stderr=err, env=environment)


def until(folder: Path, text: str, processes: dict[str, subprocess.Popen], seconds: float = 240) -> None:
    """Wait until metrics.jsonl has this text."""
    path, end = folder / "micro" / "metrics.jsonl", time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        ended = [host for host, process in processes.items() if process.poll() is not None]
        if ended or time.monotonic() > end:
            raise RuntimeError(f"waiting for {text}: {f'host {ended[0]} ended' if ended else 'too long'}\n{tail(folder)}")
        time.sleep(0.05)


def tail(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("?.err")))


def result(folder: Path, processes: dict[str, subprocess.Popen], seconds: float = 300) -> dict:
    """The outcome of a run whose hosts both end with status 0."""
    for host, process in processes.items():
        if process.wait(seconds):
            raise RuntimeError(f"host {host} ended with status {process.returncode}\n{tail(folder)}")
    out = "".join((folder / f"{host}.out").read_text() for host in HOSTS)
    return chaos.outcome(folder, subprocess.CompletedProcess([], 0, stdout=out))


def whole(names: dict[str, str], folder: Path, launcher: str) -> dict:
    return result(folder, {host: launch(name, host, launcher, folder) for host, name in names.items()})


def with_a_lost_host(names: dict[str, str], folder: Path) -> dict:
    """Lose host b in the middle of `zero`; give it back when host a has noticed."""
    processes = {host: launch(name, host, "c10d", folder) for host, name in names.items()}
    until(folder, '"zero", "step": 2', processes)
    ip("-n", names["b"], "link", "set", "eth0", "down")  # first, so that no connection is closed in order
    killed = kill(names["b"])
    processes.pop("b").wait(10)
    say(f"  zero has finished step 2: host b's link is down, its {killed} processes are killed")
    end = time.monotonic() + 120
    while not (said := [line for line in (folder / "a.err").read_text().splitlines() if line.startswith("watchdog: ")]):
        if time.monotonic() > end:
            raise RuntimeError(f"host a has not noticed\n{tail(folder)}")
        time.sleep(0.1)
    say(f"  host a: {said[0]}")
    time.sleep(5)
    ip("-n", names["b"], "link", "set", "eth0", "up")
    processes["b"] = launch(names["b"], "b", "c10d", folder)
    say("  host b is back, its torchrun is started again")
    return result(folder, processes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the runs and the hosts' output; default: a temporary one")
    options = parser.parse_args()
    if reason := why_not():
        print(f"two_hosts: {reason}", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        names = stack.enter_context(network())
        say(f"hosts {', '.join(f'{host} {address}' for host, address in HOSTS.items())}, one rank each, gloo over eth0")
        say("c10d rendezvous, undisturbed")
        wanted = whole(names, root / "c10d", "c10d")
        say(f"  ended; {len(wanted)} facts to compare")
        verdicts = []
        for title, run in (("static rendezvous", lambda: whole(names, root / "static", "static")),
                           ("c10d rendezvous, host b is lost", lambda: with_a_lost_host(names, root / "lost"))):  # fmt: skip
            say(title)
            found = run()
            wrong = chaos.differences(found, wanted) + sorted(wanted.keys() - found.keys())
            verdicts.append(not wrong)
            say(f"  ended: {'every bit as in the undisturbed run' if not wrong else 'differs in ' + ', '.join(wrong[:5])}")
    return int(not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
