"""Nodes on one machine: network namespaces with addresses of their own, and a Slurm over them.

Everything here is real: the kernel's namespaces, sshd, Debian's Slurm daemons. It needs root and
the packages that `.ci/run` installs. Whatever was started is ended by its process id, and nothing
listens outside the namespaces.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIRED = "MEGASPARSE_REQUIRE_SLURM"
SECONDS = 240.0  # that anything here may take, on a machine with much else to do


def require(*programs: str) -> None:
    """Skip the test, saying why, where nodes cannot be had; CI may not skip it."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [program for program in ("ip", *programs) if shutil.which(program) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else ""
    if os.geteuid() != 0:
        reason = "network namespaces and Slurm's daemons need root"
    elif not missing:
        probe = f"ip netns add probe{os.getpid()} && ip netns del probe{os.getpid()}"
        command = ["unshare", "--mount", "--uts", "sh", "-c", probe]
        done = subprocess.run(command, capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else ""
    if reason and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but: {reason}")
    if reason:
        pytest.skip(reason)


def environment(**more: str) -> dict[str, str]:
    """What a user's shell has, without what the test suite adds for itself."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "PYTEST", "GLOO_", "NCCL_", "MEGASPARSE_"))
        and name
        not in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "TRITON_INTERPRET",
        )
    }
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHON": sys.executable,
        **more,
    }


def wait_for(
    condition: Callable[[], bool], what: str, log: Path | None = None, pause: float = 0.1
) -> None:
    """Poll every `pause` seconds until the condition holds; fails after SECONDS."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            tail = log.read_text()[-3000:] if log is not None and log.exists() else ""
            pytest.fail(f"no {what} within {SECONDS:.0f} s\n{tail}")
        time.sleep(pause)


class Node:
    """A network namespace `name` with one address, and a host name."""

    def __init__(self, name: str, host: str, address: str) -> None:
        self.name, self.host, self.address = name, host, address

    def command(self, command: Sequence[str], mounts: Sequence[str] = ()) -> list[str]:
        """The command as this node runs it, under the node's host name.

        Args:
            mounts: shell commands before it, in a mount namespace of its own.
        """
        script = " && ".join([f"hostname {self.host}", *mounts, 'exec "$@"'])
        return [
            "nsenter",
            f"--net=/run/netns/{self.name}",
            "--",
            "unshare",
            "--uts",
            "--mount",
            "bash",
            "-c",
            script,
            "-",
            *command,
        ]

    def run(self, command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        """Run to the end on this node."""
        return subprocess.run(  # type: ignore[call-overload]
            self.command(command), capture_output=True, text=True, **options
        )


@contextmanager
def make_nodes(count: int, tag: str) -> Iterator[list[Node]]:
    """Namespaces joined by a bridge in a namespace of its own; gone afterwards."""
    prefix = f"{tag}{os.getpid()}"
    nodes = [Node(f"{prefix}n{i}", f"n{i}", f"10.77.0.{i}") for i in range(1, count + 1)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    with ExitStack() as stack:
        for name in (prefix, *(node.name for node in nodes)):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", prefix, "link", "add", "br0", "type", "bridge")
        ip("-n", prefix, "link", "set", "br0", "up")
        for number, node in enumerate(nodes):
            port = f"port{number}"
            ip(
                "-n",
                prefix,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "veth0",
                "netns",
                node.name,
            )
            ip("-n", prefix, "link", "set", port, "master", "br0", "up")
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "veth0")
            ip("-n", node.name, "link", "set", "veth0", "up")
        yield nodes


@contextmanager
def daemon(command: Sequence[str], log: Path, **options: object) -> Iterator[subprocess.Popen]:
    """A program that runs in the foreground until the end of the block, with all its children."""
    with open(log, "ab") as stream:
        process = subprocess.Popen(  # type: ignore[call-overload]
            command,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_all_in(node: Node) -> None:
    """End what still runs in the node's namespace (job steps survive their daemon)."""
    found = subprocess.run(
        ["ip", "netns", "pids", node.name], check=True, capture_output=True, text=True
    )
    for process in found.stdout.split():
        try:
            os.kill(int(process), 9)
        except ProcessLookupError:
            continue


class Slurm:
    """A cluster of some nodes; the controller is on the first."""

    def __init__(self, folder: Path, nodes: list[Node]) -> None:
        self.folder, self.nodes = folder, nodes
        self._environment = environment(SLURM_CONF=str(folder / "slurm.conf"))

    def run(self, *command: str, **variables: str) -> str:
        """A Slurm command as a user gives it on the first node, in the repository's root."""
        done = self.nodes[0].run(
            command, env={**self._environment, **variables}, cwd=ROOT, timeout=SECONDS
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str, **variables: str) -> str:
        """sbatch; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **variables)

    def facts(self, job: str) -> dict[str, str]:
        """`scontrol show job` by field."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_until(self, condition: Callable[[], bool], what: str, log: Path) -> None:
        """`wait_for` what a Slurm command says: starting one costs more than looking at a file."""
        wait_for(condition, what, log, pause=0.5)

    def wait(self, job: str, states: set[str], log: Path) -> dict[str, str]:
        """Poll until the job is in one of the states; its facts."""
        self.wait_until(
            lambda: self.facts(job)["JobState"] in states, f"state {states} of {job}", log
        )
        return self.facts(job)


_CONF = """
ClusterName=test
SlurmctldHost=n1({address})
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@contextmanager
def make_slurm(folder: Path, nodes: list[Node]) -> Iterator[Slurm]:
    """Munge, a controller and one slurmd a node, in the nodes' namespaces."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    lines = [
        f"NodeName={node.host} NodeAddr={node.address} CPUs=2 RealMemory=100 State=UNKNOWN"
        for node in nodes
    ]
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(address=nodes[0].address, folder=folder, nodes="\n".join(lines)).lstrip()
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    variables = environment(SLURM_CONF=str(conf))
    munge = [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    with ExitStack() as stack:
        stack.enter_context(daemon(nodes[0].command(munge), folder / "munged.out"))
        wait_for((folder / "munge.socket").exists, "munge", folder / "munged.out")
        for node in nodes:
            stack.callback(end_all_in, node)
        control = nodes[0].command(["slurmctld", "-D", "-i"])
        stack.enter_context(daemon(control, folder / "slurmctld.out", env=variables))
        for node in nodes:
            (folder / f"spool-{node.host}").mkdir()
            command = node.command(["slurmd", "-D", "-N", node.host])
            stack.enter_context(daemon(command, folder / f"slurmd-{node.host}.out", env=variables))
        slurm = Slurm(folder, nodes)

        def idle() -> bool:
            answer = nodes[0].run(["sinfo", "-h", "-o", "%T"], env=variables, timeout=SECONDS)
            return answer.stdout.split() == ["idle"]

        wait_for(idle, "idle cluster", folder / "slurmctld.log")
        yield slurm


_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
"""
_SSH = """
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@contextmanager
def make_ssh(folder: Path, nodes: list[Node]) -> Iterator[dict[str, str]]:
    """An sshd on every node, reached without a password; the variables that make it so."""
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    variables = environment(PATH=f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(end_all_in, node)
            conf = folder / f"sshd-{node.host}"
            conf.write_text(_SSHD.format(address=node.address, folder=folder))
            # sshd wants a folder of its own under /run, which need not be there.
            mounts = ["mount -t tmpfs none /run", "mkdir /run/sshd"]
            sshd = [shutil.which("sshd") or "", "-D", "-e", "-f", str(conf)]
            log = folder / f"sshd-{node.host}.log"
            stack.enter_context(daemon(node.command(sshd, mounts), log))
            probe = ["ssh", node.address, "true"]
            wait_for(
                lambda probe=probe: nodes[0].run(probe, env=variables).returncode == 0,  # type: ignore[misc]
                f"ssh to {node.host}",
                log,
            )
        yield variables
