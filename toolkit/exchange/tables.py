"""The Arrow schemas of all row data, and how rows become Parquet.

One table a kind; the columns are the contract between the roles. Anyone can read the files with
``datasets``, pyarrow or duckdb. The codec settings are fixed so that equal tables give equal bytes.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from toolkit.errors import UserError

TOKENS = pa.list_(pa.int32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

# A prepared preference pair. `round` and `shard` fix its batch for the whole run; `position` counts within the round.
# `prompt_ids` ends with the generation prompt; `chosen_ids`/`rejected_ids` end with one end-of-turn id.
PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("row", pa.int64()),
        ("round", pa.int32()),
        ("shard", pa.int32()),
        ("position", pa.int32()),
        ("prompt", MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", TOKENS),
        ("chosen_ids", TOKENS),
        ("rejected_ids", TOKENS),
    ]
)

# A held-out prompt, on which every policy is evaluated.
HELDOUT = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("row", pa.int64()),
        ("prompt", MESSAGES),
        ("prompt_ids", TOKENS),
        ("chosen", pa.string()),
    ]
)

# What prepare left out, and why: `identical`, `empty`, `too_long`, `tail`, ...
DROPPED = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])

# Summed response log-probs (natural log, fp32) of one half of each pair under one set of weights.
LOGPROBS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("chosen", pa.float32()),
        ("rejected", pa.float32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)

# The gate's decision about every pair of a shard: sampled == (u > w_gate).
REQUESTS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("s", pa.float32()),
        ("u", pa.float64()),
        ("w_gate", pa.float32()),
        ("sampled", pa.bool_()),
    ]
)

# One row a sampled response. `finish_reason`: "stop" (ended its turn), "length" (cut), or "rejected" (the engine cannot
# take this prompt; then `sample` is 0, `token_ids` empty and `text` says why). `logprob`: behaviour log-prob, summed.
RESPONSES = pa.schema(
    [
        ("pair_id", pa.string()),
        ("sample", pa.int32()),
        ("token_ids", TOKENS),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("logprob", pa.float32()),
        ("seed", pa.int64()),
    ]
)

# One row a requested pair. `outcome`: pair, tie, all_truncated, prompt_rejected, reward_failed. `rewards`: one a response,
# in the order of `sample`, NaN where the reward model failed. The *_ids and *_reward columns are null unless outcome == "pair".
ANNOTATIONS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("outcome", pa.string()),
        ("chosen_sample", pa.int32()),
        ("rejected_sample", pa.int32()),
        ("chosen_ids", TOKENS),
        ("rejected_ids", TOKENS),
        ("chosen_reward", pa.float32()),
        ("rejected_reward", pa.float32()),
        ("rewards", pa.list_(pa.float32())),
    ]
)

# A meta batch: the rows with an online half that were trained since the boundary before.
META_BATCH = pa.schema(
    [
        ("pair_id", pa.string()),
        ("step", pa.int64()),
        ("s", pa.float32()),
        ("loss_offline", pa.float32()),
        ("loss_online", pa.float32()),
        ("w_gate", pa.float32()),
    ]
)

# One row a held-out prompt and policy. `metrics`: further judgements by name (a gold reward, for instance).
EVALUATION = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("token_ids", TOKENS),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("reward", pa.float32()),
        ("metrics", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
    ]
)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with exactly the columns of ``schema``, in its order and types.

    Raises:
        UserError: a column is missing or has a type that cannot be cast.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise UserError(f"table lacks column(s) {', '.join(missing)}; it has {', '.join(table.column_names)}")
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowInvalid as error:
        raise UserError(f"table does not fit its schema: {error}") from error


def to_parquet(table: pa.Table, row_group_sizes: list[int] | None = None) -> bytes:
    """The bytes of ``table`` as Parquet (zstd); equal tables give equal bytes.

    Args:
        row_group_sizes: rows of each row group, summing to the table's rows; default one group.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", version="2.6", write_statistics=False) as writer:
        start = 0
        for size in row_group_sizes if row_group_sizes is not None else [max(table.num_rows, 1)]:
            writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
            start += size
    return sink.getvalue()


def read_parquet(path: Path, row_group: int | None = None) -> pa.Table:
    """The table at ``path``, or one of its row groups."""
    with pq.ParquetFile(path) as file:
        return file.read() if row_group is None else file.read_row_group(row_group)
