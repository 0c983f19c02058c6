"""From pairs as people keep them to the run's fixed plan: token ids, held-out prompts, order, rounds, shards.

A pure function of the rows, the tokenizer and a few settings. No row vanishes: each becomes a training pair, a held-out
prompt, or a row of the dropped table with its reason:

================= ================================================================================
different_prompts chosen and rejected do not share their prompt (told by the format's reader)
no_answer         a transcript ends with the human's turn (told by the format's reader)
empty             prompt, chosen or rejected is blank
template          the chat template refuses the conversation
too_long          more than ``max_prompt_tokens``, or prompt and a response more than ``max_tokens``
identical         both responses have the same token ids
duplicate         rendered prompt, chosen and rejected are those of an earlier row
heldout           a further pair of a held-out prompt
max_pairs         beyond the bound, by the seeded order
================= ================================================================================
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from toolkit.algorithms import draws
from toolkit.data.formats import Dropped, Pair, prompt_id
from toolkit.data.template import ChatTokenizer, TemplateRefusal
from toolkit.errors import UserError
from toolkit.exchange import tables

BATCH = 1024  # rows tokenized in one call
KEPT = pa.schema(
    [("prompt_id", pa.string()), *(field for field in tables.PAIRS if field.name not in ("round", "shard", "position"))]
)


@dataclass(frozen=True)
class PrepareSettings:
    """What a run makes of its pairs. Counts are in pairs unless the name says tokens, prompts or rounds.

    Args:
        rounds: without the warm-start round.
        warm_start: whether an offline round comes first, as round 0.
        warm_start_pairs: its size, a multiple of ``global_batch``; None: as many as any other round.
        shard_size: a multiple of ``global_batch``.
        max_tokens: of prompt and response together.
        heldout_prompts: how many prompts are kept for evaluation.
        max_pairs: at most so many training pairs; None: all.

    Raises:
        UserError: values that fit no run.
    """

    seed: int
    rounds: int
    global_batch: int
    shard_size: int
    max_prompt_tokens: int
    max_tokens: int
    heldout_prompts: int
    warm_start: bool = False
    warm_start_pairs: int | None = None
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "global_batch", "shard_size", "max_prompt_tokens", "max_tokens", "max_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if self.heldout_prompts < 0:
            raise UserError(f"heldout_prompts is {self.heldout_prompts}; expected 0 or more")
        if self.shard_size % self.global_batch:
            below = self.shard_size // self.global_batch * self.global_batch
            nearest = " or ".join(str(size) for size in (below, below + self.global_batch) if size)
            raise UserError(
                f"shard_size {self.shard_size} is not a multiple of global_batch {self.global_batch}; take {nearest}"
            )
        if self.warm_start_pairs is not None:
            if not self.warm_start:
                raise UserError(f"warm_start_pairs is {self.warm_start_pairs}, but there is no warm-start round")
            if self.warm_start_pairs < 1 or self.warm_start_pairs % self.global_batch:
                raise UserError(
                    f"warm_start_pairs {self.warm_start_pairs} is not a multiple of global_batch {self.global_batch}"
                )


@dataclass(frozen=True)
class Prepared:
    """The prepared data.

    ``pairs`` (``tables.PAIRS``) is sorted by round and position, ``heldout`` (``tables.HELDOUT``) and ``dropped``
    (``tables.DROPPED``) by row. ``counts`` has ``rows`` = ``pairs`` + ``heldout`` + all of ``dropped`` (by reason), and
    the training pairs' ``tokens``. ``metadata`` is what a manifest should say: sizes, digests, stop ids, notes.
    """

    pairs: pa.Table
    heldout: pa.Table
    dropped: pa.Table
    counts: dict[str, Any]
    metadata: dict[str, Any]

    def rounds(self) -> Iterator[tuple[pa.Table, list[int]]]:
        """Each round's pairs, and the sizes of its shards."""
        start = 0
        for size in self.metadata["pairs_per_round"]:
            yield self.pairs.slice(start, size), shard_sizes(size, self.metadata["settings"]["shard_size"])
            start += size


