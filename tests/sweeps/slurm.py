"""A Slurm of one node on this machine, from Debian's packages (apt-get install slurm-wlm), for tests."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
KillWait=2
"""


def why_not() -> str:
    """Returns why there can be none here, or nothing."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed (apt-get install slurm-wlm)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root alone"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def one_node(folder: Path):
    """Yields the environment in which Slurm's commands find it. Neither munge nor accounting is asked for."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    ports = {"controller": free_port(), "node": free_port()}
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, cpus=os.cpu_count(), **ports))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    with open(folder / "log", "w") as log:
        daemons = [
            subprocess.Popen([*command, "-D"], env=environment, stdout=log, stderr=log)
            for command in (["slurmctld"], ["slurmd", "-N", host])
        ]
    try:
        for _ in range(120):
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
            if state.stdout.strip() == "idle":
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"Slurm does not start:\n{(folder / 'log').read_text()[-2000:]}")
        yield environment
    finally:
        subprocess.run(["scancel", "--me"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
