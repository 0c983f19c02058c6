"""What an open run waits for, and who should make it; and what became of its damaged records."""

from __future__ import annotations

import os
import time
from itertools import count
from typing import Any

from toolkit.cluster import role_of
from toolkit.exchange import layout, lineage
from toolkit.exchange.records import Ref
from toolkit.exchange.run import Run
from toolkit.launch.handover import keeper
from toolkit.launch.supervise import FATAL
from toolkit.reporting import logs
from toolkit.reporting.finding import Finding
from toolkit.reporting.reasons import in_words
from toolkit.reporting.terminal import QUIET, duration

SHOWN = 4  # names in a list
FOR_EVER = "pending for ever"
SILENT = 900.0  # seconds without a line written after which a role that runs is asked about


def of_open_run(run: Run, status: dict[str, Any]) -> list[Finding]:
    """What an open run waits for, the most urgent first.

    Args:
        status: from `toolkit.reporting.status.collect`, just observed.
    """
    pending = _pending(run, status["jobs"])
    hopeless = [finding for finding in pending if finding.kind == FOR_EVER]
    others = [finding for finding in pending if finding.kind != FOR_EVER]
    return [*_untended(run, status), *_gone(run, status["gone"]), *hopeless, _waiting(run, status), *others]


def _untended(run: Run, status: dict[str, Any]) -> list[Finding]:
    """Whether anybody keeps the run going, and whether the scheduler answers."""
    found = []
    age = None if status["written"] is None else time.time() - status["written"]
    if age is None or age > QUIET:
        last = "Nobody has ticked it yet." if age is None else f"The last tick was {duration(age)} ago."
        slot, control = keeper(run.config), run.config.cluster.control
        job = next((job for job in status["jobs"] if job["slot"] == slot), None)
        who = f"With cluster.control={control} a launch that stays in the foreground does it, or cron."
        if control == "job":
            who = f"The {slot}'s job does it while it runs; " + (f"it is {_state(job)}." if job else "there is none.")
        advice = f"To do it once, and have submitted what is missing:\nmetaapo tick {run.root}"
        found.append(Finding("nobody keeps it going", f"{last} {who}", advice))
    if status["unanswered"] is not None:
        meaning = f"The scheduler does not answer ({status['unanswered']}): what follows is from the records alone."
        found.append(Finding("scheduler silent", meaning, "Nothing is lost; try again later."))
    return found


def _gone(run: Run, slots: list[str]) -> list[Finding]:
    if not slots:
        return []
    meaning = f"{_some(slots)}: the scheduler has no such job any more, and no tick has seen that yet."
    return [Finding("dead, not yet noticed", meaning, f"The next tick submits it again.\nmetaapo tick {run.root}")]


def _pending(run: Run, jobs: list[dict[str, Any]]) -> list[Finding]:
    """Why jobs are pending, those of one reason together."""
    found: dict[str, Finding] = {}
    for job in jobs:
        reason = job["reason"]
        if reason is None:
            continue
        fatal = reason in FATAL
        advice = f"Mend the profile.\nmetaapo resume {run.root} cluster.KEY=VALUE" if fatal else ""
        new = Finding(FOR_EVER if fatal else "pending", f"{_sentence(in_words(reason))}.", advice)
        found.setdefault(reason, new).attempts.append(
            {key: job[key] for key in ("slot", "number", "job")} | {"nodes": None, "ended": None}
        )
    return list(found.values())


def _waiting(run: Run, status: dict[str, Any]) -> Finding:
    """What has to be made next, and how those are who should make it."""
    role, what = needed(run, status)
    jobs = [job for job in status["jobs"] if role_of(job["slot"]) == role]
    running = [job for job in jobs if job["outcome"] == "running"]
    if running:
        silence = min(_silence(run, job) for job in running)
        how = f"{len(running)} of {len(jobs)} {role} job(s) run" if len(jobs) > 1 else f"the {role} runs"
        meaning = f"{what}; {how}."
        advice = f"metaapo logs {run.root} {running[0]['slot']}"
        if silence > SILENT:
            meaning += f" It has written nothing for {duration(silence)}: if its work does not take so long, it hangs."
            advice = (
                f"Its log may show where. When its job is killed, it starts again from what is published.\n{advice}"
            )
    elif jobs:
        states = {job["slot"]: _state(job) for job in jobs}
        meaning = f"{what}; {'; '.join(f'{slot} is {state}' for slot, state in list(states.items())[:3])}."
        ended = any(job["outcome"] != "pending" for job in jobs)
        advice = f"The next tick submits what has work.\nmetaapo tick {run.root}" if ended else ""
    else:
        hosted = role == "sidecar" and run.config.cluster.sidecar_in == "trainer"
        meaning = f"{what}; {'its place is beside the trainer' if hosted else f'no {role} was ever submitted'}."
        advice = f"metaapo logs {run.root} trainer" if hosted else f"The next tick submits it.\nmetaapo tick {run.root}"
    return Finding("waiting", meaning, advice)


