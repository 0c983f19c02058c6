"""``metaapo``: the command line. Starts in a blink: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from toolkit import __version__
from toolkit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from toolkit.exchange.run import Run


RETRY_LATER = 75  # EX_TEMPFAIL of sysexits.h
# What a terminal would obey: text of logs and records comes from anywhere. Of a line that overwrites itself every version is shown.
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}") | {
    13: "\n"
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 when `verify` found something or a run failed; 2 after an error of the user's making; 75 when a scheduler did not
        answer; 130 after Ctrl-C.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse ends a list of words at the first option
        options.overrides += rest
    from toolkit.launch.adapter import Unavailable

    try:
        return int(options.verb(options) or 0)
    except Unavailable as error:
        _say(f"metaapo: the scheduler does not answer ({error}); nothing is lost, try again later", sys.stderr)
        return RETRY_LATER
    except UserError as error:
        _say(f"metaapo: {error}", sys.stderr)
        return 2
    except PermissionError as error:
        _say(
            f"metaapo: {error.filename}: {error.strerror}. Only its owner can move a run; others may read one that is shared "
            "(cluster.umask): status, explain, verify",
            sys.stderr,
        )
        return 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        from toolkit.exchange.filesystem import FULL, full_disk

        if error.errno in FULL:
            _say(f"metaapo: {full_disk(Path(error.filename or 'a file'), error)}", sys.stderr)
        elif error.errno in (errno.ENOTDIR, errno.ENOENT, errno.EROFS):
            advice = "A run is a directory on a filesystem that can be written to: check the path"
            _say(f"metaapo: {error.filename}: {error.strerror}. {advice}", sys.stderr)
        else:
            raise
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metaapo",
        description="Align language models with MetaAPO and its relatives on Slurm clusters, or on this machine.",
        epilog="Configuration: key=value overrides after the verb; groups and keys are in configs/ and toolkit/config.py.",
    )
    parser.add_argument("--version", action="version", version=f"metaapo {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, function: Any, help: str, run: bool = True, overrides: str | None = None
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(verb=function)
        if run:
            sub.add_argument("run", metavar="RUN", type=Path, help="the run directory")
        if overrides:
            sub.add_argument("overrides", metavar="key=value", nargs="*", help=overrides)
        return sub

    compose = "experiment=…, groups and keys of the configuration"
    verb("prepare", prepare, "tokenize the data and publish it in the run directory", False, compose)
    launch_verb = verb("launch", launch, "start a run; stays in the foreground with a live table", False, compose)
    launch_verb.add_argument("--detach", action="store_true", help="start the roles and return")
    launch_verb.add_argument("--dry-run", action="store_true", help="show what would be started; start nothing")
    status_verb = verb("status", status, "what a run is doing")
    status_verb.add_argument("--json", action="store_true", help="as JSON")
    status_verb.add_argument("--watch", action="store_true", help="stay, and show every change")
    status_verb.add_argument(
        "--refresh", action="store_true", help="look at the records and ask the scheduler now, instead of the last tick"
    )
    logs_verb = verb("logs", logs, "the logs of a role's newest attempt, every rank's")
    logs_verb.add_argument(
        "role", metavar="ROLE", nargs="?", help="trainer, sidecar, worker-000, …; none: who has logs"
    )
    logs_verb.add_argument("--attempt", metavar="N", type=int, help="those of attempt N")
    logs_verb.add_argument("--rank", metavar="R", type=int, help="those of rank R alone")
    logs_verb.add_argument("--list", action="store_true", help="all attempts: how they ended, job, node, files")
    logs_verb.add_argument("--tail", metavar="LINES", type=int, default=200, help="so many last lines (200)")
    logs_verb.add_argument("--all", action="store_true", help="all lines")
    explain_verb = verb("explain", explain, "why a run is not going on: the cause, the lines that show it, what to do")
    explain_verb.add_argument("--json", action="store_true", help="as JSON")
    verb("tick", tick, "do once what keeps a run going")
    verb("cancel", cancel, "stop a run; its roles save first").add_argument(
        "--patience", type=float, metavar="SECONDS", help="kill what has not left after so long (default 180)"
    )
    verb("resume", resume, "continue a stopped run", overrides="operations keys to change").add_argument(
        "--detach", action="store_true", help="start the roles and return"
    )
    verify_verb = verb(
        "verify", verify, "check every byte, every gate decision, and that each pair was trained exactly once"
    )
    verify_verb.add_argument("--json", action="store_true", help="as JSON")
    doctor_verb = verb(
        "doctor", doctor, "find what is wrong with a profile, an environment or a filesystem", False, compose
    )
    doctor_verb.add_argument("--no-environments", action="store_true", help="don't try the Python of each role")
    doctor_verb.add_argument(
        "--write-profile",
        metavar="FILE",
        type=Path,
        help="draft a profile of this cluster from what Slurm says, and return",
    )
    prefetch_verb = verb("prefetch", prefetch, "download models and data, where there is a network", False, compose)
    prefetch_verb.add_argument("--to", metavar="DIR", type=Path, required=True, help="where to")
    verb("report", report, "write summary.json, report.html and TensorBoard files")
    return parser


def _say(text: str, file: TextIO | None = None) -> None:
    print(text.translate(CONTROLS), file=file)


def _console() -> Console:
    """A console that passes no control characters of what it shows."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Guarded(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(segment.text.translate(CONTROLS), segment.style)

    return Guarded(highlight=False, markup=False)


