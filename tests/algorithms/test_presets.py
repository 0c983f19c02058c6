from __future__ import annotations

import subprocess
import sys

import pytest

from tests.algorithms.presets import FOLDER, method, preset
from toolkit.algorithms import gates, references
from toolkit.algorithms.meta_learner import MetaSettings
from toolkit.errors import UserError


def test_presets_hold_what_their_sources_say() -> None:
    paper, code, recommended = (method(name) for name in ("metaapo_paper", "metaapo_reference_code", "metaapo"))
    assert (paper.meta.interval, paper.meta.feature, paper.meta.lag, paper.missing_online) == (
        8,
        "log_sigmoid_beta",
        1,
        "offline_full",
    )
    assert (code.meta.interval, code.meta.feature, code.meta.lag, code.missing_online) == (16, "log_sigmoid", 0, "drop")
    assert (code.gate_reference, code.loss_reference, code.meta.remainder) == ("previous", "previous", "discard")
    assert (code.round_start.optimizer, code.round_start.schedule) == ("reset", "restart")
    assert code.sampling.allow_truncated
    for each in (paper, code):
        assert (each.meta.learning_rate, each.meta.weight_decay, each.meta.epochs) == (5e-3, 1e-4, 1)
        assert (each.meta.init, each.meta.minibatch, each.meta.clamp, each.meta.exploration) == ("constant", None, 0, 0)
        assert each.warm_start == "none"
    assert preset("metaapo_paper") == MetaSettings(), "the defaults are the paper's"
    assert (recommended.meta.init, recommended.meta.feature, recommended.warm_start) == (
        "random",
        "standardised",
        "offline_round",
    )
    assert recommended.meta.clamp > 0 and recommended.meta.exploration > 0 and recommended.meta.minibatch


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.yaml")])
def test_every_method_may_run(name: str) -> None:
    found = method(name)
    references.validate(found.gate_reference, found.loss_reference, found.gate.kind, found.warm_start, found.rounds + 1)
    parameters = {"exploration": found.meta.exploration} if found.gate.kind == "meta" else found.gate.parameters
    uses_features = gates.get(found.gate.kind, **parameters).needs_scores or found.weight.kind in ("meta", "fixed")
    # the statistics of a round need all its scores, and nothing is sampled before
    assert uses_features or found.gate.kind == "none" or found.meta.feature != "standardised"


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
        ("remainder", "keep"),
    ],
)
def test_bad_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        MetaSettings(**{name: value})


def test_a_launcher_without_torch_can_check_a_method() -> None:
    check = (
        "import sys\n"
        "sys.modules['torch'] = None  # importing it fails\n"
        "from toolkit.algorithms import draws, features, gates, objectives, pairing, references, weighting\n"
        "objectives.get('simpo', beta=2.5); gates.get('random', probability=0.5)\n"
        "references.validate('initial', 'behaviour', 'meta', 'offline_round', 3)\n"
        "draws.uniform(0, 0, 'a'); pairing.best_worst([0, 1], [False, False], [[1], [2]])\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
