"""Every knob of the tables refuses every kind of bad value in one line, and what the line proposes is accepted."""

import math
import re
import shlex

import pytest

from halonet_jax import config as config_lib
from halonet_jax.config import knobs, rules
from halonet_jax.models import variants

KNOBS = knobs.by_path()
HUGE = 10**30


def bad_values(knob):
    """Values of any type that `knob` must refuse."""
    rule = knob.allowed
    bad = [math.nan, math.inf, -math.inf, HUGE, -HUGE, {}, [], b"x", (1, "x", None), ((1,),)]
    bad += [] if isinstance(rule, rules.Switch) else [True]
    bad += [] if knob.default is None else [None]
    bad += [] if isinstance(rule, rules.Text) and rule.may_be_empty else [""]
    if isinstance(rule, (rules.Whole, rules.Real)):
        step = 1 if isinstance(rule, rules.Whole) else 1e-7 * max(1, abs(rule.most))
        bad += ["1", (), (1,), rule.least - step, rule.most + step]
        bad += [1.5] if isinstance(rule, rules.Whole) else []
    elif isinstance(rule, rules.Size):
        bad += ["1", 1.5, (), (9,), (9, 9, 9), (9, True), (9, 9.0), [9, 9], rule.least - 1, (rule.most + 1, 9), (9, rule.least - 1)]
    elif isinstance(rule, rules.Switch):
        bad += ["True", 1, 0, 0.5, ()]
    elif isinstance(rule, (rules.Text, rules.Choice)):
        bad += [1, (), ("x",), "nul\0"]
    else:
        inner = rule.other if isinstance(rule, rules.EmptyOr) else rule
        good = knob.example or knob.default or variants.DEFAULTS.get(knob.key, ())
        bad += ["1", 1, list(good)] if good else ["1", 1]
        bad += [()] if inner.least and inner is rule else []
        bad += [good + good[:1] * inner.most] if good else []
        for wrong in (math.nan, math.inf, -HUGE, True, None, (), "" if isinstance(inner.item, rules.Text) else "x"):
            bad.append((good or ("x",))[:-1] + (wrong,))
        if inner.rising:
            bad.append(good[::-1])
    return bad


def with_value(key, value):
    config = config_lib.imagenet()
    *section, name = key.split(".")
    with config.unlocked(), config.ignore_type():
        block = config[section[0]] if section else config
        del block[name]
        block[name] = value
    return config


@pytest.mark.parametrize("key", KNOBS)
def test_bad_values_end_in_one_line_whose_proposal_works(key):
    for value in bad_values(KNOBS[key]):
        with pytest.raises(config_lib.ConfigError) as raised:
            config_lib.validate(with_value(key, value), 1)
            pytest.fail(f"{key}={value!r} passed")
        message = str(raised.value)
        assert message.startswith(f"{key}=") and "\n" not in message
        for option in shlex.split(message.partition("for example ")[2]):
            flag, _, text = option.partition("=")
            proposal = text if isinstance(KNOBS[key].allowed, rules.Text) else eval(text, {})  # as the flag's parser does
            assert flag == f"--config.{key}" and KNOBS[key].allowed.allows(proposal)
            config_lib.validate(with_value(key, proposal), 1)
        for proposal in re.findall(r"did you mean '(\w+)'", message):
            config_lib.validate(with_value(key, proposal), 1)


@pytest.mark.parametrize("key", KNOBS)
def test_defaults_and_ends_of_ranges_are_allowed(key):
    knob, rule = KNOBS[key], KNOBS[key].allowed
    assert knob.default is None or rule.allows(knob.default)
    assert (
        knob.unit == knob.unit.strip() and knob.source in (knobs.PAPER, knobs.IMPLIED, knobs.OPEN, knobs.OURS) and knob.meaning
    )
    if isinstance(rule, (rules.Whole, rules.Real)):
        assert rule.allows(rule.least) and rule.allows(rule.most)
    if isinstance(rule, rules.Size):
        assert rule.allows((rule.least, rule.most))
    if isinstance(rule, rules.Choice):
        assert all(map(rule.allows, rule.names))


@pytest.mark.parametrize("value", [10**5000, eval("(" * 50 + "1," + ")," * 49 + ")"), "x\ny" * 100],
                         ids=["digits", "nested", "long"])  # fmt: skip
def test_messages_stay_short(value):
    with pytest.raises(config_lib.ConfigError) as raised:
        config_lib.validate(with_value("seed", value), 1)
    assert len(str(raised.value)) < 250 and "\n" not in str(raised.value)


def test_a_task_may_replace_a_section():
    boxes = (knobs.Knob("max_boxes", 100, rules.Whole(1, 1000), "boxes", knobs.OURS, "of an image"),)
    sections = {**knobs.SECTIONS, "boxes": boxes}
    config = config_lib.imagenet(sections)
    config_lib.validate(config, 1, sections)
    config.boxes.max_boxes = 2000
    again = config_lib.from_json(config_lib.to_json(config), sections)
    assert config_lib.differences(config, again) == []
    with pytest.raises(config_lib.ConfigError, match="boxes.max_boxes=2000 must be a whole number between 1 and 1000"):
        config_lib.validate(again, 1, sections)
    with pytest.raises(config_lib.ConfigError, match="the config lacks boxes.max_boxes"):
        config_lib.validate(config_lib.imagenet(), 1, sections)
