"""Converts configs to JSON and back, and compares two configs."""

import difflib
import json
from collections.abc import Mapping

import ml_collections

from halonet_jax.config import knobs
from halonet_jax.config.validation import show
from halonet_jax.errors import ConfigError


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the whole config as JSON text, which `from_json` reads.

    Args:
        config: a whole config.
    """
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str | bytes, sections: Mapping[str, tuple[knobs.Knob, ...]] = knobs.SECTIONS) -> ml_collections.ConfigDict:
    """Rebuilds a config from the text that `to_json` returned. It does not check ranges; `validate` does.

    Args:
        text: JSON, as a string or as UTF-8 bytes. Missing knobs get their defaults: an older version may lack some.
        sections: the tables of knobs, see `knobs.SECTIONS`.

    Raises:
        ConfigError: the text is not a JSON object, has a key that this version does not know, or has a value of the
            wrong type.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 faults, integers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"config.json is torn ({reason}); give the training command again to rewrite it") from None
    if not isinstance(stored, dict):
        raise ConfigError(
            f"config.json holds {show(stored)} instead of an object of knobs; give the training command again to rewrite it"
        )
    config, known = knobs.build(sections), knobs.by_path(sections)
    for key, value in _stored_values(stored, sections):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "use the version of halonet_jax that wrote it, or delete the key"
            raise ConfigError(f"config.json has a key that this version does not know: {show(key)}; {hint}")
        _set(config, key, known[key], value)
    return config


def _stored_values(stored, sections):
    """Yields full keys and values. JSON's lists become tuples."""
    for key, value in stored.items():
        if key and key in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"config.json has {key}={show(value)}, which must be an object of knobs")
            yield from ((f"{key}.{inner}", _tuples(item)) for inner, item in value.items())
        else:
            yield key, _tuples(value)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _set(config, key, knob, value):
    if value is None and knob.default is None:
        return
    problem = ConfigError(f"config.json has {key}={show(value)}, which must be {knob.allowed.text}")
    if not knob.allowed.has_type(value):
        raise problem
    *section, name = key.split(".")
    try:
        (config[section[0]] if section else config)[name] = value
    except OverflowError:  # a whole number too large for a float
        raise problem from None


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """Returns one line for each key whose value differs, for example "model.name: 'h0' -> 'h4'".

    Args:
        old: the config to start from.
        new: the config to compare with it.
    """
    old, new = _flatten(old), _flatten(new)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _flatten(config, prefix=""):
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
