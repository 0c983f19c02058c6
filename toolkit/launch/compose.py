"""From overrides to a checked configuration: hydra for a new run, the run's own records for an existing one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import toolkit
from toolkit import config as configuration
from toolkit.config import Config
from toolkit.errors import UserError, unknown
from toolkit.exchange.run import Run, resolved


def config_directory() -> Path:
    """The shipped configuration files: beside the package in a checkout, inside it when installed."""
    package = Path(toolkit.__file__).parent
    for directory in (package / "configs", package.parent / "configs"):
        if (directory / "config.yaml").exists():
            return directory
    raise UserError(
        f"the configuration files are missing: looked in {package / 'configs'} and {package.parent / 'configs'}"
    )


def compose(overrides: list[str], base: Path) -> Config:
    """The configuration of a new run.

    Args:
        overrides: hydra overrides, ``experiment=quickstart data.path=…``.
        base: what relative paths in it are relative to.

    Raises:
        UserError: an unknown key, group or value (the valid ones are listed), or a missing one.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="schema", node=_Root)
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            composed = hydra_compose("config", [_opened(override) for override in overrides])
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, overrides)) from error
    del values["toy"]
    config = resolved(configuration.build(Config, values), base)
    configuration.validate(config)
    return config


@dataclasses.dataclass
class _Root(Config):
    toy: str = "toy-world"  # folder of the toy world, for the quickstart's paths


def _opened(override: str) -> str:
    """An override of a free mapping may add keys; hydra wants to be told so."""
    parts = override.partition("=")[0].split(".")
    free = not parts[0].startswith(("+", "~")) and {"parameters", "template_arguments", "environment", "metrics"} & set(
        parts
    )
    return f"++{override}" if free else override


def _explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's complaint in one sentence, with the keys that exist where the wrong one was looked for."""
    detail = f"{error} {error.__cause__ or ''}"  # what hydra says of a value, its cause says of its type
    message = " ".join(line.strip() for line in detail.splitlines()[:30] if line.strip())
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if key and key in str(error):
            known: Any = _Root
            for part in key.split(".")[:-1]:
                hints = {field.name: field for field in dataclasses.fields(known)}
                if part not in hints:
                    break
                default = hints[part].default_factory
                known = default if dataclasses.is_dataclass(default) else known
            names = ", ".join(sorted(field.name for field in dataclasses.fields(known)))
            groups = ", ".join(sorted(path.name for path in config_directory().iterdir() if path.is_dir()))
            return f"{override}: {message}\n  keys there: {names}\n  groups: {groups}"
    return message


def updated(run: Run, overrides: list[str]) -> Config:
    """A run's configuration with some operations keys changed.

    Raises:
        UserError: a key of the identity half (it is immutable), an unknown key, a bad value.
    """
    for key, _ in _parsed(overrides):
        if key.split(".")[0] in configuration.IDENTITY:
            raise UserError(
                f"{key} belongs to the identity of {run.root} and cannot change: its records were made with it. "
                f"Start another run for that. These can change: {', '.join(configuration.OPERATIONS)}"
            )
    return resolved(_overridden(dataclasses.asdict(run.config), overrides), Path.cwd())


def replayed(overrides: list[str], base: Path) -> Config:
    """The configuration of a replay: that of the run named by ``replay_from``, with operations keys and ``run`` changed."""
    changed = dict(_parsed(overrides))
    source = str(changed["replay_from"])
    original = Run.open((base / source).resolve())
    for key in changed:
        if key.split(".")[0] not in (*configuration.OPERATIONS, "run", "name", "replay_from"):
            raise UserError(
                f"{key}: a replay trains {source} again as it was; only these can change: run, {', '.join(configuration.OPERATIONS)}"
            )
    if "run" not in changed:
        raise UserError("a replay needs a directory of its own: run=DIR")
    return resolved(_overridden(dataclasses.asdict(original.config), overrides), base)


def _parsed(overrides: list[str]) -> list[tuple[str, Any]]:
    """Dotted keys and values of ``key=value`` overrides, in hydra's grammar as for a new run.

    Raises:
        UserError: one that says anything else.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    found = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"expected key=value, got {text!r}: {str(error).splitlines()[0]}") from error
        if override.type is OverrideType.DEL or override.is_sweep_override():
            raise UserError(f"expected key=value, got {text!r}")
        found.append((override.key_or_group, override.value()))
    return found


def _cluster(name: str) -> dict[str, Any]:
    """A cluster profile by name: where a run goes on, or is replayed, may be another place."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=_Root)
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            composed = hydra_compose("config", [f"cluster={name}"])
    except HydraException as error:
        raise UserError(_explain(error, [f"cluster={name}"])) from error
    found: Any = OmegaConf.to_container(composed.cluster, resolve=True)
    return found


def _overridden(values: dict[str, Any], overrides: list[str]) -> Config:
    """A configuration with leaf keys replaced.

    Raises:
        UserError: an unknown key (those that exist there are listed), or a bad value.
    """
    for key, value in _parsed(overrides):
        if key == "cluster" and isinstance(value, str):
            values["cluster"] = _cluster(value)
            continue
        group: Any = values
        *parents, leaf = key.split(".")
        for part in parents:
            group = group.get(part) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            raise unknown("configuration key", key, values)
        group[leaf] = value
    config = configuration.build(Config, values)
    configuration.validate(config)
    return config
