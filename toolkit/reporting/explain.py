"""Why a run is not, or no longer, going on: what its records, its scheduler and its logs say, with the lines that show it and what to do.

Read only: whoever may read a run may have it explained. Neither torch nor Slurm is needed.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from toolkit.cluster import role_of
from toolkit.errors import UserError
from toolkit.exchange import hints
from toolkit.exchange.records import Corrupt
from toolkit.exchange.run import Run
from toolkit.launch.attempts import Attempt, attempts, current, known_slots
from toolkit.launch.observe import observe
from toolkit.launch.supervise import FATAL
from toolkit.reporting import logs, standstill, symptoms
from toolkit.reporting.finding import Finding, Line
from toolkit.reporting.status import collect
from toolkit.reporting.symptoms import Symptom
from toolkit.reporting.terminal import STYLES, deaths, duration

EXAMINED = 5  # the newest attempts of a role that died of a kind of death, whose logs are read
LAST = 10  # lines of a log shown where nothing in it is known
WIDTH = 400  # characters of a log's line that are shown
SHOWN = 8  # findings in a terminal
INDENT = "   "
COMMANDS = ("metaapo ", "sacct ", "scancel ")
NAMED = 4  # further attempts of which a finding is true
BY_SCHEDULER = ("time", "preempted", "node", "resource")  # kinds of death that name the cause
QUALIFIED = {
    "UserError": "toolkit.errors.UserError",
    "Corrupt": "toolkit.exchange.records.Corrupt",
}  # as in a traceback


def explain(run: Run) -> dict[str, Any]:
    """What keeps a run from going on, as JSON values.

    Returns:
        ``run``; ``outcome``, ``reason`` and ``ended`` of the newest incarnation (None while it is open); ``deaths`` by kind;
        ``findings``: see `Finding`, those that matter most first.
    """
    previous = hints.status(run.root)
    try:
        status = collect(run, observe(run), previous) | {"written": previous.get("written")}
        findings = _findings(run, status)
    except Corrupt as error:
        status = collect(run, {}, previous)
        findings = [Finding("damaged record", str(error), f"metaapo tick {run.root}")]
    facts = {key: status[key] for key in ("run", "outcome", "reason", "ended", "deaths")}
    return facts | {"findings": [asdict(finding) for finding in findings]}


def _findings(run: Run, status: dict[str, Any]) -> list[Finding]:
    """What keeps a run from going on, those that matter most first."""
    is_open = status["outcome"] is None
    findings = standstill.of_open_run(run, status) if is_open else []
    if is_open or status["outcome"] == "failed":
        findings += _deaths(run, status["incarnation"], is_open)
        findings += standstill.condemned(run)
        findings += standstill.avoided(status["avoided"])
    return findings


def _deaths(run: Run, incarnation: int | None, is_open: bool) -> list[Finding]:
    """What the attempts of this incarnation died of, the newest first, equal ones together."""
    histories = {slot: attempts(run, slot) for slot in known_slots(run)}
    every = (attempt for history in histories.values() for attempt in history)
    dead = [attempt for attempt in every if attempt.death is not None and attempt.incarnation == incarnation]
    found: dict[tuple[str, ...], Finding] = {}
    examined: dict[tuple[str, str], list[Finding]] = {}
    older: Counter[tuple[str, str]] = Counter()  # those that are not looked at
    for attempt in sorted(dead, key=_ended, reverse=True):
        assert attempt.death is not None
        kind = (role_of(attempt.slot), attempt.death["kind"])
        alike = examined.setdefault(kind, [])
        if len(alike) == EXAMINED:
            older[kind] += 1
            continue
        diagnosis = _diagnose(run, attempt)
        alike.append(found.setdefault((kind[0], diagnosis.kind, diagnosis.meaning), diagnosis))
        alike[-1].attempts.append(_facts(attempt))
    for kind, number in older.items():
        counted = f"{number:,} older {'death was' if number == 1 else 'deaths were'} not looked at ({', '.join(kind)})"
        examined[kind][-1].meaning += f"\n{counted}. All of them:\nmetaapo logs {run.root} --list"
    for finding in found.values() if is_open else ():
        newest = current(histories[finding.attempts[0]["slot"]])
        if newest.number > finding.attempts[0]["number"]:
            finding.since = f"attempt {newest.number} came after it: {newest.outcome}"
    return list(found.values())


def _ended(attempt: Attempt) -> float:
    return (attempt.end or attempt.start or attempt.intent).written


def _facts(attempt: Attempt) -> dict[str, Any]:
    start = {} if attempt.start is None else attempt.start.attributes
    nodes = (attempt.death or {}).get("nodes") or start.get("nodes") or start.get("host")
    facts = {"slot": attempt.slot, "number": attempt.number, "job": start.get("job"), "nodes": nodes}
    return facts | {"ended": _ended(attempt)}


# ------------------------------------------------------------------------------------------------- one death


@dataclass(frozen=True)
class _Source:
    """Lines in which signs are looked for: the end of a log, or (without a path) what an attempt said of its own end."""

    lines: list[str]
    path: Path | None = None
    offset: int = 0  # of the first line, in bytes


def _diagnose(run: Run, attempt: Attempt) -> Finding:
    """What an attempt died of. The finding's ``attempts`` are left to the caller."""
    death = attempt.death
    assert death is not None
    unstarted = _unstarted(run, attempt)
    if unstarted is not None:
        return unstarted
    words = {"run": run.root, "role": role_of(attempt.slot), "slot": attempt.slot, "number": attempt.number}
    words |= {"job": _facts(attempt)["job"] or "JOB", "saving": symptoms.SAVING.get(words["role"], "")}
    sources, unread = _sources(run, attempt)
    found = [(sign, source) for source in sources for sign in symptoms.signs(source.lines)]
    if death["kind"] in BY_SCHEDULER:
        found = [pair for pair in found if pair[0].symptom.death == death["kind"]]
    if death["kind"] == "cancelled":  # by somebody, or by Slurm itself, which does so to what takes too much memory
        found = [
            (s, where) for s, where in found if s.symptom.weight == symptoms.CAUSE or s.symptom.death == "cancelled"
        ]
    if death["kind"] == "refused":  # its own sentence says it, unless it only says what another rank's end looked like
        found = [(s, where) for s, where in found if where.path is None and s.symptom.weight == symptoms.CAUSE] or found
    best = min(found, key=lambda pair: symptoms.order(pair[0]), default=None)
    fallback = symptoms.of_death(death["kind"])
    if best is None and fallback is not None:
        return _finding(fallback, words | {"own": death["message"]}, [])
    if best is None:
        lines = next((lines for source in sources if (lines := _last(run, source))), [])
        return _finding(symptoms.UNKNOWN, words | {"own": f"{death['message']}{unread}"}, lines)
    sign, source = best
    lines = _lines(run, source, symptoms.excerpt(source.lines, sign.line))
    for other, where in found:
        if other.symptom.beside and other.symptom is not sign.symptom:
            lines += _lines(run, where, [other.line])
    own = death["message"] if source.path is None and sign.symptom.death == "refused" else sign.own
    return _finding(sign.symptom, words | {"own": own}, lines)


