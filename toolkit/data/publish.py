"""Prepare a run's pairs and publish them: one record, one row group a shard."""

from __future__ import annotations

from collections.abc import Callable

from toolkit.data.formats import read_pairs
from toolkit.data.prepare import PrepareSettings, prepare_pairs
from toolkit.data.sources import load
from toolkit.data.template import ChatTokenizer
from toolkit.exchange import layout, tables
from toolkit.exchange.records import Manifest
from toolkit.exchange.run import Run


def prepare_run(run: Run, progress: Callable[[int], None] | None = None) -> Manifest:
    """The record of the run's prepared pairs, made now if nobody made it.

    Args:
        progress: called with the number of rows done so far.

    Raises:
        UserError: the data cannot be read, or there is too little of it.
    """
    existing = run.records.find(layout.PAIRS)
    if existing is not None:
        return existing
    config, method = run.config, run.config.method
    source = load(config.data.path, split=config.data.split, limit=config.data.limit)
    tokenizer = ChatTokenizer(config.model.policy, config.model.template_arguments)
    settings = PrepareSettings(
        seed=config.seed,
        rounds=method.rounds,
        global_batch=method.global_batch,
        shard_size=method.shard_size,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_tokens=config.data.max_tokens,
        heldout_prompts=config.data.heldout_prompts,
        warm_start=method.warm_start == "offline_round",
        warm_start_pairs=method.warm_start_pairs,
        max_pairs=config.data.max_pairs,
    )
    prepared = prepare_pairs(read_pairs(source, config.data.format), tokenizer, settings, source.digest, progress)
    blobs = {
        f".round-{index:03d}.parquet": tables.to_parquet(table, sizes)
        for index, (table, sizes) in enumerate(prepared.rounds())
    }
    blobs |= {
        ".heldout.parquet": tables.to_parquet(prepared.heldout),
        ".dropped.parquet": tables.to_parquet(prepared.dropped),
    }
    attributes = {**prepared.metadata, "counts": prepared.counts, "source": config.data.path}
    return run.records.publish(layout.PAIRS, attributes, blobs=blobs)[0]
