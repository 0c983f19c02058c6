"""How the processes of a trainer share the model and the batch: tensor x pipeline x data parallel."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.conversion.shape import ModelShape
from toolkit.errors import UserError


@dataclass(frozen=True)
class ParallelLayout:
    """``world_size = tensor * pipeline * data``; ``data`` follows from the other three.

    Ranks are numbered as Megatron does by default: tensor fastest, then data, then pipeline.

    Attributes:
        tensor: processes that share each layer (heads and hidden units).
        pipeline: consecutive stages of layers.
        world_size: all processes of the trainer.
        sequence_parallel: between the tensor-parallel regions each process keeps only its part of the sequence
            (Korthikanti et al. 2022, arXiv 2205.05198). Needs ``tensor > 1``.

    Raises:
        UserError: when the world can't be filled, with the equation.
    """

    tensor: int = 1
    pipeline: int = 1
    world_size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "world_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"layout {name} must be a whole number of at least 1; got {value!r}")
        if self.world_size % self.model_parallel:
            raise UserError(
                f"invalid layout: tensor({self.tensor}) * pipeline({self.pipeline}) * data(?) "
                f"!= world_size({self.world_size}); {self.world_size} processes are not a multiple of "
                f"{self.tensor} * {self.pipeline} = {self.model_parallel}. "
                "Change the layout, or the nodes and processes per node."
            )
        if self.sequence_parallel and self.tensor == 1:
            raise UserError("invalid layout: sequence_parallel needs tensor > 1; got tensor(1). Switch it off.")

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Copies of the model, each of which works on its own part of a global batch."""
        return self.world_size // self.model_parallel

    def describe(self) -> str:
        """The equation, for records and messages."""
        equation = f"tensor({self.tensor}) * pipeline({self.pipeline}) * data({self.data})"
        return equation + (" with sequence parallelism" if self.sequence_parallel else "")

    @property
    def sequence_multiple(self) -> int:
        """Sequences are padded to a multiple of this many tokens, so that sequence parallelism can cut them evenly."""
        return 8 * self.tensor if self.sequence_parallel else 8

    def padded_vocabulary(self, vocabulary: int) -> int:
        """Rows of the embedding: ``vocabulary`` rounded up to what the tensor-parallel processes can share evenly."""
        return -(-vocabulary // self.tensor) * self.tensor

    def check_model(self, shape: ModelShape) -> None:
        """Raise UserError unless each tensor-parallel process gets whole heads, and each stage as many layers."""
        for what, count, name, parts in (
            ("attention heads", shape.heads, "tensor", self.tensor),
            ("key/value heads", shape.kv_heads, "tensor", self.tensor),
            ("feed-forward units", shape.feed_forward, "tensor", self.tensor),
            ("layers", shape.layers, "pipeline", self.pipeline),
        ):
            if count % parts:
                raise UserError(
                    f"invalid layout for this {shape.model_type} model: {what}({count}) % {name}({parts}) "
                    f"= {count % parts}, expected 0. Choose a {name} that divides {count}."
                )

    def check_batch(self, global_batch_pairs: int, micro_batch_pairs: int) -> None:
        """Raise UserError unless a global batch is a whole number of micro-batches on every data-parallel copy."""
        per_pass = self.data * micro_batch_pairs
        if micro_batch_pairs < 1 or global_batch_pairs < 1 or global_batch_pairs % per_pass:
            raise UserError(
                f"invalid batch: global batch({global_batch_pairs} pairs) != data({self.data}) * "
                f"micro batch({micro_batch_pairs} pairs) * n; data({self.data}) = world_size({self.world_size}) / "
                f"(tensor({self.tensor}) * pipeline({self.pipeline})). "
                f"Make the global batch a multiple of {max(per_pass, self.data)}, or change the micro batch or layout."
            )
