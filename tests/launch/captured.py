"""What Slurm's commands print (`toolkit.launch.site.read_site`), on the development cluster and on clusters of other kinds."""

from __future__ import annotations

from toolkit.launch.site import Site, parse_site

# Slurm 22.05.8; of `scontrol show config` the lines that matter.
DEV_CONFIG = """\
Configuration data as of 2026-11-21T12:09:05
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = dev
DefMemPerNode           = UNLIMITED
JobSubmitPlugins        = (null)
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
_REST = (
    "AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default={default} QoS=N/A DefaultTime=00:10:00 "
    "DisableRootJobs=NO ExclusiveUser=NO GraceTime={grace} Hidden=NO MaxNodes=UNLIMITED MaxTime={time} MinNodes=0 LLN=NO "
    "MaxCPUsPerNode=UNLIMITED Nodes=127.0.0.[1-4] PriorityJobFactor=1 PriorityTier={tier} RootOnly=NO ReqResv=NO OverSubscribe=NO "
    "OverTimeLimit=NONE PreemptMode={mode} State=UP TotalCPUs=16 TotalNodes=4 SelectTypeParameters=NONE JobDefaults=(null) "
    "DefMemPerCPU=4000 MaxMemPerNode=UNLIMITED TRES=cpu=16,mem=62.50G,node=4,billing=16,gres/gpu=8"
)
DEV_PARTITIONS = "\n".join(
    f"PartitionName={name} " + _REST.format(default=default, grace=grace, time=time, tier=tier, mode=mode)
    for name, default, grace, time, tier, mode in (
        ("cpu", "YES", 0, "UNLIMITED", 10, "OFF"),
        ("gpu", "NO", 0, "UNLIMITED", 10, "OFF"),
        ("short", "NO", 0, "00:03:00", 10, "OFF"),
        ("high", "NO", 0, "UNLIMITED", 20, "OFF"),
        ("preemptible", "NO", 10, "UNLIMITED", 1, "REQUEUE"),
        ("nograce", "NO", 0, "UNLIMITED", 1, "CANCEL"),
    )
)
DEV_NODES = "\n".join(
    f"{name}|gpu:2|4|16000|(null)|4" for name in ("cpu", "gpu", "short", "high", "preemptible", "nograce")
)
DEV_QOS = """\
normal|||||||cluster|00:00:00
few|00:03:00|4|gres/gpu=1|node=2|cpu=64|normal|requeue|00:00:30
"""
DEV_ASSOCIATIONS = """\
dev|dev||few,normal||1-12:00:00|7
dev|root||few,normal|||
"""

# A university: typed GPUs of two kinds, MIG slices, an account that is mandatory, preemption by QOS, partitions for some only.
CAMPUS_CONFIG = """\
AccountingStorageEnforce = associations,limits,qos,safe
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = campus
DefMemPerCPU            = 1024
JobSubmitPlugins        = (null)
PreemptMode             = CANCEL
PreemptType             = preempt/qos
SLURM_VERSION           = 24.05.4
"""
CAMPUS_PARTITIONS = """\
PartitionName=normal AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=login[1-4] Default=YES QoS=N/A GraceTime=0 MaxNodes=UNLIMITED MaxTime=7-00:00:00 PriorityTier=1 PreemptMode=CANCEL State=UP TotalNodes=300
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=gpu_part GraceTime=0 MaxNodes=8 MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=CANCEL State=UP TotalNodes=40
PartitionName=gpu-dev AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A GraceTime=0 MaxNodes=2 MaxTime=01:00:00 PriorityTier=1 PreemptMode=CANCEL State=UP TotalNodes=40
PartitionName=owners AllowGroups=rich AllowAccounts=rich_lab AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED PriorityTier=1 PreemptMode=CANCEL State=UP TotalNodes=10
PartitionName=old AllowGroups=ALL DenyAccounts=lab AllowQos=long AllocNodes=ALL Default=NO QoS=N/A GraceTime=0 MaxTime=UNLIMITED PriorityTier=1 PreemptMode=CANCEL State=DRAIN TotalNodes=5
"""
CAMPUS_NODES = """\
normal|(null)|64|256000|icelake,ib|200
normal|(null)|128|512000+|genoa,ib|100
gpu|gpu:a100:4(S:0-1)|64|1024000|a100,nvlink|30
gpu|gpu:v100:2(S:0-1),nvme:1|40|380000|v100|10
gpu-dev|gpu:3g.20gb:4,gpu:a100:2(S:0)|64|1024000|a100|1
owners|gpu:h100:8(S:0-1)|96|2048000|h100|10
"""
CAMPUS_QOS = """\
normal|1-00:00:00|500|||||cluster|00:00:00
scavenger|||||||cancel|00:02:00
long|7-00:00:00|20||gres/gpu=8||scavenger|cluster|00:00:00
gpu_part|||gres/gpu=16|||scavenger|cluster|00:00:00
"""
CAMPUS_ASSOCIATIONS = """\
campus|lab||normal,scavenger|normal||100
campus|teaching|gpu-dev|normal|normal|04:00:00|
other|elsewhere||normal||||
"""


def development() -> Site:
    return parse_site(DEV_CONFIG, DEV_PARTITIONS, DEV_NODES, DEV_QOS, DEV_ASSOCIATIONS, "dev\n", frozenset({"root"}))


def campus(account: str = "lab\n") -> Site:
    return parse_site(
        CAMPUS_CONFIG,
        CAMPUS_PARTITIONS,
        CAMPUS_NODES,
        CAMPUS_QOS,
        CAMPUS_ASSOCIATIONS,
        account,
        frozenset({"students"}),
    )


def national() -> Site:
    """No QOS and no associations to be seen, no default partition, whole nodes without GPUs in Slurm, a plugin that finds queues."""
    config = "ClusterName = national\nJobSubmitPlugins = lua\nPreemptType = preempt/none\nSLURM_VERSION = 23.11.1\n"
    partition = (
        "PartitionName=batch AllowGroups=ALL AllocNodes=ALL Default=NO MaxTime=12:00:00 State=UP TotalNodes=500\n"
    )
    return parse_site(config, partition, "batch|(null)|72|200000|gh200|500\n")