def _unstarted(run: Run, attempt: Attempt) -> Finding | None:
    """What is known of an attempt that was given up before it started; None if its log may tell."""
    reason = "" if attempt.start is None else attempt.start.attributes.get("reason", "")
    pending = reason.removeprefix("pending for ever: ")
    if pending != reason:
        meaning = (
            f"Its job would have been pending for ever: {FATAL.get(pending, 'the scheduler says so')} ({pending})."
        )
        return Finding(standstill.FOR_EVER, meaning, f"Mend the profile.\nmetaapo resume {run.root} cluster.KEY=VALUE")
    if reason == "never started":
        meaning = "The scheduler knew no job of it: the submission failed, or its answer got lost."
        return Finding("never submitted", meaning, "It needs nothing of you, unless it happens again and again.")
    return None


def _finding(symptom: Symptom, words: dict[str, Any], lines: list[Line]) -> Finding:
    return Finding(symptom.name, symptom.meaning.format(**words), symptom.advice.format(**words), lines=lines)


def _sources(run: Run, attempt: Attempt) -> tuple[list[_Source], str]:
    """The logs of all ranks, that of the rank that spoke first, and the attempt's own word; and why logs are not read, if so."""
    end = {} if attempt.end is None else attempt.end.attributes
    folder, speaker, unread = logs.folders(run.root, attempt.slot).get(attempt.number), end.get("rank", 0), ""
    paths: list[Path] = []
    try:
        paths = logs.of_ranks(folder) if folder is not None else []
    except UserError as error:
        unread = f" ({error})"
    found = []
    for path in sorted(paths, key=lambda path: logs.rank(path) != speaker):
        lines, offset = logs.end(path)
        found.append(_Source(lines, path, offset))
    if "error" in end:
        name = QUALIFIED.get(end["error"], end["error"])
        found.append(_Source(["Traceback (most recent call last):", *f"{name}: {end['message']}".splitlines()]))
    return found, unread