def prepare_pairs(
    rows: Iterable[Pair | Dropped],
    tokenizer: ChatTokenizer,
    settings: PrepareSettings,
    source_digest: str,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Tokenize, filter, hold out, order and cut.

    Args:
        source_digest: of the source the row numbers belong to; a pair's id is made of both.
        progress: called with the number of rows done so far.

    Raises:
        UserError: nothing or too little is left for the held-out prompts and the rounds; the counts are in the message.
    """
    kept, dropped = _tokenize(rows, tokenizer, settings, source_digest, progress)
    total = len(kept) + len(dropped)
    heldout, training, more = _hold_out(kept, settings)
    dropped += more
    order = draws.permutation(settings.seed, kept["pair_id"].take(training).to_pylist())
    training = training[np.array(order, dtype=np.int64)]
    if settings.max_pairs is not None:
        beyond = kept["row"].take(training[settings.max_pairs :]).to_pylist()
        dropped += [Dropped(row, "max_pairs", f"more than {settings.max_pairs} pairs") for row in beyond]
        training = training[: settings.max_pairs]

    reasons = dict(sorted(Counter(row.reason for row in dropped).items()))
    try:
        sizes = round_sizes(len(training), settings)
    except UserError as error:
        found = f"{total} rows: {len(heldout)} held out, dropped {reasons}"
        raise UserError(f"{error}. Of {found}") from None
    pairs = _cut(kept.take(training), sizes, settings.shard_size)
    counts = {
        "rows": total,
        "pairs": len(pairs),
        "heldout": len(heldout),
        "dropped": reasons,
        "tokens": {name: _tokens(pairs[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")},
    }
    metadata = {
        "pairs_per_round": sizes,
        "settings": asdict(settings),
        "source_digest": source_digest,
        "digests": tokenizer.digests,
        "template_arguments": tokenizer.template_arguments,
        "end_of_turn": tokenizer.end_of_turn,
        "stop_ids": list(tokenizer.stop_ids),
        "notes": list(tokenizer.notes),
    }
    dropped.sort(key=lambda row: row.row)
    return Prepared(
        pairs,
        tables.conform(kept.take(heldout), tables.HELDOUT),
        pa.Table.from_pylist([asdict(row) for row in dropped], tables.DROPPED),
        counts,
        metadata,
    )


def pair_id(source_digest: str, row: int) -> str:
    """16 hex digits that name a pair: the same wherever and however often the source is prepared."""
    return hashlib.blake2b(f"{source_digest}:{row}".encode(), digest_size=8).hexdigest()


def round_sizes(pairs: int, settings: PrepareSettings) -> list[int]:
    """Pairs of each round, the warm-start round included.

    Rounds get whole global batches, in number as equal as can be, the earlier ones the more; so of all batches of the
    run only the very last one may be short.

    Raises:
        UserError: fewer batches than rounds.
    """
    batch = settings.global_batch
    first = settings.warm_start_pairs
    rounds = settings.rounds + (settings.warm_start and first is None)
    rest = pairs - (first or 0)
    batches, more = divmod(max(0, -(-rest // batch)), rounds)
    if not batches:
        warm = f" after {first} pairs for the warm start" if first else ""
        raise UserError(
            f"too few pairs: {pairs} pairs; {rounds} rounds need at least one batch of {batch} each{warm}. Take more data, "
            "or lower heldout_prompts, the rounds, or global_batch"
        )
    sizes = [batch * (batches + (index < more)) for index in range(rounds)]
    sizes[-1] += rest - sum(sizes)
    return [first, *sizes] if first else sizes


def shard_sizes(pairs: int, shard_size: int) -> list[int]:
    """Pairs of each shard of a round: all full but the last one."""
    return [min(shard_size, pairs - start) for start in range(0, pairs, shard_size)]


def _tokenize(
    rows: Iterable[Pair | Dropped],
    tokenizer: ChatTokenizer,
    settings: PrepareSettings,
    source_digest: str,
    progress: Callable[[int], None] | None,
) -> tuple[pa.Table, list[Dropped]]:
    """(rows that can be trained on, as ``KEPT``; the others)"""
    rows = iter(rows)
    kept: list[pa.RecordBatch] = []
    dropped: list[Dropped] = []
    seen: set[bytes] = set()
    done = 0
    while batch := list(itertools.islice(rows, BATCH)):
        readable: list[tuple[Pair, str]] = []
        for row in batch:
            rendered = row if isinstance(row, Dropped) else _render(row, tokenizer)
            if isinstance(rendered, Dropped):
                dropped.append(rendered)
            else:
                readable.append((row, rendered))
        prompt_ids = tokenizer.encode_rendered([rendered for _, rendered in readable])
        chosen_ids = tokenizer.encode_responses([pair.chosen for pair, _ in readable])
        rejected_ids = tokenizer.encode_responses([pair.rejected for pair, _ in readable])
        records = []
        for (pair, rendered), prompt, chosen, rejected in zip(
            readable, prompt_ids, chosen_ids, rejected_ids, strict=True
        ):
            key = hashlib.blake2b(repr((rendered, pair.chosen, pair.rejected)).encode(), digest_size=16).digest()
            longest = len(prompt) + max(len(chosen), len(rejected))
            if len(prompt) > settings.max_prompt_tokens:
                detail = f"prompt of {len(prompt)} tokens, limit {settings.max_prompt_tokens}"
                dropped.append(Dropped(pair.row, "too_long", detail))
            elif longest > settings.max_tokens:
                detail = f"prompt and response of {longest} tokens, limit {settings.max_tokens}"
                dropped.append(Dropped(pair.row, "too_long", detail))
            elif chosen == rejected:
                dropped.append(Dropped(pair.row, "identical", "chosen and rejected have the same token ids"))
            elif key in seen:
                dropped.append(Dropped(pair.row, "duplicate", "same prompt, chosen and rejected as an earlier row"))
            else:
                seen.add(key)
                records.append(
                    {
                        "prompt_id": prompt_id(pair.prompt),
                        "pair_id": pair_id(source_digest, pair.row),
                        "row": pair.row,
                        "prompt": pair.prompt,
                        "chosen": pair.chosen,
                        "rejected": pair.rejected,
                        "prompt_ids": prompt,
                        "chosen_ids": chosen,
                        "rejected_ids": rejected,
                    }
                )
        kept.append(pa.RecordBatch.from_pylist(records, KEPT))
        done += len(batch)
        if progress is not None:
            progress(done)
    return pa.Table.from_batches(kept, KEPT), dropped


def _render(pair: Pair, tokenizer: ChatTokenizer) -> str | Dropped:
    """The rendered prompt, or why there is none."""
    blank = [
        name
        for name, text in (
            ("prompt", "".join(message["content"] for message in pair.prompt)),
            ("chosen", pair.chosen),
            ("rejected", pair.rejected),
        )
        if not text.strip()
    ]
    if blank:
        return Dropped(pair.row, "empty", f"{' and '.join(blank)} blank")
    try:
        return tokenizer.render(pair.prompt, generation_prompt=True)
    except TemplateRefusal as error:
        return Dropped(pair.row, "template", str(error))


def _hold_out(kept: pa.Table, settings: PrepareSettings) -> tuple[np.ndarray, np.ndarray, list[Dropped]]:
    """(indices of held-out rows, indices of training rows, further pairs of held-out prompts)"""
    prompts = kept["prompt_id"].to_pylist()
    distinct = list(dict.fromkeys(prompts))
    count = settings.heldout_prompts
    if count >= len(distinct) > 0:
        raise UserError(
            f"heldout_prompts asks for {count} of {len(distinct)} different prompts; nothing would be left to train on"
        )
    held = {distinct[index] for index in draws.permutation(settings.seed, distinct)[:count]}
    heldout: dict[str, int] = {}
    training: list[int] = []
    dropped: list[Dropped] = []
    for index, (prompt, row) in enumerate(zip(prompts, kept["row"].to_pylist(), strict=True)):
        if prompt not in held:
            training.append(index)
        elif prompt not in heldout:
            heldout[prompt] = index
        else:
            dropped.append(Dropped(row, "heldout", f"prompt {prompt} is held out; one row of it is kept"))
    return np.array(list(heldout.values()), dtype=np.int64), np.array(training, dtype=np.int64), dropped


def _cut(ordered: pa.Table, sizes: Sequence[int], shard_size: int) -> pa.Table:
    """``tables.PAIRS`` of the rows in training order."""
    position = np.concatenate([np.arange(size) for size in sizes])
    columns = {"round": np.repeat(np.arange(len(sizes)), sizes), "shard": position // shard_size, "position": position}
    for name, values in columns.items():
        ordered = ordered.append_column(name, pa.array(values, pa.int32()))
    return tables.conform(ordered, tables.PAIRS)


def _tokens(ids: pa.ChunkedArray) -> int:
    return sum(len(chunk.flatten()) for chunk in ids.chunks)