def _composed(overrides: list[str]) -> Any:
    """The configuration that the overrides ask for: a new one, or for a replay that of the run replayed."""
    from toolkit.launch.compose import compose, replayed

    source = next((o.partition("=")[2] for o in overrides if o.startswith("replay_from=")), None)
    return compose(overrides, Path.cwd()) if source is None else replayed(overrides, Path.cwd())


def prepare(options: argparse.Namespace) -> None:
    from toolkit.launch import control

    run = control.create(_composed(options.overrides))
    try:
        control.prepare(run, _console())
    except ImportError as error:
        raise UserError(
            f"preparing data takes the trainer's packages ({error}); in a clone of this project: pip install '.[trainer]'. "
            "`metaapo launch` does without: then the trainer prepares the data"
        ) from error


def launch(options: argparse.Namespace) -> int:
    from toolkit.launch import control
    from toolkit.launch.rehearsal import dry_run

    config, console = _composed(options.overrides), _console()
    if options.dry_run:
        dry_run(config, console)
        return 0
    run = control.create(config)
    try:
        control.prepare(run, console)
    except ImportError as error:
        console.print(
            f"the trainer will prepare the data: its packages are not installed here ({error})", soft_wrap=True
        )
    return _go_on(run, options.detach)


def resume(options: argparse.Namespace) -> int:
    from toolkit.exchange.run import Run
    from toolkit.launch import control
    from toolkit.launch.compose import updated

    run = Run.open(options.run, "resume")
    control.resume(run, updated(run, options.overrides))
    return _go_on(Run.open(options.run, "launch"), options.detach)


def _go_on(run: Run, detach: bool) -> int:
    """Start what is due; in the foreground follow it to its end.

    A run whose jobs keep it going by themselves, on a cluster, is left to them. Ctrl-C stops the roles of this machine and keeps
    the run; jobs of a cluster go on.
    """
    from toolkit.launch import control

    console, cluster = _console(), run.config.cluster
    if detach or (cluster.kind != "local" and cluster.control != "login"):
        for note in control.start(run):
            console.print(f"note: {note}", soft_wrap=True)
        console.print(
            f"started. Watch: metaapo status {run.root} --watch   Stop: metaapo cancel {run.root}", soft_wrap=True
        )
        if cluster.kind != "local" and cluster.control == "login":
            console.print(f"somebody has to tick, from cron for instance: metaapo tick {run.root}", soft_wrap=True)
        return 0
    try:
        outcome = control.follow_live(run, console)
    except KeyboardInterrupt:
        if cluster.kind != "local":
            console.print(
                f"the jobs go on; somebody has to tick, from cron for instance: metaapo tick {run.root}", soft_wrap=True
            )
            return 130
        console.print("stopping: the roles save and leave …", soft_wrap=True)
        control.cancel(run)
        console.print(f"saved. Continue with: metaapo resume {run.root}", soft_wrap=True)
        return 130
    if outcome == "finished":
        report(argparse.Namespace(run=run.root))
        return 0
    closing = run.closing()
    console.print(f"{outcome}: {closing.attributes['reason'] if closing is not None else ''}", soft_wrap=True)
    return 1


