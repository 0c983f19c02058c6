"""Row data: schemas are kept, equal tables give equal bytes, a row group is a shard."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from toolkit.errors import UserError
from toolkit.exchange import tables


def rows(count: int) -> pa.Table:
    columns = {
        "pair_id": [f"p{index}" for index in range(count)],
        "s": [index / 3 for index in range(count)],
        "u": [0.5] * count,
        "w_gate": [0.25] * count,
        "sampled": [index % 2 == 0 for index in range(count)],
    }
    return tables.conform(pa.table(columns), tables.REQUESTS)


def test_conform_orders_and_casts_the_columns() -> None:
    mixed = pa.table({"extra": [1], "chosen_tokens": [3], "rejected": [1.5], "pair_id": ["p"], "chosen": [2]})
    mixed = mixed.append_column("rejected_tokens", pa.array([4], pa.int64()))
    found = tables.conform(mixed, tables.LOGPROBS)
    assert found.schema == tables.LOGPROBS
    assert found.to_pylist() == [
        {"pair_id": "p", "chosen": 2.0, "rejected": 1.5, "chosen_tokens": 3, "rejected_tokens": 4}
    ]


def test_conform_names_what_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"lacks column\(s\) u, sampled; it has pair_id, s, w_gate"):
        tables.conform(rows(1).drop_columns(["u", "sampled"]), tables.REQUESTS)
    with pytest.raises(UserError, match="does not fit"):
        tables.conform(rows(1).set_column(1, "s", pa.array(["many"])), tables.REQUESTS)


def test_equal_tables_give_equal_bytes_however_they_are_chunked() -> None:
    whole = rows(10)
    chunked = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 7)])
    assert tables.to_parquet(whole) == tables.to_parquet(chunked)
    assert tables.to_parquet(whole) != tables.to_parquet(rows(9))


def test_a_row_group_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    path.write_bytes(tables.to_parquet(rows(10), [4, 4, 2]))
    assert tables.read_parquet(path) == rows(10)
    for group, (start, size) in enumerate([(0, 4), (4, 4), (8, 2)]):
        assert tables.read_parquet(path, group) == rows(10).slice(start, size)


@pytest.mark.parametrize("sizes", [None, [0]])
def test_an_empty_table_keeps_its_schema(tmp_path: Path, sizes: list[int] | None) -> None:
    path = tmp_path / "empty.parquet"
    path.write_bytes(tables.to_parquet(tables.META_BATCH.empty_table(), sizes))
    assert tables.read_parquet(path).schema == tables.META_BATCH
    assert tables.read_parquet(path).num_rows == 0
