"""From overrides to a checked configuration: hydra for a new run, the run's own records for an existing one."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import toolkit
from toolkit import config as configuration
from toolkit.cluster import ROLES
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


def config_groups() -> list[str]:
    """The groups that configuration files fill."""
    return sorted(path.name for path in config_directory().iterdir() if path.is_dir())


def compose(overrides: list[str], base: Path, complete: bool = True) -> Config:
    """The configuration of a new run.

    Args:
        overrides: hydra overrides, ``experiment=quickstart data.path=…``. A group takes one of its shipped files by name, or any
            file of one's own by its path: ``cluster=my-site.yaml``.
        base: what relative paths in it are relative to.
        complete: False: data and models may be missing, and no value is checked.

    Raises:
        UserError: an unknown key, group or value (the valid ones are listed), or a missing one.
    """
    values = _values(overrides, base)
    del values["toy"]
    config = _resolved(values, base)
    if complete:
        configuration.validate(config)
    return config


def _resolved(values: dict[str, Any], base: Path) -> Config:
    """A configuration of JSON values, as jobs started elsewhere need it."""
    config = resolved(configuration.build(Config, values), base)
    places = {key: getattr(config.cluster, key) for key in ("jobs", *ROLES)}
    found = {
        # not where a virtual environment's link leads: there it would be another Python
        key: dataclasses.replace(wish, python=shlex.quote(str((base / shlex.split(wish.python)[0]).absolute())))
        for key, wish in places.items()
        if _is_file(wish.python, base)
    }
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, **found))


def _is_file(command: str | None, base: Path) -> bool:
    """Whether a command is one word, a path, and that a file with ``base`` as the working directory."""
    try:
        words = shlex.split(command or "")
    except ValueError:
        return False
    return len(words) == 1 and "/" in words[0] and (base / words[0]).is_file()


def _values(overrides: list[str], base: Path) -> dict[str, Any]:
    """What hydra makes of overrides."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="schema", node=_Root)
    given = [_readable(_opened(_named(override, base))) for override in overrides]
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            composed = hydra_compose("config", given)
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, overrides)) from error
    return values


def _named(override: str, base: Path) -> str:
    """An override that gives a group a file of the user's own, with a name by which hydra finds that file.

    Raises:
        UserError: the file is not there, or is no configuration.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    group, _, value = override.partition("=")
    if not value.endswith((".yaml", ".yml")) or group.lstrip("+") not in config_groups():
        return override
    path = base / Path(value).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        node = OmegaConf.create(text)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{override}: cannot read {path} as a configuration file: {error}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{override}: expected keys and values in {path}, got {text[:40]!r}")
    name = re.sub(r"\W", "_", str(path))
    package = re.search(r"^# *@package +(\S+)", text, re.MULTILINE)
    ConfigStore.instance().store(group=group.lstrip("+"), name=name, node=node, package=package[1] if package else None)
    return f"{group}={name}"


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


def _readable(text: str) -> str:
    """An override in hydra's grammar: where that has no place for its value (``--mem=64G``, ``a,b``), quoted.

    Raises:
        UserError: it is no override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    # in quotes, backslashes are special before a quote only
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    complaint = "there is no key"
    for candidate in (text, f"{key}='{escaped}'") if key and equals else (text,):
        try:
            override = OverridesParser.create().parse_override(candidate)
        except HydraException as error:
            complaint = str(error).splitlines()[0]
            continue
        if override.key_or_group and not override.is_sweep_override():
            return candidate
    raise UserError(f"expected key=value, got {text!r}: {complaint}")


def _explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's complaint in one sentence, with the keys that exist where the wrong one was looked for."""
    detail = f"{error} {error.__cause__ or ''}"  # what hydra says of a value, its cause says of its type
    detail = re.sub(r"(?ms)^To append to your config .*?$|^Config search path:.*", "", detail)
    message = " ".join(line.strip() for line in detail.splitlines()[:30] if line.strip())
    if "Interpolation key" in message:
        message += "\n  a shell's variable is $NAME; where it needs braces they are escaped: \\${NAME}"
    named = re.search(r"full_key: (\S+)", message)  # where it is a key of a file
    keys = {override: override.lstrip("+~").partition("=")[0] for override in overrides}
    for override, key in sorted(keys.items(), key=lambda item: -len(item[1])):
        if key and re.search(rf"(?<![\w.-]){re.escape(key)}(?![\w-]|\.\w)", str(error)):
            key = named[1] if named and key in config_groups() else key
            known: Any = _Root
            for part in key.split(".")[:-1]:
                hints = {field.name: field for field in dataclasses.fields(known)}
                if part not in hints:
                    break
                default = hints[part].default_factory
                known = default if dataclasses.is_dataclass(default) else known
            names = ", ".join(sorted(field.name for field in dataclasses.fields(known)))
            return f"{override}: {message}\n  keys there: {names}\n  groups: {', '.join(config_groups())}"
    return f"{overrides[0]}: {message}" if len(overrides) == 1 else message


def updated(run: Run, overrides: list[str]) -> Config:
    """A run's configuration with some operations keys changed; ``cluster=NAME`` or ``cluster=FILE`` takes another profile.

    Raises:
        UserError: a key of the identity half (it is immutable), an unknown key, a bad value.
    """
    can = f"These can change: {', '.join(configuration.OPERATIONS)}"
    for key, _ in _parsed(overrides):
        group = key.split(".")[0]
        if group in configuration.IDENTITY:
            raise UserError(
                f"{key} belongs to the identity of {run.root} and cannot change: its records were made with it. "
                f"Start another run for that. {can}"
            )
        if group in ("run", "name"):
            raise UserError(f"{key} was decided at launch, and {run.root} keeps it. {can}")
    return _overridden(dataclasses.asdict(run.config), overrides, Path.cwd())


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
    return _overridden(dataclasses.asdict(original.config), overrides, base)


def _parsed(overrides: list[str]) -> list[tuple[str, Any]]:
    """Dotted keys and values of ``key=value`` overrides, in hydra's grammar as for a new run.

    Raises:
        UserError: one that says anything else.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    found = []
    for text in overrides:
        override = OverridesParser.create().parse_override(_readable(text))
        if override.type is OverrideType.DEL:
            raise UserError(f"expected key=value, got {text!r}")
        found.append((override.key_or_group, override.value()))
    return found


def _overridden(values: dict[str, Any], overrides: list[str], base: Path) -> Config:
    """A configuration with groups taken anew from their files, then leaf keys replaced.

    Raises:
        UserError: an unknown key (those that exist there are listed), or a bad value.
    """
    groups = set(configuration.OPERATIONS) & set(config_groups())
    files = [override for override in overrides if override.partition("=")[0] in groups]
    for override in files:
        key = override.partition("=")[0]
        values[key] = _values([override], base)[key]
    for key, value in _parsed([override for override in overrides if override not in files]):
        group: Any = values
        *parents, leaf = key.split(".")
        for part in parents:
            group = group.get(part) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            raise unknown("configuration key", key, values)
        group[leaf] = value
    config = _resolved(values, base)
    configuration.validate(config)
    return config
