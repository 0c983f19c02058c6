from __future__ import annotations

import subprocess
import sys

import pytest

from toolkit.algorithms import gates, references
from toolkit.algorithms.presets import PRESETS, MetaSettings, preset
from toolkit.errors import UserError


def test_presets_hold_what_their_sources_say() -> None:
    paper, code, recommended = preset("paper"), preset("reference_code"), preset("recommended")
    assert (paper.interval, paper.feature, paper.init, paper.missing, paper.lag) == (
        8,
        "log_sigmoid_beta",
        "constant",
        "offline_full",
        1,
    )
    assert (code.interval, code.feature, code.init, code.missing, code.lag) == (
        16,
        "log_sigmoid",
        "constant",
        "drop",
        0,
    )
    assert (code.gate_reference, code.loss_reference, code.remainder) == ("previous", "previous", "discard")
    assert (code.round_start_optimizer, code.round_start_schedule) == ("reset", "restart")
    for settings in (paper, code):
        assert (settings.learning_rate, settings.weight_decay, settings.epochs, settings.minibatch) == (
            5e-3,
            1e-4,
            1,
            None,
        )
        assert (settings.clamp, settings.exploration, settings.warm_start) == (0, 0, "none")
    assert (recommended.init, recommended.feature, recommended.warm_start) == (
        "random",
        "standardised",
        "offline_round",
    )
    assert recommended.clamp > 0 and recommended.exploration > 0 and recommended.minibatch


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_methods_that_may_run(name: str) -> None:
    settings = preset(name)
    references.validate(settings.gate_reference, settings.loss_reference, "meta", settings.warm_start, rounds=3)
    gates.get("meta", exploration=settings.exploration)


def test_overrides_and_errors() -> None:
    assert preset("paper", interval=4) == MetaSettings(interval=4)
    with pytest.raises(UserError, match="expected one of: paper, recommended, reference_code"):
        preset("official")
    with pytest.raises(UserError, match=r"preset 'paper' has no setting 'intervall'; its settings: .*interval=8"):
        preset("paper", intervall=4)
    for name, value in [
        ("init", "zeros"),
        ("feature", "raw"),
        ("interval", 0),
        ("lag", -1),
        ("lag", True),
        ("minibatch", 0),
        ("epochs", 1.5),
        ("clamp", 0.5),
        ("exploration", 1.0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("missing", "ignore"),
        ("gate_reference", "sft"),
        ("remainder", "keep"),
        ("warm_start", "yes"),
    ]:
        with pytest.raises(UserError, match=name):
            preset("paper", **{name: value})


def test_a_launcher_without_torch_can_check_a_method() -> None:
    check = (
        "import sys\n"
        "sys.modules['torch'] = None  # importing it fails\n"
        "from toolkit.algorithms import draws, features, gates, objectives, pairing, presets, references, weighting\n"
        "objectives.get('simpo', beta=2.5); gates.get('random', probability=0.5); presets.preset('recommended')\n"
        "references.validate('initial', 'behaviour', 'meta', 'offline_round', 3)\n"
        "draws.uniform(0, 0, 'a'); pairing.best_worst([0, 1], [False, False], [[1], [2]])\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