def needed(run: Run, status: dict[str, Any]) -> tuple[str, str]:
    """The role whose turn it is, and what it has to make for training to go on."""
    find, config = run.records.find, run.config
    if status["steps"] is None:
        return "trainer", "The pairs are not prepared"
    plan, newest, step = run.plan, status["policy"], status["steps"]["done"]
    if newest is not None and newest >= plan.rounds:
        if config.learns and find(layout.phi(len(plan.boundaries))) is None:
            return "sidecar", "Training is over; the last version of the meta-learner is not published"
        if status["waiting"]["evaluate"]:
            judged = {entry["version"] for entry in status["evaluations"]}
            missing = next(version for version in range(newest + 1) if version not in judged)
            return "worker", f"Training is over; policy {missing} is not evaluated"
        return keeper(config), "All is done; the next tick closes the run"
    index = next((i for i in range(plan.rounds) if step < plan.first_step[i + 1]), plan.rounds)
    if newest is None or newest < index:
        return "trainer", f"Policy {index} is not published"
    batch = next(batch for batch in plan.batches(index) if batch.step == step)
    where = f"round {index}, shard {batch.shard}"
    entry = status["rounds"][index]
    if not entry["gated"]:
        return "trainer", f"Training stands at {where}, which needs nothing of others"
    if entry["scored"] < entry["shards"] and find(layout.requests(index, batch.shard)) is None:
        return (
            "trainer",
            f"Scores of round {index} are missing: {entry['scored']} of {entry['shards']} shards have them",
        )
    requests = find(layout.requests(index, batch.shard))
    if requests is None:
        return "sidecar", f"Training waits for {where}: the gate has not decided about it"
    if requests.attributes["sampled"] == 0 or find(layout.annotations(index, batch.shard)) is not None:
        return "trainer", f"Training stands at {where}, for which all is there"
    if find(layout.responses(index, batch.shard)) is not None:
        return "worker", f"Training waits for {where}: its responses are sampled, not judged"
    return "worker", f"Training waits for {where}: {requests.attributes['sampled']} prompts are asked, not sampled"


def _state(job: dict[str, Any]) -> str:
    """A job's state in words."""
    words = {
        "pending": "in the queue",
        "starved": "out of work, and left its nodes until there is some",
        "voided": "given up before it started",
        "died": "dead",
        "failed": "dead",
        "saved": "stopped, and has saved",
        "superseded": "over: another one is ahead of it",
    }
    if job["outcome"] == "pending" and job["reason"] is not None:
        return f"in the queue: {in_words(job['reason'])}"
    return words.get(job["outcome"], str(job["outcome"]))


def _silence(run: Run, job: dict[str, Any]) -> float:
    """Seconds since an attempt wrote to a log or its metrics, by the files' times; 0 where that is not to be seen."""
    folder = logs.folders(run.root, job["slot"]).get(job["number"])
    paths = [run.root / "metrics" / f"{job['slot']}.{job['attempt']}.jsonl"]
    if folder is not None and os.access(folder, os.R_OK | os.X_OK):
        paths += logs.of_ranks(folder)
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return max(0.0, time.time() - max(times)) if times else 0.0


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


# ------------------------------------------------------------------------------------------------- damage


def avoided(nodes: list[str]) -> list[Finding]:
    if not nodes:
        return []
    meaning = (
        f"{_some(nodes)}: failed, or jobs died there at once, more than once; the run's jobs keep away from there."
    )
    return [Finding("nodes avoided", meaning, "Tell the site.")]


def condemned(run: Run) -> list[Finding]:
    """Records that were found damaged: what became of them, and where a new run can go on if a consumed one can't be made again."""
    found, remade = [], []
    chain = lineage.chain(run.records)
    for number in count():
        manifest = run.records.find(layout.condemned(number))
        if manifest is None:
            break
        name, detail = manifest.attributes["record"], manifest.attributes["detail"]
        directory, _, last = name.rpartition("/")
        consumer = next((checkpoint for checkpoint in chain if name in checkpoint.attributes["consumed"]), None)
        if run.records.find(Ref(directory, last)) is not None:
            remade.append(name)
        elif consumer is not None:
            found.append(_consumed(run, name, detail, lineage.sequence(consumer) - 1))
        else:
            found.append(Finding("damaged record", f"{name}: {detail}. It is to be made again, and is not there yet."))
    notes = (run.root / "reports").glob("*.json")
    reported = [path.name.removesuffix(".json").replace("~", "/") for path in sorted(notes)]
    if reported:
        meaning = f"Reported as damaged, and not looked at yet: {_some(reported)}."
        found.append(
            Finding(
                "damaged record",
                meaning,
                f"The next tick condemns what is damaged, and it is made again.\nmetaapo tick {run.root}",
            )
        )
    if remade:
        advice = "It needs nothing of you; if it happens again and again, the filesystem is ill."
        found.append(Finding("damaged record", f"Condemned, and made again since: {_some(remade)}.", advice))
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _consumed(run: Run, name: str, detail: str, before: int) -> Finding:
    """A record that a checkpoint had consumed and that must be made again to the same bytes."""
    meaning = (
        f"{name}: {detail}. Checkpoint {before + 1} was trained with it, so it may only be made again to the same bytes, "
        "and it is not there yet."
    )
    if before < 0:
        return Finding("damaged record", meaning, "If it can't be: no checkpoint is without it; launch the run anew.")
    parent = run.records.find(layout.checkpoint(before))
    advice = f"If it can't be, this run cannot go on. The newest checkpoint without it is number {before}"
    if parent is None:
        return Finding("damaged record", meaning, f"{advice}, which was removed; launch the run anew.")
    at = lineage.progress(parent)
    advice += f", at step {at.step}"
    policy = run.records.find(layout.policy(at.round))
    if policy is not None and policy.files:
        folder = (policy.directory / policy.files[0].path).parent
        advice += (
            f"; the newest policy without it is number {at.round}, from which a new run can go on:\n"
            f"metaapo launch run=NEW model.policy={folder} ..."
        )
    return Finding("damaged record", meaning, advice)
