#!/usr/bin/env python3
"""A private, real Slurm cluster of several nodes on one machine, up in seconds and gone without a trace.

    with DevCluster(Path("/tmp/dev"), nodes=4) as cluster:
        cluster.run("srun", "--nodes=4", "hostname")

It is Slurm itself, with munge and, for accounting, slurmdbd on MariaDB. It runs as root or as an ordinary user (then
all of it runs as that user), several side by side. ``slurm.conf.in`` lists partitions and timeouts; README.md says what
such a cluster can show and what it can't. The standard library suffices.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from keeper import alive, descendants, kill
from ports import BLOCK, claim_ports

HERE = Path(__file__).resolve().parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd")

GPU_DEVICES = ("/dev/null", "/dev/zero")  # a node's GPUs. Slurm wants character devices, each only once, and opens none
MEMORY_PER_CPU = 4000  # MB
MAX_NODES = BLOCK - 2  # the controller and the accounting have a port too
MAX_ROOT = 60  # characters: names of sockets in it must fit into 107
STARTUP = 180.0  # seconds that a daemon may take until it answers; it takes one, unless the machine is busy

# One call; sacctmgr takes half a second for each line: it sends a message as two packets, the second after the kernel's
# delayed acknowledgement of the first.
ASSOCIATIONS = """\
add qos few MaxSubmitJobsPerUser=4 MaxWall=3
add cluster dev qos=normal,few
add account dev
add user {user} account=dev defaultaccount=dev
"""


class DevClusterError(Exception):
    """The cluster, or a command on it, did not do what it should; the message says what to look at."""


def missing_programs(accounting: bool = True) -> list[str]:
    """The programs that a cluster needs and this machine lacks; ``install.sh`` installs them on Debian and Ubuntu."""
    needed = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    return [program for program in needed if shutil.which(program, path=_search_path()) is None]


class DevCluster:
    """A cluster that lives from ``start`` to ``stop``, as a context manager or between calls of these.

    Whatever ends this process, kill -9 included, ends the cluster with its jobs and removes ``root``. Nodes are named
    127.0.0.1, 127.0.0.2, …; each has ``cpus`` cores and two GPUs that compute nothing. The user who starts it has the
    account ``dev`` and the QOS ``normal`` and ``few``.

    Args:
        root: the cluster's own directory, which must not exist yet, or be empty; a short path, on a local disk.
        accounting: with slurmdbd: sacct, QOS and their limits. Without, the cluster is up in a second instead of four.
        overrides: keys of slurm.conf with their values, in which ``$root`` may stand, e.g. ``SlurmdTimeout=60``.
    """

    def __init__(
        self, root: Path, nodes: int = 4, cpus: int = 4, accounting: bool = True, **overrides: str | int
    ) -> None:
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"a development cluster has 1 to {MAX_NODES} nodes, not {nodes}")
        self.root = Path(root).resolve()
        self.nodes = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.accounting = accounting
        self._overrides = {key: str(value) for key, value in overrides.items()}
        self._user = pwd.getpwuid(os.geteuid()).pw_name
        self._port = 0  # the controller's; then come the accounting's and the nodes'
        self._daemons: dict[str, int] = {}  # process ids by name
        self._keeper: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None  # to the keeper

    # --- for commands -----------------------------------------------------------------------------------------------

    @property
    def conf(self) -> Path:
        """The cluster's slurm.conf."""
        return self.root / "etc/slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment for commands: this process's, pointed at the cluster and free of another job's variables."""
        foreign = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.conf)}

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 60.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the cluster and return what it wrote.

        Raises DevClusterError with its words if it fails and ``check`` is set, subprocess.TimeoutExpired after
        ``timeout`` seconds.
        """
        done = subprocess.run(
            list(map(str, command)),
            env=self.env | {"PATH": _search_path()},
            input=stdin,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            words = (done.stderr or done.stdout).strip()[-2000:]
            raise DevClusterError(f"{shlex.join(done.args)} ended with {done.returncode}: {words}")
        return done

    def jobs(self) -> list[dict[str, str]]:
        """All jobs that the controller remembers: ``id``, ``name``, ``state``, ``reason``, ``nodes`` (a node list)."""
        keys = ("id", "name", "state", "reason", "nodes")
        out = self.run("squeue", "--states=all", "--noheader", "--format=%i\t%j\t%T\t%r\t%N").stdout
        return [dict(zip(keys, line.split("\t"), strict=True)) for line in out.splitlines()]

    def sacct(self, *fields: str) -> list[dict[str, str]]:
        """The accounting's rows, one for each start of each job, with these of sacct's fields.

        The controller reports to the accounting every five seconds; until then a job has no row.
        """
        rows = ("--allocations", "--duplicates", "--allusers", "--starttime=now-7days")
        out = self.run("sacct", *rows, "--noheader", "--parsable2", f"--format={','.join(fields)}").stdout
        return [dict(zip(fields, line.split("|"), strict=True)) for line in out.splitlines()]

    def processes(self, node: str | None = None) -> list[int]:
        """The ids of all processes of jobs, their step daemons included, on one node or on all of them."""
        assert self._keeper is not None
        controller = self._daemons.get("slurmctld")
        daemons = {*self._daemons.values(), *(descendants(controller) if controller else ())}
        found = [process for process in descendants(self._keeper.pid) if process not in daemons]
        if node is None:
            return found
        tops = [process for process in found if self._runs_on(process, node)]
        here = {*tops, *(child for process in tops for child in descendants(process))}
        return [process for process in found if process in here]

    # --- what may go wrong on a cluster -----------------------------------------------------------------------------

    def kill_controller(self) -> None:
        """kill -9 slurmctld. ``start_controller`` starts it again, from what it had saved."""
        self._kill("slurmctld")

    def start_controller(self) -> None:
        self._spawn("slurmctld", ["slurmctld", "-D"])
        self._wait_for_port("slurmctld", self._port)

    def pause_controller(self) -> None:
        """slurmctld hangs: it takes connections and answers none, until ``resume_controller``."""
        os.kill(self._daemons["slurmctld"], signal.SIGSTOP)

    def resume_controller(self) -> None:
        os.kill(self._daemons["slurmctld"], signal.SIGCONT)

    def stop_accounting(self) -> None:
        """kill -9 slurmdbd; its database stays for ``start_accounting``."""
        self._kill("slurmdbd")

    def start_accounting(self) -> None:
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self._wait_for_port("slurmdbd", self._port + 1)

    def kill_slurmd(self, node: str) -> None:
        """kill -9 slurmd alone: the node will be taken for dead, and its tasks live on."""
        self._kill(f"slurmd-{node}")

    def crash_node(self, node: str) -> None:
        """The node dies: slurmd, then the step daemons before they can report, then the tasks."""
        self._kill(f"slurmd-{node}")
        deadline = time.monotonic() + 10
        while left := self.processes(node):  # again, for what was forked meanwhile
            if time.monotonic() > deadline:
                raise DevClusterError(f"processes of node {node} outlive kill -9: {left}")
            kill(left)
            time.sleep(0.01)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd and wait until the node is up."""
        self._spawn_node(node)
        self._wait_for_port(node, self._port + 2 + self.nodes.index(node))
        self._wait(f"{node} to register", lambda: self._up([node]))

    def set_node(self, node: str, state: str, reason: str = "set by hand") -> None:
        """``scontrol update``: down, drain, resume, …"""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", f"Reason={reason}")

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> DevCluster:
        """Start all and wait until every node is idle; raises DevClusterError with the log's end of what failed."""
        for _ in range(2):
            try:
                return self._start()
            except DevClusterError as error:
                # Ports were free when looked at; another program may have been quicker.
                if "Address already in use" not in str(error):
                    raise
        return self._start()

    def stop(self, keep: bool = False) -> None:
        """End every process of the cluster, jobs included, and remove ``root`` unless it is to be kept."""
        if self._keeper is None or self._line is None:
            return
        if keep:
            (self.root / "keep").touch()
        self._line.close()
        self._keeper.wait(60)
        self._keeper = self._line = None
        self._daemons.clear()

    def detach(self) -> None:
        """Let the cluster live on without this process, until ``stop_detached``."""
        assert self._keeper is not None and self._line is not None
        (self.root / "keeper.pid").write_text(str(self._keeper.pid))
        self._line.send(b"null")
        self._line.close()
        self._keeper.returncode = 0  # nobody here waits for it any more
        self._keeper = self._line = None

    def __enter__(self) -> DevCluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> DevCluster:
        if lacking := missing_programs(self.accounting):
            raise DevClusterError(f"not installed: {', '.join(lacking)}. On Debian or Ubuntu: bash {HERE}/install.sh")
        if len(str(self.root)) > MAX_ROOT:
            raise DevClusterError(f"{self.root} is too long for sockets; take a path of at most {MAX_ROOT} characters")
        if self.root.exists() and any(self.root.iterdir()):
            raise DevClusterError(f"{self.root} is not empty: a cluster wants a directory of its own")
        if self.root.exists() and self.root.stat().st_uid != os.geteuid():
            raise DevClusterError(f"{self.root} belongs to somebody else: a cluster wants a directory of its own")
        try:
            self._start_keeper()
            self._write_files()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def _start_keeper(self) -> None:
        claim, self._port = claim_ports(len(self.nodes) + 2)
        (self.root / "log").mkdir(parents=True)
        # As root, jobs of other users must reach the configuration and munge.
        self.root.chmod(0o755 if os.geteuid() == 0 else 0o700)
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with claim, theirs, (self.root / "log/keeper.out").open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HERE / "keeper.py"), str(self.root)],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                pass_fds=[claim.fileno()],  # the claim lasts as long as the keeper
                env=self.env | {"PATH": _search_path(), "MYSQL_UNIX_PORT": str(self.root / "database/mariadb.sock")},
                cwd="/",
                start_new_session=True,  # so that Ctrl-C leaves the order of things to us
            )

    def _write_files(self) -> None:
        spools = [f"spool/{node}" for node in self.nodes]
        for name in ("etc", "run", "state", "munge", "database", "database-tmp", "dev", *spools):
            (self.root / name).mkdir(parents=True)
        # Who reaches the database, which knows no passwords, writes files as its user.
        for private in ("munge", "database", "database-tmp"):
            (self.root / private).chmod(0o700)
        _write_private(self.root / "munge/key", secrets.token_bytes(128))
        for number, device in enumerate(GPU_DEVICES):
            (self.root / f"dev/gpu{number}").symlink_to(device)

        first = self._port + 2
        names = {
            "root": str(self.root),
            "user": self._user,
            "host": socket.gethostname().split(".")[0],
            "controller_port": str(self._port),
            "accounting_port": str(self._port + 1),
            "nodes": f"127.0.0.[1-{len(self.nodes)}]",
            "node_ports": f"[{first}-{first + len(self.nodes) - 1}]",
            "cpus": str(self.cpus),
            "memory": str(MEMORY_PER_CPU * self.cpus),
            "memory_per_cpu": str(MEMORY_PER_CPU),
            "gpus": str(len(GPU_DEVICES)),
        }
        lines = (HERE / "slurm.conf.in").read_text().splitlines()
        lines = [line for line in lines if line.partition("=")[0] not in self._overrides]
        if not self.accounting:
            lines = [line for line in lines if not line.startswith("AccountingStorage")]
        lines += [f"{key}={value}" for key, value in self._overrides.items()]
        self.conf.write_text(string.Template("\n".join(lines) + "\n").substitute(names))
        gpus = f"NodeName={names['nodes']} Name=gpu File={self.root}/dev/gpu[0-{len(GPU_DEVICES) - 1}]\n"
        (self.root / "etc/gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        accounting = string.Template((HERE / "slurmdbd.conf.in").read_text()).substitute(names)
        _write_private(self.root / "etc/slurmdbd.conf", accounting.encode())

    def _start_daemons(self) -> None:
        files = [f"--socket={self.root}/run/munge.sock", f"--pid-file={self.root}/run/munged.pid"]
        files += [f"--key-file={self.root}/munge/key", f"--seed-file={self.root}/munge/seed"]
        self._spawn("munged", ["munged", "--foreground", "--force", "--num-threads=2", *files])
        self._wait("munged", (self.root / "run/munge.sock").exists)
        if self.accounting:
            self._start_database()
            self.start_accounting()
            self.run("sacctmgr", "-i", stdin=ASSOCIATIONS.format(user=self._user))
        self.start_controller()
        for node in self.nodes:
            self._spawn_node(node)
        self._wait("the nodes", lambda: self._up(self.nodes))

    def _start_database(self) -> None:
        options = [f"--datadir={self.root}/database", f"--user={self._user}", "--skip-name-resolve"]
        options = ["--no-defaults", *options, "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M"]
        # A directory of its own for temporary tables: each mariadbd that starts removes all it finds there.
        options += [f"--tmpdir={self.root}/database-tmp"]
        # What mariadb-install-db does; that program is in a larger package.
        scripts = next(p for p in map(Path, ("/usr/share/mysql", "/usr/share/mariadb")) if p.exists())
        names = ("mysql_system_tables", "mysql_performance_tables", "mysql_system_tables_data")
        tables = "".join((scripts / f"{name}.sql").read_text() for name in names)
        bootstrap = ("--bootstrap", "--silent-startup", "--log-warnings=0", "--enforce-storage-engine=")
        sql = f"create database mysql;\nuse mysql;\nset @auth_root_socket=NULL;\n{tables}"
        self.run("mariadbd", *options, *bootstrap, stdin=sql)
        # A socket instead of a port. Nothing waits for the disk: what is in it need not survive the machine.
        options += [f"--socket={self.root}/database/mariadb.sock", "--skip-networking", "--performance-schema=OFF"]
        options += [f"--pid-file={self.root}/run/mariadbd.pid", "--innodb-lock-wait-timeout=900"]
        options += ["--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
        self._spawn("mariadbd", ["mariadbd", *options])
        self._wait("mariadbd", (self.root / "database/mariadb.sock").exists)

    # --- daemons ----------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, argv: list[str], cwd: Path | None = None) -> None:
        """Start a daemon, in the foreground, as a child of the keeper."""
        assert self._line is not None
        request = {"argv": argv, "cwd": str(cwd or self.root), "log": f"{self.root}/log/{name}.out"}
        try:
            self._line.send(json.dumps(request).encode())
            self._daemons[name] = int(self._line.recv(64))
        except (OSError, ValueError) as error:
            raise DevClusterError(f"could not start {name}: the keeper has ended:\n{self._log('keeper')}") from error

    def _log(self, name: str) -> str:
        lines = (self.root / f"log/{name}.out").read_text(errors="replace").splitlines()
        return "\n".join(lines[-10:])

    def _spawn_node(self, node: str) -> None:
        # Step daemons inherit the working directory, and nothing else tells whose they are: see _runs_on.
        self._spawn(f"slurmd-{node}", ["slurmd", "-D", "-N", node], cwd=self.root / "spool" / node)

    def _kill(self, name: str) -> None:
        process = self._daemons.pop(name, None)  # none: killed before
        while process is not None and alive(process):
            kill([process])
            time.sleep(0.01)

    def _runs_on(self, process: int, node: str) -> bool:
        """Whether it is a node's step daemon or has the environment of a task there; their children may have neither."""
        directory = Path(f"/proc/{process}")
        with contextlib.suppress(OSError):
            if (directory / "cwd").readlink() == self.root / "spool" / node:
                return True
            return f"SLURMD_NODENAME={node}".encode() in (directory / "environ").read_bytes().split(b"\0")
        return False

    def _up(self, nodes: list[str]) -> bool:
        listing = self.run("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%N %T", check=False).stdout
        state = dict(line.split() for line in listing.splitlines())
        # "idle*", "down*" and the like do not answer; before a node registers at all, it is "unknown".
        return all(not state.get(node, "*").endswith(("*", "down", "unknown")) for node in nodes)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Poll until ``condition``; raises DevClusterError if a daemon ends or ``STARTUP`` seconds pass."""
        deadline = time.monotonic() + STARTUP
        while not condition():
            ended = [name for name, process in self._daemons.items() if not alive(process)]
            if ended:
                raise DevClusterError(f"{ended[0]} has ended, waiting for {what}:\n{self._log(ended[0])}")
            if time.monotonic() > deadline:
                raise DevClusterError(f"waited {STARTUP:.0f} s for {what} in vain; is the machine overloaded?")
            time.sleep(0.03)

    def _wait_for_port(self, what: str, port: int) -> None:
        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        self._wait(what, answers)


def stop_detached(root: Path, keep: bool = False) -> None:
    """Stop a cluster that ``detach`` left; raises DevClusterError if there is none in ``root``."""
    try:
        keeper = int((root / "keeper.pid").read_text())
    except FileNotFoundError:
        raise DevClusterError(f"no cluster was started in {root}") from None
    arguments = Path(f"/proc/{keeper}/cmdline")
    if not alive(keeper) or str(root).encode() not in arguments.read_bytes().split(b"\0"):
        raise DevClusterError(f"the cluster in {root} has ended already; remove the directory: rm -r {root}")
    if keep:
        (root / "keep").touch()
    os.kill(keeper, signal.SIGTERM)
    while alive(keeper):
        time.sleep(0.02)
    if keep:
        (root / "keeper.pid").unlink()


def _search_path() -> str:
    """Where programs are looked for: an ordinary user's PATH lacks the directories of daemons."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin:/sbin"


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


# --- command line ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A private, real Slurm cluster on this machine.",
        epilog='eval "$(python slurm/devcluster.py start /tmp/dev)" starts one and points this shell\'s sbatch, … to it.',
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="start | stop | run")
    start = verbs.add_parser("start", help="start a cluster in the background and print what the shell must set")
    stop = verbs.add_parser("stop", help="end a cluster with all its jobs and remove its directory")
    run = verbs.add_parser(
        "run", help="start a cluster, run a command on it, stop it, and exit with the command's status"
    )
    for verb in (start, stop):
        verb.add_argument("directory", type=Path, metavar="DIR", help="the cluster's own directory")
    for verb in (start, run):
        verb.add_argument("--nodes", type=int, default=4, metavar="N", help="number of nodes (%(default)s)")
        verb.add_argument("--cpus", type=int, default=4, metavar="N", help="cores of each node (%(default)s)")
        verb.add_argument(
            "--no-accounting", action="store_true", help="no sacct, no QOS: up in a second instead of four"
        )
    stop.add_argument("--keep", action="store_true", help="leave the directory, with the logs")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.verb == "stop":
        stop_detached(arguments.directory.resolve(), arguments.keep)
        return 0
    root = arguments.directory if arguments.verb == "start" else Path(f"/tmp/slurm-{secrets.token_hex(4)}")
    cluster = DevCluster(root, arguments.nodes, arguments.cpus, not arguments.no_accounting)
    if arguments.verb == "start":
        cluster.start().detach()
        print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
        return 0
    with cluster:
        status = subprocess.run(arguments.command, env=cluster.env, check=False).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except (DevClusterError, ValueError, OSError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
