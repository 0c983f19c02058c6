"""Weights other than the policy's own, by name: an earlier policy, the configured initial model, the moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from toolkit.algorithms import references
from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.training.control import Control
from toolkit.training.engine import PolicyEngine

Weights = Mapping[str, Tensor]


def policy_folder(run: Run, version: int) -> Path:
    """The Hugging Face folder of a published policy, every byte of it verified (once per process)."""
    manifest = run.records.require(layout.policy(version))
    paths = [run.records.verified(manifest, entry) for entry in manifest.files]
    return paths[0].parent


class WeightsStore:
    """This rank's part of the weights that references need. All methods are collective.

    ``average`` is the moving average of the policy (None unless a reference is ``ema``); it moves at shard boundaries and is
    part of every checkpoint.
    """

    def __init__(self, run: Run, engine: PolicyEngine, control: Control) -> None:
        self.run, self.engine, self.control = run, engine, control
        self.average: dict[str, Tensor] | None = None
        self._name: str | None = None  # of the one set kept from the last use
        self._kept: Weights | None = None

    def get(self, name: str) -> Weights:
        """The weights of this name, on the CPU."""
        if name.startswith("ema-"):
            if self.average is None:
                raise UserError(f"reference {name}: there is no moving average in this run's checkpoints")
            return self.average
        if name != self._name:
            self._kept = None  # two sets at once may not fit
            self._kept = self.engine.load_weights(Path(self.control.lead(lambda: str(self._folder(name)))))
            self._name = name
        assert self._kept is not None
        return self._kept

    def _folder(self, name: str) -> Path:
        if name == "initial":
            assert self.run.config.model.reference is not None
            return Path(self.run.config.model.reference)
        return policy_folder(self.run, int(name.removeprefix("policy-")))

    @contextmanager
    def loaded(self, name: str, current: str | None) -> Iterator[None]:
        """Have the weights of this name in the model; the policy's own come back at the end, also after an error.

        Args:
            current: the name of the weights that the model holds now, if they have one.
        """
        if name == current:
            yield
            return
        with self.engine.swapped(self.get(name)):
            yield

    def start_average(self) -> None:
        """The moving average begins as the policy, in fp32."""
        self.average = {
            name: value.float() for name, value in self.engine.weights().items() if value.is_floating_point()
        }

    def move_average(self, decay: float) -> None:
        """One step of the moving average towards the policy."""
        assert self.average is not None
        current = self.engine.weights()
        self.average = {
            name: references.ema_update(value, current[name], decay) for name, value in self.average.items()
        }
