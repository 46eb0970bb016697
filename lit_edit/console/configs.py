"""Configs and settings: finding them by name, and saying what is wrong with them."""

from __future__ import annotations

import inspect
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from lit_edit.data.files import read_text
from lit_edit.data.request import DataError
from lit_edit.errors import ArgumentError, nearest, shorten


def config_root() -> Path:
    """Return the folder of the configs that ship."""
    with as_file(files("lit_edit.configs")) as root:
        return Path(root)


def shipped_configs() -> list[str]:
    """Return the names of all configs that ship, for example ``quickstart`` and ``method/d4s``."""
    root = config_root()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find_config(name: str) -> str:
    """Return the path of a config given as path or name; :class:`ArgumentError` if there is none."""
    if os.path.isfile(name):
        return name
    shipped = config_root() / f"{name.removesuffix('.yaml')}.yaml"
    if os.path.isfile(shipped) and config_root() in shipped.resolve().parents:
        return str(shipped)
    by_end = {path.rpartition("/")[2]: path for path in reversed(shipped_configs())}
    known = {path: path for path in shipped_configs()} | by_end
    near = dict.fromkeys(known[word] for word in nearest(name.removesuffix(".yaml"), known, 3, 0.7))
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ArgumentError(
        f"--config {shorten(name)}: no such file, and no config of that name ships (lit-edit models lists them).{meant}"
    )


def method_config(name: str) -> str:
    """Return the config of a method by any of its names; a file, and a config that ships, as it is.

    Example:
        >>> method_config("rome"), method_config("RROME"), method_config("ft-l"), method_config("method/d4s")
        ('method/rome', 'method/r_rome', 'method/ft_l', 'method/d4s')
    """
    shipped = shipped_configs()
    known = {re.sub("[_-]", "", config): config for config in shipped if config.startswith("method/")}
    wanted = f"method/{re.sub('[_-]', '', name.removeprefix('method/').lower())}"
    if os.path.isfile(name) or name.removesuffix(".yaml") in shipped:
        return name
    if wanted not in known:
        near = [known[f"method/{word}"] for word in nearest(wanted[7:], [config[7:] for config in known], 3, 0.7)]
        meant = f" Did you mean {' or '.join(config.removeprefix('method/') for config in near)}?" if near else ""
        raise ArgumentError(
            f"--method {shorten(name)}: no such file, and no method of that name ships (lit-edit editors lists "
            f"them).{meant}"
        )
    return known[wanted]


SECTIONS = ("model", "data", "trainer")


def check_config(path: str) -> None:
    """Check that a config can be read; the :class:`ArgumentError` names the file and, if known, line or setting."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with readable_yaml(path):
            text = read_text(Path(path))
            _check_sections(path, yaml.compose(text, yaml.SafeLoader))
            OmegaConf.to_object(OmegaConf.load(io.StringIO(text)))  # as the parser will, but it does not name the file
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError(f"{path}: {error.full_key or 'a setting'}: {reason}") from None


@contextmanager
def readable_yaml(path: str | Path) -> Iterator[None]:
    """Say what is wrong with a file that is read and parsed, and where."""
    import yaml

    try:
        yield
    except DataError as error:
        raise ArgumentError(str(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise ArgumentError(f"{place}: bad YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ArgumentError(f"{path}: bad YAML: nested too deeply") from None


def _check_sections(path: str, root: Any) -> None:
    if _kind(root) != "settings":
        raise ArgumentError(f"{path}:1: expected settings by name ('data:' and so on), got {_kind(root)}")
    for name, value in root.value:
        line = name.start_mark.line + 1
        if name.tag != "tag:yaml.org,2002:str":
            raise ArgumentError(f"{path}:{line}: the name of a setting must be text, got {_kind(name)}")
        if name.value in SECTIONS and _kind(value) in ("nothing", "a list"):
            raise ArgumentError(f"{path}:{line}: {name.value!r} must hold settings by name, got {_kind(value)}")


def _kind(node: Any) -> str:
    """Say what a YAML node is."""
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return "nothing"
    return {"sequence": "a list", "mapping": "settings"}.get(node.id) or repr(shorten(node.value))


def check_settings(config: Any) -> None:
    """Check what the types of a command's settings do not say; the :class:`ArgumentError` names the setting."""
    for section in SECTIONS:
        if not hasattr(config[section], "items"):
            raise ArgumentError(f"{section} must hold settings by name, got {shorten(repr(config[section]))}")
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise ArgumentError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
    for name, value in _leaves(config):
        if isinstance(value, str) and value.startswith("~") and os.path.expanduser(value).startswith("~"):
            raise ArgumentError(f"{name}={value}: there is no such home folder")
    check_trainer(config.trainer)


