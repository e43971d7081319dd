"""Pretended sites: what Slurm's commands answer at each, in the layout of 22.05 (seen on the dev cluster)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.errors import WorldError
from launcher.slurm import Answer

CONFIG = """Configuration data as of 2026-11-25T19:58:41
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = socket=/run/munge,cred_expire=10
ClusterName             = {name}
JobRequeue              = {requeue}
KillWait                = 30 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MpiDefault              = {mpi}
PowerPlugin             = 
PreemptType             = preempt/none
DefMemPerNode           = UNLIMITED
SelectTypeParameters    = {select}
SLURM_VERSION           = 22.05.8
SlurmdTimeout           = 300 sec

Slurmctld(primary) at ctl is UP
"""


def partition(name: str, nodes: int, **said: str) -> str:
    """A line of `scontrol --oneliner show partition`."""
    usual = {"AllowGroups": "ALL", "AllowAccounts": "ALL", "Default": "NO", "DefaultTime": "NONE", "RootOnly": "NO"}
    more = {
        "MaxNodes": "UNLIMITED",
        "MaxTime": "1-00:00:00",
        "OverSubscribe": "NO",
        "State": "UP",
        "PreemptMode": "OFF",
    }
    words = {"PartitionName": name, **usual, **more, "MaxCPUsPerNode": "UNLIMITED", "TotalNodes": str(nodes), **said}
    return " ".join(f"{key}={value}" for key, value in words.items()) + " TRES=cpu=256,node=4,gres/gpu=32"


@dataclass
class FakeSite:
    """Answers what `launcher.site.ask` asks; `refuses` says what sbatch has against a list of options."""

    partitions: list[str]
    sinfo: str
    refuses: Callable[[list[str]], str | None] = lambda options: None
    name: str = "site"
    requeue: str = "1"
    mpi: str = "none"
    select: str = "CR_CORE_MEMORY"
    assoc: str = "proj|normal|\n"
    qos: str = "normal||||\n"
    default_account: str = "proj\n"
    srun_help: str = ""
    absent: tuple[str, ...] = ()
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def call(self, *argv: str, timeout: float = 10.0) -> Answer:
        self.asked.append(argv)
        if argv[0] in self.absent:
            raise WorldError(f"no {argv[0]} here: this needs Slurm's commands, as a login node has them")
        if argv[0] == "sbatch":
            said = self.refuses([word for word in argv[2:] if word != "--wrap=true"])
            return (
                Answer(0, "", "sbatch: Job 1 to start")
                if said is None
                else Answer(1, "", f"allocation failure: {said}")
            )
        return Answer(0, self._text(argv), "")

    def _text(self, argv: tuple[str, ...]) -> str:
        if argv[:3] == ("scontrol", "show", "config"):
            values = {key: getattr(self, key) for key in ("name", "requeue", "mpi", "select")}
            return CONFIG.format(**values)
        if argv[0] == "scontrol":
            return "\n".join(self.partitions) + "\n"
        if argv[0] == "sinfo":
            return self.sinfo
        if argv[0] == "sacctmgr":
            return {"assoc": self.assoc, "user": self.default_account, "qos": self.qos}[argv[4]]
        if argv == ("srun", "--help"):
            return self.srun_help
        return "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n"