def status(options: argparse.Namespace) -> None:
    from toolkit.exchange import hints

    def read() -> dict[str, Any]:
        found = hints.status(options.run)
        if options.refresh or not found:
            from toolkit.exchange.run import Run
            from toolkit.launch.observe import observe
            from toolkit.reporting.status import collect

            run = Run.open(options.run)
            found = collect(run, observe(run) if options.refresh else {}, found) | {"written": time.time()}
        if found.get("outcome") and any(job["outcome"] in ("running", "pending") for job in found["jobs"]):
            from toolkit.exchange.run import Run
            from toolkit.launch.observe import observe

            found |= observe(Run.open(options.run), ask=False)  # they ended after the last status was written
        return found

    if options.json:
        print(json.dumps(read(), indent=1))
        return
    from toolkit.reporting.terminal import render

    console = _console()
    if not options.watch:
        found = read()
        console.print(render(found, time.time() - found["written"]))
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=4) as live:
        while True:
            found = read()
            live.update(render(found, time.time() - found["written"]))
            if found.get("outcome"):
                break
            time.sleep(60.0 if options.refresh else 1.0)  # a scheduler is asked politely
    if not console.is_terminal:
        console.print()  # rich leaves the last line open


def logs(options: argparse.Namespace) -> None:
    from toolkit.exchange.run import Run
    from toolkit.reporting import logs as files

    if options.tail < 1:
        raise UserError(f"--tail takes a number of lines, 1 or more, not {options.tail}; --all shows all")
    run = Run.open(options.run)
    if options.role is None or options.list:
        for line in files.listing(run, options.role) if options.list else files.overview(run):
            _say(line)
        return
    show = (lambda text: text.translate(CONTROLS)) if sys.stdout.isatty() else str
    for path in files.wanted(options.run, options.role, options.attempt, options.rank):
        _say(f"==> {path} <==")
        text, before = (files.read(path), 0) if options.all else files.tail(path, options.tail)
        if before:
            print(f"… {before:,} bytes before this: --all shows them")
        print(show(text), end="" if text.endswith("\n") else "\n")


def explain(options: argparse.Namespace) -> None:
    from toolkit.exchange.run import Run
    from toolkit.reporting import explain as explanation

    found = explanation.explain(Run.open(options.run))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        console = _console()
        console.print(explanation.render(found, min(console.width, 100)), soft_wrap=True)


def tick(options: argparse.Namespace) -> None:
    from toolkit.exchange.run import Run
    from toolkit.launch import control

    run = Run.open(options.run, f"tick-{os.getpid()}")
    control.tick(run)
    closing = run.closing()
    _console().print(
        f"{options.run}: {closing.attributes['outcome'] if closing is not None else 'going on'}", soft_wrap=True
    )


def cancel(options: argparse.Namespace) -> None:
    from toolkit.exchange.run import Run
    from toolkit.launch import control

    run = Run.open(options.run, "cancel")
    found, closing = control.cancel(run, options.patience), run.closing()
    assert closing is not None
    advice = f" Continue with: metaapo resume {options.run}" if closing.attributes["outcome"] != "finished" else ""
    _console().print(f"{closing.attributes['outcome']}; {found} attempt(s) stopped, none left.{advice}", soft_wrap=True)


def verify(options: argparse.Namespace) -> int:
    from toolkit.exchange.run import Run
    from toolkit.exchange.verify import verify as examine

    found = examine(Run.open(options.run))
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _say(found.as_text())
    return 0 if found.clean else 1


def doctor(options: argparse.Namespace) -> int:
    console = _console()
    if options.write_profile is not None:
        from toolkit.launch import profile

        profile.write(options.write_profile)
        console.print(
            f"drafted {options.write_profile}: read it, complete it, then: metaapo doctor cluster={options.write_profile}",
            soft_wrap=True,
        )
        return 0
    from toolkit.launch.compose import compose
    from toolkit.launch.doctor import diagnose, show

    config = compose(options.overrides, Path.cwd(), complete=False)
    return 0 if show(diagnose(config, not options.no_environments), console) else 1


def prefetch(options: argparse.Namespace) -> None:
    from toolkit.data.prefetch import fetch
    from toolkit.launch.compose import compose

    config, console = compose(options.overrides, Path.cwd(), complete=False), _console()
    found = fetch(config, options.to.absolute(), lambda words: console.print(words, soft_wrap=True))
    console.print(
        f"launch with: {shlex.join(f'{key}={path}' for key, path in found.items())}"
        if found
        else "nothing to download: no key names a model or data set of the Hub as owner/name that is not here already",
        soft_wrap=True,
    )


def report(options: argparse.Namespace) -> None:
    from toolkit.exchange.run import Run
    from toolkit.reporting import summary

    run, console = Run.open(options.run), _console()
    found = summary.write_summary(run)
    console.print(summary.render(found))
    try:
        from toolkit.reporting import report as html
        from toolkit.reporting import tensorboard

        tensorboard.write_events(run, found)
        console.print(f"report: {html.write_report(run, found)}", soft_wrap=True)
    except ImportError as error:
        console.print(
            f"no HTML report: {error.name} is not installed here; in a clone of this project: pip install '.[report]'",
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
