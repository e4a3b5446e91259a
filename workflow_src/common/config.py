"""From YAML to typed configuration, with one clear line for every mistake; and to the stage files that jobs read.

A *stage file* (`results/config/<stage>.json`) holds `seed` and only the sections that a stage depends on. Being a rule's
input, it reruns that stage when, and only when, one of those sections changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import digest, write_if_changed
from workflow_src.common.sections import MANNER, Config

SCHEMA = Path(__file__).resolve().parents[2] / "config" / "schema.json"
T = TypeVar("T")


# ---- strict building ------------------------------------------------------------------------------------------------


def from_dict(cls: type[T], mapping: Any, path: str = "") -> T:
    """Build dataclass `cls` from plain values. Raises `UserError`: path, value, what is allowed, did-you-mean."""
    if not isinstance(mapping, dict):
        raise UserError(f"{path or 'configuration'}: {_show(mapping)} is not a section; give keys and values")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in hints:
            raise UserError(f"{_join(path, key)}: unknown key; {_suggest(str(key), hints)}")
        values[key] = _convert(hints[key], value, _join(path, key))
    return cls(**values)


def to_dict(value: Any) -> Any:
    """A dataclass as plain dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{path}: {_show(value)} is not allowed; {_suggest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is types.UnionType:  # of a scalar and a section
        return _convert(arguments[isinstance(value, dict)], value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}: {_show(value)} is not a section; give keys and values")
        return {str(key): _convert(arguments[1], item, _join(path, key)) for key, item in value.items()}
    return _convert_scalar(hint, value, path)


def _convert_tuple(arguments: tuple, value: Any, path: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}: {_show(value)} is not a list; write it as [a, b]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise UserError(f"{path}: {_show(value)} has {len(value)} entries; it needs {len(arguments)}")
    return tuple(_convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(arguments, value)))


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # YAML reads `1e-3` (without a dot) as text.
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{path}: {_show(value)} is not {names[hint]}")
    return value


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggest(word: str, allowed: typing.Iterable[str]) -> str:
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names) or 'none'}"


def check_name(path: str, name: str, allowed: typing.Iterable[str]) -> None:
    """Raise `UserError` with did-you-mean when `name` is not among `allowed`."""
    names = list(allowed)
    if name not in names:
        raise UserError(f"{path}: {name!r} is unknown; {_suggest(name, names)}")


# ---- files ----------------------------------------------------------------------------------------------------------


def results_folder(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Where a run's results go, without checking its configuration: by KEY=VALUE `overrides`, or by its file."""
    given = dict(item.split("=", 1) for item in overrides)
    written = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    return given.get("results") or written.get("results", Config.results)


def load(path: str | Path) -> Config:
    """Read a YAML configuration file."""
    path = Path(path)
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return from_dict(Config, mapping or {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class Stage:
    """Typed attribute access to the sections in a stage file; `digest` identifies what comes out of it."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self._path = path
        self.digest = digest(_without_manner(content))
        hints = typing.get_type_hints(Config)
        for name, value in content.items():
            check_name(str(path), name, hints)
            setattr(self, name, _convert(hints[name], value, name))

    def __getattr__(self, name: str) -> Any:
        raise UserError(f"{self._path}: has no section {name!r}; it was written for another stage")


def _without_manner(content: Any) -> Any:
    """`content` without the fields of every `training` that change nothing but the way there."""
    if not isinstance(content, dict):
        return content
    plain = {name: _without_manner(value) for name, value in content.items()}
    if isinstance(training := plain.get("training"), dict):
        plain["training"] = {name: value for name, value in training.items() if name not in MANNER}
    return plain


def load_stage(path: str | Path) -> Stage:
    """Read a stage file."""
    path = Path(path)
    try:
        return Stage(path, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such stage file; the Snakefile writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it, the Snakefile writes it anew") from None


def write_stage(folder: str | Path, stage: str, config: Config, sections: dict[str, Any]) -> str:
    """Write `<folder>/<stage>.json` unless it says so already; return its path.

    `sections`: name → None for the whole section, or the narrowed value that the stage depends on.
    """
    plain = to_dict(config)
    content = {"seed": config.seed} | {
        name: plain[name] if value is None else value for name, value in sorted(sections.items())
    }
    path = Path(folder) / f"{stage}.json"
    # Sorted: the order of keys in the YAML decides nothing, so it must rerun nothing.
    write_if_changed(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    return str(path)


# ---- schema ---------------------------------------------------------------------------------------------------------


def schema(hint: Any = Config) -> dict[str, Any]:
    """JSON schema of a type of the configuration model; editors use `config/schema.json` for completion."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return {
            "type": "object",
            "description": (hint.__doc__ or "").strip(),
            "additionalProperties": False,
            "properties": {
                field.name: schema(hints[field.name]) | _default(field) for field in dataclasses.fields(hint)
            },
        }
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[1] is Ellipsis:
            return {"type": "array", "items": schema(arguments[0])}
        return {"type": "array", "prefixItems": [schema(a) for a in arguments], "minItems": len(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(arguments[1])}
    if origin is types.UnionType:
        return {"anyOf": [schema(argument) for argument in arguments]}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]}


def _default(field: dataclasses.Field) -> dict[str, Any]:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        return {}
    return {"default": json.loads(json.dumps(value, default=dataclasses.asdict))}


def schema_text() -> str:
    """What `config/schema.json` must hold."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Rehearsal configuration"}
    return json.dumps(head | schema(), indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Check a configuration file, or show what it means with all defaults filled in.",
        epilog="examples:\n  python -m workflow_src.common.config check config/config.yaml\n"
        "  python -m workflow_src.common.config show config/config.yaml\n"
        "  python -m workflow_src.common.config schema    # rewrite config/schema.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["check", "show", "schema"])
    parser.add_argument("file", nargs="?", default="config/config.yaml")
    arguments = parser.parse_args()
    if arguments.action == "schema":
        write_if_changed(SCHEMA, schema_text())
        return
    config = load(arguments.file)
    if arguments.action == "show":
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")


if __name__ == "__main__":
    run_cli(main)
