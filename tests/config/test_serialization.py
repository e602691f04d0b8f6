"""Configs survive JSON; damaged or foreign JSON ends in one line."""

import json

import pytest

from halonet_jax import config as config_lib


def test_an_older_file_gets_new_knobs_at_their_defaults():
    stored = json.loads(config_lib.to_json(config_lib.digits()))
    del stored["data"]["max_pixels"]
    stored["num_epochs"] = 20  # a whole number where the knob is a real one
    loaded = config_lib.from_json(json.dumps(stored).encode())
    assert config_lib.differences(config_lib.digits(), loaded) == ["num_epochs: 350.0 -> 20.0"]
    assert isinstance(loaded.num_epochs, float)


@pytest.mark.parametrize("text, message", [
    ("", "is torn"), ('{"seed": 1', "is torn"), ("[" * 100_000, "nested too deeply"), (b"\xff\xfe\xfa", "is torn"),
    ('{"seed": ' + "9" * 5000 + "}", "is torn"), ("[1]", r"holds \[1\] instead"), ("3", "holds 3 instead"),
    ("null", "holds None instead"), ('"seed"', "holds 'seed' instead"),
    ('{"model": {"nmae": "h0"}}', "does not know: 'model.nmae'; did you mean 'model.name'"),
    ('{"sed": 1}', "'sed'; did you mean 'seed'"), ('{"": 1}', "does not know: ''"), ('{"x.y": {}}', "does not know: 'x.y'"),
    ('{"model": 3}', "model=3, which must be an object"), ('{"model": null}', "model=None, which must be an object"),
    ('{"seed": "x"}', "seed='x', which must be a whole number"), ('{"seed": {}}', "seed={}, which"),
    ('{"seed": 1.5}', "seed=1.5"), ('{"seed": true}', "seed=True"), ('{"data": {"std": [1, "x", 1]}}', "data.std=.*'x'"),
    ('{"data": {"std": [[1], {}, 1]}}', "data.std="), ('{"data": {"dir": 1}}', "data.dir=1"),
    ('{"num_epochs": ' + "9" * 400 + "}", "num_epochs=9"), ('{"tensorboard": 1}', "tensorboard=1"),
    ('{"model": {"num_heads": "4"}}', "model.num_heads='4'"),
])  # fmt: skip
def test_bad_json_ends_in_one_line(text, message):
    with pytest.raises(config_lib.ConfigError, match=message) as raised:
        config_lib.from_json(text)
    assert "\n" not in str(raised.value)


def test_values_out_of_range_are_left_to_validate():
    config = config_lib.from_json('{"num_epochs": Infinity, "batch_size": -1}')
    with pytest.raises(config_lib.ConfigError, match="batch_size=-1 must be"):
        config_lib.validate(config, 1)
