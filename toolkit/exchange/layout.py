"""Every name in a run directory. No other module builds one.

::

    identity.g0.json                     what the run is: data, models, method, seed (immutable)
    operations/000.g0.json               how it is run: cluster, layout, workers (append-only versions)
    control/000.opened, 000.closed       incarnations: opened by launch and resume, closed by cancel, failure or success
    code/<digest>/                       the code that its jobs run
    data/pairs                           prepared pairs, one row group a shard, and what was left out
    policies/0000                        policy at the start of round 0, 0001 of round 1, ...
    checkpoints/000000                   the one lineage; the files lie in <record name>.<attempt>.<token>/
    rounds/000/logprobs/<weights>/<half>/000/000012
    rounds/000/statistics                feature statistics of the round's scores
    rounds/000/{requests,responses,annotations}/000/000012
    meta/000/000001, phi/000/000001      meta batch and meta-learner version of boundary 1
    evaluations/0000                     policy 0 on the held-out prompts
    jobs/<slot>/0001.{intent,start,end}  attempts
    reports/                             damaged records that a reader met, for the tick
    condemned/0000                       damaged records, in the order in which the tick condemned them
    deletions/                           what the tick removed, written before it did
    heartbeats/<slot>.json, frontier.json, status.json     hints, replaced in place
    metrics/<attempt>.jsonl, tensorboard/, logs/<slot>/    for people
"""

from __future__ import annotations

from toolkit.exchange.records import Ref

BUCKET = 200  # shards a directory: each leaves 2 files, losers and tombstones a few more; under 1,000 entries

IDENTITY = Ref("", "identity")
PAIRS = Ref("data", "pairs")

HALVES = ("offline", "online")


def operations(version: int) -> Ref:
    return Ref("operations", f"{version:03d}")


def opened(incarnation: int) -> Ref:
    return Ref("control", f"{incarnation:03d}.opened")


def closed(incarnation: int) -> Ref:
    return Ref("control", f"{incarnation:03d}.closed")


def policy_name(version: int) -> str:
    """The name of a policy's weights, as in `logprobs`."""
    return f"policy-{version:04d}"


def policy(version: int) -> Ref:
    return Ref("policies", f"{version:04d}")


def checkpoint(sequence: int) -> Ref:
    return Ref("checkpoints", f"{sequence:06d}")


def evaluation(version: int) -> Ref:
    return Ref("evaluations", f"{version:04d}")


def statistics(round_index: int) -> Ref:
    return Ref(f"rounds/{round_index:03d}", "statistics")


def _sharded(round_index: int, kind: str, shard: int) -> Ref:
    return Ref(f"rounds/{round_index:03d}/{kind}/{shard // BUCKET:03d}", f"{shard:06d}")


def logprobs(weights: str, half: str, round_index: int, shard: int) -> Ref:
    """Log-probs of one half of a shard's pairs under the weights of that name (`initial`, `policy-0003`, `ema-0012`)."""
    return _sharded(round_index, f"logprobs/{weights}/{half}", shard)


def requests(round_index: int, shard: int) -> Ref:
    return _sharded(round_index, "requests", shard)


def responses(round_index: int, shard: int) -> Ref:
    return _sharded(round_index, "responses", shard)


def annotations(round_index: int, shard: int) -> Ref:
    return _sharded(round_index, "annotations", shard)


def training(round_index: int, shard: int) -> str:
    """What a trainer says that it is working on. No record's name, but made like one."""
    return str(_sharded(round_index, "training", shard))


def meta_batch(boundary: int) -> Ref:
    return Ref(f"meta/{boundary // BUCKET:03d}", f"{boundary:06d}")


def phi(version: int) -> Ref:
    return Ref(f"phi/{version // BUCKET:03d}", f"{version:06d}")


def condemned(number: int) -> Ref:
    return Ref("condemned", f"{number:04d}")


def deletion(name: str) -> Ref:
    """The announcement that a record's files, or a directory that is no record's, are removed."""
    return Ref("deletions", name.replace("/", "~"))


def job(slot: str, number: int, event: str) -> Ref:
    """``event``: ``intent`` (whoever publishes it may submit, once), ``start`` (or voided), ``end``."""
    return Ref(f"jobs/{slot}", f"{number:04d}.{event}")