def _lines(run: Run, source: _Source, wanted: Sequence[int]) -> list[Line]:
    """Lines of a log; none of an attempt's own word, which the meaning tells."""
    if source.path is None:
        return []
    first, name = logs.line_number(source.path, source.offset), str(source.path.relative_to(run.root))
    return [Line(name, None if first is None else first + at, source.lines[at][:WIDTH]) for at in wanted]


def _last(run: Run, source: _Source) -> list[Line]:
    """The last lines of a log that say anything."""
    said = [number for number, line in enumerate(source.lines) if line.strip()]
    return _lines(run, source, said[-LAST:])


# ------------------------------------------------------------------------------------------------- for people


def render(found: dict[str, Any], width: int = 80) -> Text:
    """An explanation as a terminal shows it. Lines of logs and commands are not wrapped: they can be copied."""
    outcome, now = found["outcome"], time.time()
    text = Text.assemble((outcome or "going on", STYLES.get(outcome or "", "bold cyan")))
    if found["ended"] is not None:
        text.append(f" {duration(now - found['ended'])} ago", style="dim")
    text.append(f"  {found['run']}\n", style="bold")
    if outcome == "finished":
        _write(text, f"{found['reason']}. What it came to:\nmetaapo report {found['run']}", width)
    elif outcome == "cancelled":
        _write(
            text, f"It was stopped on demand ({found['reason']}). To continue:\nmetaapo resume {found['run']}", width
        )
    elif outcome is not None:
        _write(text, found["reason"], width)
    if found["deaths"]:
        text.append("deaths ", style="dim").append(f"{deaths(found['deaths'])}\n")
    for number, finding in enumerate(found["findings"][:SHOWN], 1):
        text.append(f"\n{number}  {finding['kind']}\n", style="bold yellow")
        _show(text, finding, now, width)
    hidden = len(found["findings"]) - SHOWN
    if hidden > 0:
        text.append(f"\nand {hidden} more: metaapo explain {found['run']} --json\n", style="dim")
    text.rstrip()
    return text


def _show(text: Text, finding: dict[str, Any], now: float, width: int) -> None:
    if finding["attempts"]:
        _write(text, _who(finding["attempts"], now), width, INDENT, "dim")
    _write(text, finding["meaning"], width, INDENT)
    last = None
    for line in finding["lines"]:
        if line["file"] != last:
            at = "" if line["line"] is None else f":{line['line']}"
            text.append(f"{INDENT}{line['file']}{at}\n", style="cyan")
        text.append(f"{INDENT}| {line['text']}\n", style="dim")
        last = line["file"]
    if finding["since"]:
        _write(text, f"Since then: {finding['since']}.", width, INDENT)
    _write(text, finding["advice"], width, INDENT, "green")


def _write(text: Text, words: str, width: int, indent: str = "", style: str = "") -> None:
    """Add paragraphs, wrapped, but for commands."""
    for line in words.splitlines():
        if not line.startswith(COMMANDS):
            line = textwrap.fill(
                line, width - len(indent), break_long_words=False, break_on_hyphens=False, drop_whitespace=True
            )
        text.append(f"{textwrap.indent(line, indent)}\n", style=style)


def _who(attempts: list[dict[str, Any]], now: float) -> str:
    """The newest attempt of which a finding is true, and which others."""
    first, *others = attempts
    facts = [f"{first['slot']} attempt {first['number']}"]
    if first["job"]:
        facts.append(f"job {first['job']}" + (f" on {first['nodes']}" if first["nodes"] else ""))
    if first["ended"] is not None:
        facts.append(f"{duration(now - first['ended'])} ago")
    named = ", ".join(f"{other['slot']} {other['number']}" for other in others[:NAMED])
    more = f" and {len(others) - NAMED:,} more" if len(others) > NAMED else ""
    return ", ".join(facts) + (f"; also {named}{more}" if others else "")