def check_trainer(trainer: Any) -> None:
    """Refuse Trainer settings that Lightning takes and a stream of edits cannot run with."""
    strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
    name = str(strategy).rpartition(".")[2].lower()
    if not re.fullmatch(r"auto|single_?device(strategy)?|ddp(_find_unused_parameters_(true|false))?|ddpstrategy|fsdp2"
                        r"|shardedstrategy", name):  # fmt: skip
        raise ArgumentError(
            f"an edit stream cannot run with trainer.strategy={strategy}; use ddp (a whole model on each device) or "
            "fsdp2 (each layer cut over all devices), or leave it out for one device"
        )
    if str(trainer.precision) == "16-mixed":  # on a CPU Lightning takes bf16-mixed in its place, and says so nowhere
        raise ArgumentError(
            "trainer.precision=16-mixed scales the gradients of an optimizer, and there is none: use 32-true, "
            "bf16-true, bf16-mixed or 16-true"
        )
    for name, low in (
        ("min_epochs", 0),
        ("min_steps", 0),
        ("check_val_every_n_epoch", 1),
        ("num_sanity_val_steps", -1),
        ("log_every_n_steps", 0),
        ("gradient_clip_val", 0),
        ("accumulate_grad_batches", 1),
    ):
        if trainer[name] is not None and not trainer[name] >= low:
            raise ArgumentError(f"trainer.{name} must be at least {low}, got {trainer[name]}")
    if trainer.limit_train_batches == 0:
        raise ArgumentError("trainer.limit_train_batches=0 leaves no edit to make; lit-edit validate measures without")
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > 1:
        raise ArgumentError(f"trainer.val_check_interval={interval}: a stream is not validated while edits are made")


def _leaves(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Go through all settings and lists of settings, with their full names."""
    if hasattr(config, "items"):
        for key, value in config.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _leaves(value, name)
    else:
        yield name, config


def changed_settings(trainer: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return the Trainer's plain settings that the user has chosen, for a message: ``accelerator='gpu', devices=2``.

    ``ours`` are those that lit-edit sets; the others are Lightning's.
    """
    from lightning.pytorch import Trainer

    known = inspect.signature(Trainer.__init__).parameters
    return ", ".join(
        f"{name}={value!r}"
        for name, value in trainer.items()
        if isinstance(value, (str, int, float, list))
        and name in known
        and value != ours.get(name, known[name].default)
        and name not in ("logger", "callbacks", "default_root_dir")
    )


_SAID_OF_TYPES = re.compile(
    r"Does not validate against any|Subtypes: |Errors:|Given value type: |Expected a <class 'NoneType'>"
    r"|Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with"
)


def explain(message: str) -> str:
    r"""Return what jsonargparse says of a value in one line, without what it says of its own types.

    Example:
        >>> explain('Parser key "data.limit":\n  Errors:\n    - Expected a <class \'int\'>\n  Given value: abc')
        'data.limit: expected int; got abc'
    """
    parts: list[str] = []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if not line or _SAID_OF_TYPES.match(line):
            continue
        if line.startswith("Given value: ") and "Namespace(" in line:  # all settings of a class, or of several
            classes = re.findall(r"class_path='([\w.]+)'", line)
            line = f"this is a setting of {classes[0]}" if len(classes) == 1 else ""
        line = re.sub(r"^Parser key \"(.*)\":$", r"\1:", line)
        line = re.sub(r"^Problem with given class_path '(.*)':$", r"\1:", line)
        line = re.sub(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal(\[.*\]))", _expected, line)
        line = re.sub(r"^Given value: (?:NestedArg\(key='(.*)', val='?(.*?)'?\)$)?", _given, line)
        parts += line.replace(". Got value: ", "\ngot ").split("\n")
    if all(part.endswith(":") or part.startswith("got ") for part in parts):
        parts.insert(len(parts) - 1, "cannot be used")
    text = ""
    for part in dict.fromkeys(shorten(part, 240) for part in parts if part):
        text += f"{'' if not text else ' ' if text.endswith(':') else '; '}{part}"
    return text


def _expected(found: re.Match[str]) -> str:
    return f"expected {found[1] or f'one of {found[2][1:-1]}'}"


def _given(found: re.Match[str]) -> str:
    return "got " if found[1] is None else f"got {found[1]}={found[2]}"
