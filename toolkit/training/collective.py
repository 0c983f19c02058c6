"""Small agreements between all ranks. Every function here is a collective call: all ranks, same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from toolkit.errors import UserError

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """Do something on every rank that may raise UserError on some of them; then it is raised on all."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = error
    raise_together(problem)
    return result


def raise_together(problem: Exception | None) -> None:
    """Raise the first rank's problem on every rank if any has one: so none is left waiting.

    Raises:
        UserError: if any rank's problem is one; a person must mend it.
        RuntimeError: if none is; another attempt may do better.
    """
    problems: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    mine = problem and (UserError if isinstance(problem, UserError) else RuntimeError, str(problem))
    dist.all_gather_object(problems, mine)
    found = [told for told in problems if told is not None]
    if found:
        kind, message = max(found, key=lambda told: told[0] is UserError)
        raise kind(message)


def gather_items(parts: Sequence[tuple[Sequence[int], Mapping[str, NDArray]]], count: int) -> dict[str, NDArray]:
    """Put per-item values of all micro-batches into the order of the global batch, on every rank.

    Args:
        parts: on the last pipeline stage, for each micro-batch of this copy: positions (n,) and arrays (n, ...) by
            name; the same names everywhere. Ignored on other stages.
        count: items of the global batch.

    Returns:
        Arrays (count, ...) by name.
    """
    result: list[dict[str, NDArray] | None] = [None]
    if parallel_state.is_pipeline_last_stage():
        group = parallel_state.get_data_parallel_group()
        copies: list[Sequence[tuple[Sequence[int], Mapping[str, NDArray]]]] = [()] * group.size()
        dist.all_gather_object(copies, list(parts), group=group)
        whole: dict[str, NDArray] = {}
        for positions, values in (part for copy in copies for part in copy):
            for name, array in values.items():
                whole.setdefault(name, np.zeros((count, *array.shape[1:]), array.dtype))[positions] = array
        result = [whole]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(result, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return result[0]
