"""config.py: published defaults, overlays, precedence, checks, the parser, resumed runs."""

import argparse
import dataclasses
import json
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import model
import pretrained
import sampler
from config import METHODS, PRESETS, Config, ConfigError

PUBLISHED = {  # paper section 4 and the official configuration
    "model": "b16",
    "image_size": 224,
    "student_dim": 64,
    "teacher_dim": 256,
    "head_layers": 1,
    "batch_size": 128,
    "epochs": 10,
    "min_steps": 0,
    "steps": None,
    "head_lr": 1e-3,
    "backbone_lr": 1e-5,
    "frozen_epochs": 2,
    "schedule": "constant",
    "warmup_steps": 0,
    "ema": 0,
    "weight_decay": 1e-6,
    "weights": (1, 1, 1, 1),
    "classification": "normface",
    "margin": 0,
    "scale": 16,
    "temperature": 0.1,
    "relational_scale": 32,
    "negatives": "domain",
    "domain_margin": 0,
    "sampler": "dynamic",
    "period": 1000,
    "signal": "teacher",
    "distill_into_backbone": False,
    "embedding": "student",
    "index": "merged",
    "min_area": None,
}
COLUMNS = ("weights", "sampler", "signal", "negatives", "domain_margin", "embedding", "index")
EFFECT = {  # of each method on the options that say what is trained and how it is evaluated
    "udon": ((1, 1, 1, 1), "dynamic", "teacher", "domain", 0, "student", "merged"),
    "udon-joint": ((1, 1, 1, 1), "sqrt_size", "teacher", "all", 0.2, "student", "merged"),
    "usc": ((0, 1, 0, 0), "round_robin", "student", "domain", 0, "student", "merged"),
    "ujc": ((0, 1, 0, 0), "round_robin", "student", "all", 0, "student", "merged"),
    "teachers": ((1, 0, 0, 0), "round_robin", "teacher", "domain", 0, "teacher", "separate"),
    "distill": ((0, 1, 1, 1), "round_robin", "student", "domain", 0, "student", "merged"),
    "backbone": ((0, 0, 0, 0), "dynamic", "teacher", "domain", 0, "backbone", "merged"),
}
NEEDED = {"distill": {"teachers": "teachers.pt"}}  # options without which a method is refused
COMPACT = {
    "image_size": 48,
    "init": "compact",
    "batch_size": 32,
    "epochs": 6,
    "min_steps": 1000,
    "period": 100,
    "head_lr": 3e-3,
    "backbone_lr": 6e-4,
    "schedule": "cosine",
    "warmup_steps": 200,
    "frozen_epochs": 0.2,
    "student_init": "pca",
    "ema": 0.99,
}
CHOICES = {  # where the values that an option may take are defined
    "init_activation": model.ACTIVATIONS,
    "init_statistics": pretrained.STATISTICS,
    "sampler": sampler.STRATEGIES,
    "preset": PRESETS,
    "method": METHODS,
    "compare": METHODS,
}
GROUPS = ("data", "model", "training", "losses", "paper's variants")
FIELDS = tuple(field.name for field in dataclasses.fields(Config))


def values_of(**options):
    return dataclasses.asdict(Config(**options))


def parsed(line):
    """The values of the options on a command line."""
    parser = argparse.ArgumentParser()
    config.add_options(parser)
    return vars(parser.parse_args(line.split()))


# Values -------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_setting():
    values = values_of()
    assert {name: values[name] for name in PUBLISHED} == PUBLISHED
    assert config.origins(Config()) == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_change_size_and_schedule_only(preset):
    """Never the method: `udon` is the published one for every preset."""
    expected = COMPACT if preset in ("mini", "micro") else {}
    expected |= {"init_statistics": "clip"} if preset.endswith("-clip") else {}
    size = preset.removeprefix("uned-").removesuffix("-clip")
    assert values_of(preset=preset) == values_of() | expected | {"preset": preset, "model": size}


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("method", EFFECT)
def test_methods_are_overlays(preset, method):
    values = values_of(preset=preset, method=method, **NEEDED.get(method, {}))
    assert tuple(values[name] for name in COLUMNS) == EFFECT[method]
    others = values_of(preset=preset)
    untouched = values.keys() - {*COLUMNS, "method", "epochs", "teachers", "student_init"}
    assert {name: values[name] for name in untouched} == {name: others[name] for name in untouched}
    assert values["epochs"] == (0 if method == "backbone" else others["epochs"])
    random = method == "backbone" or preset not in ("mini", "micro")  # its heads are not used
    assert values["student_init"] == ("lecun" if random else "pca")


def test_every_method_is_tested():
    assert EFFECT.keys() == METHODS.keys()


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": st.integers(1, 512),
        "head_lr": st.floats(0, 1),
        "frozen_epochs": st.floats(0, 3),
        "sampler": st.sampled_from(("round_robin", "size", "sqrt_size", "balanced")),
        "model": st.sampled_from([*model.SIZES]),
        "antialias": st.booleans(),
        "period": st.integers(1, 10**6),
    },
)


@settings(max_examples=100)
@given(st.sampled_from([None, *PRESETS]), st.sampled_from([*METHODS]), OPTIONS)
def test_options_override_the_method_the_method_the_preset_the_preset_the_defaults(
    preset, method, options
):
    options = options | NEEDED.get(method, {})
    values = values_of(preset=preset, method=method, **options)
    for name, value in values.items():
        layers = ({"preset": preset, "method": method}, options, METHODS[method])
        layers += (PRESETS.get(preset, {}), values_of())
        assert value == next(layer[name] for layer in layers if name in layer), name


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("method", METHODS)
def test_json_keeps_a_configuration(preset, method):
    one = Config(preset=preset, method=method, domains=("b", "a"), **NEEDED.get(method, {}))
    again = Config(**json.loads(json.dumps(dataclasses.asdict(one))))
    assert again == one and hash(again) == hash(one)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_those_of_the_module_that_uses_them(name):
    pending, choices = [typing.get_type_hints(Config)[name]], ()
    while pending:
        kind = pending.pop()
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
        else:
            pending.extend(typing.get_args(kind))
    assert set(choices) == set(CHOICES[name])


def test_sizes_of_the_vit_are_models():
    assert set(config.MODELS) == set(model.SIZES)
    assert all(Config(model=name).model == name for name in model.SIZES)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_timm_model_comes_with_its_weights_and_image_size(preset):
    one = Config(model="timm:resnet18", preset=preset)
    assert (one.init, one.image_size) == ("timm", 0)
    one = Config(model="timm:resnet18", preset=preset, init="scratch", image_size=64)
    assert (one.init, one.image_size) == ("scratch", 64)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "b/16"}, ["--model is b/16", "b16", "timm:NAME"]),
        ({"model": "timm"}, ["--model is timm", "timm:NAME"]),
        ({"image_size": 0}, ["--image-size is 0", "b16"]),
        ({"init": "timm"}, ["--init is timm", "b16"]),
        (
            {"model": "timm:resnet18", "init_activation": "gelu"},
            ["--init-activation is gelu", "timm:resnet18"],
        ),
    ],
    ids=str,
)
def test_options_that_are_not_the_models_are_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        Config(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_origins_name_what_set_each_difference():
    one = Config(preset="mini", method="ujc", epochs=9, sampler="size", seed=0, out="runs/x")
    found = config.origins(one)
    given = ("epochs", "min_steps")  # which is 0, as published, with a number of epochs
    compact = {name: value for name, value in COMPACT.items() if name not in given}
    assert found == {
        "preset mini": compact | {"model": "mini"},
        "method ujc": {"weights": (0, 1, 0, 0), "signal": "student", "negatives": "all"},
        "options": {"sampler": "size", "epochs": 9},
    }
    assert config.origins(Config(preset="mini", method="usc", backbone_lr=1e-5)).keys() == {
        "preset mini",
        "method usc",  # the option restores the published learning rate
    }


# Values that are refused --------------------------------------------------------------------------

WRONG = [
    ({"learning_rate": 1}, "option 'learning_rate' is unknown: use one of data, domains"),
    ({"preset": "nano"}, "--preset is nano: it must be one of mini, micro"),
    ({"method": "kd"}, "--method is kd: it must be one of udon, udon-joint"),
    ({"method": None}, "--method is not given"),
    ({"preset": "mini", "ema": 1.0}, "--ema is 1 with --student-init pca, so that the mean stays"),
    ({"model": "b/16"}, "--model is b/16: it must be one of micro"),
    ({"compare": ("kd",)}, "--compare is kd: it must be any number of one of udon"),
    ({"steps": 2.5}, "--steps is 2.5: it must be a whole number or left out"),
    ({"steps": True}, "--steps is True: it must be a whole number"),
    ({"steps": 0}, "--steps is 0: it must be 1 or more"),
    ({"batch_size": 0}, "--batch-size is 0: it must be 1 or more"),
    ({"batch_size": "64"}, "--batch-size is 64: it must be a whole number"),
    ({"head_layers": 101}, "--head-layers is 101: it must be 100 or less"),
    ({"epochs": -1}, "--epochs is -1: it must be 0 or more"),
    ({"epochs": 0}, "--epochs is 0: give a length above 0, or use --method backbone"),
    ({"head_lr": float("nan")}, "--head-lr is nan: it must be finite"),
    ({"head_lr": float("inf")}, "--head-lr is inf: it must be finite"),
    ({"seed": 2**63}, "--seed is 9223372036854775808: it must be finite and below 2^63"),
    ({"seed": 10**5000}, "--seed is a number of hundreds of digits"),
    ({"scale": 0}, "--scale is 0: it must be above 0"),
    ({"temperature": 0.0}, "--temperature is 0.0: it must be above 0"),
    ({"min_area": 0}, "--min-area is 0: it must be above 0"),
    ({"min_area": 1.5}, "--min-area is 1.5: it must be 1 or less"),
    ({"antialias": 1}, "--antialias is 1: it must be true or false"),
    ({"data": ""}, "--data is ''"),
    ({"data": "a\0b"}, r"--data is 'a\x00b'"),
    ({"domains": "cars"}, "--domains is cars: it must be any number of text or left out"),
    ({"domains": ("cars", 3)}, "--domains is cars 3"),
    ({"weights": (1, 1, 1)}, "--weights is 1 1 1: it must be 4 of a number"),
    ({"weights": (1, 1, -1, 1)}, "--weights is -1: it must be 0 or more"),
    ({"teachers": 3}, "--teachers is 3: it must be text or left out"),
]
CONTRADICTIONS = [
    ({"weights": (0, 0, 0, 0)}, "--weights are 0 0 0 0, so that nothing is trained"),
    ({"method": "backbone", "epochs": 3}, "use --method backbone without --steps and --epochs"),
    ({"method": "backbone", "steps": 3}, "without --steps and --epochs"),
    ({"weights": (0, 1, 1, 0), "sampler": "size"}, "--teachers is not given"),
    ({"method": "distill"}, "--teachers is not given"),
    ({"teachers": "best.pt"}, "--teachers is best.pt but --weights are 1"),
    ({"method": "usc", "teachers": "best.pt"}, "--teachers is best.pt but --weights are 0"),
    ({"method": "usc", "sampler": "dynamic", "signal": "teacher"}, "--signal is teacher"),
    ({"method": "teachers", "sampler": "dynamic", "signal": "student"}, "--signal is student"),
    ({"domain_margin": 0.3}, "--domain-margin is 0.3 with --negatives domain"),
    ({"method": "udon-joint", "negatives": "domain"}, "--domain-margin is 0.2"),
    ({"margin": 0.2}, "--margin is 0.2 with --classification normface"),
    ({"classification": "arcface"}, "--margin is 0.0 with --classification arcface"),
    ({"embedding": "teacher"}, "--embedding is teacher with --index merged"),
    ({"method": "usc", "embedding": "teacher", "index": "separate"}, "use --method teachers"),
    ({"method": "teachers", "embedding": "student"}, "--embedding is student, but --weights"),
    ({"method": "usc", "compare": ("usc",)}, "--compare names usc, which is --method"),
]


def shortened(value):
    return config.shown(*value.values()) if isinstance(value, dict) and len(value) == 1 else None


@pytest.mark.parametrize("options, sentence", WRONG + CONTRADICTIONS, ids=shortened)
def test_wrong_values_and_contradictions(options, sentence):
    with pytest.raises(ConfigError) as error:
        Config(**options)
    assert sentence in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda value: st.lists(value, max_size=4) | st.dictionaries(st.text(max_size=3), value),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.sampled_from(FIELDS), JSON | st.lists(st.floats() | st.integers(), max_size=5))
def test_any_value_is_accepted_or_refused_in_one_line(name, value):
    try:
        Config(**{name: value})
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 500, str(error)


# The command line ---------------------------------------------------------------------------------


def test_every_option_has_a_help_text_in_one_of_the_groups():
    parser = argparse.ArgumentParser()
    config.add_options(parser)
    text = parser.format_help()
    positions = [text.index(f"\n{group}:") for group in GROUPS]
    assert positions == sorted(positions)
    flags = set(re.findall(r"^  (--[\w-]+)", text[positions[0] :], re.MULTILINE))
    assert flags == {config.flag(name) for name in FIELDS}
    assert set(config.help_texts()) == set(FIELDS)
    assert all(len(sentence) > 20 for sentence in config.help_texts().values())


def test_help_shows_the_values_that_run():
    parser = argparse.ArgumentParser()
    config.add_options(parser)
    text = " ".join(parser.format_help().split())
    for name, value in PRESETS["mini"].items():
        assert f"(published: {values_of()[name]}; mini: {value})" in text, name
    assert "(default: 64)" in text and "(default: 1.0 1.0 1.0 1.0)" in text


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("--weights 1 0 0 0.5", "weights", (1, 0, 0, 0.5)),
        ("--domains birds cars", "domains", ("birds", "cars")),
        ("--compare udon usc", "compare", ("udon", "usc")),
        ("--compare", "compare", ()),
        ("--no-antialias", "antialias", False),
        ("--distill-into-backbone", "distill_into_backbone", True),
        ("--steps 7", "steps", 7),
        ("--head-lr 1e-2", "head_lr", 0.01),
        ("--min-area 0.3", "min_area", 0.3),
    ],
)
def test_a_command_line_gives_values_of_the_right_types(line, name, value):
    given_options = parsed(f"{line} --method teachers")
    assert given_options.keys() == {name, "method"}, "options that are not given are absent"
    found = getattr(Config(**given_options), name)
    assert found == value and type(found) is type(value)


def test_the_command_line_uses_mini_and_compares_without_data_and_method():
    demo = config.configuration({}, resume=False)
    assert (demo.preset, demo.method, demo.compare) == ("mini", "udon", ("udon-joint", "usc"))
    for options in ({"data": "x"}, {"method": "udon"}, {"compare": ()}):
        assert config.configuration(options, resume=False).compare == ()
    assert config.configuration({"preset": "uned-s16"}, resume=False).model == "s16"


# Runs that are compared, or resumed ---------------------------------------------------------------


def test_a_compared_method_is_trained_with_the_same_options(tmp_path):
    first = Config(preset="mini", compare=("usc",), steps=9, sampler="size", seed=4, data="d")
    other = config.with_method(first, "usc", tmp_path)
    expected = Config(
        preset="mini", method="usc", steps=9, sampler="size", seed=4, data="d", out=str(tmp_path)
    )
    assert other == expected


def test_a_compared_method_does_not_take_over_the_first_ones_overlay(tmp_path):
    first = Config(preset="micro", method="udon-joint", compare=("udon",), batch_size=8)
    expected = Config(preset="micro", method="udon", batch_size=8, out=str(tmp_path))
    assert config.with_method(first, "udon", tmp_path) == expected


RULES = {  # options that imply others, and what they imply
    "epochs": (None, 6.0, 9.0),
    "steps": (None, 5),
    "freeze_backbone": (None, True),
    "min_steps": (None, 0, 1000),
    "ema": (None, 0.0, 0.99),
    "schedule": (None, "constant", "cosine"),
    "warmup_steps": (None, 0, 200),
    "save_every": (None, 200, 2000),
}


@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in RULES.items()}))
def test_a_configuration_is_its_options(options):
    """So that a compared run, and one from a config.json, has the options of the first."""
    options = {name: value for name, value in options.items() if value is not None}
    for place in ({"preset": "mini"}, {"preset": None, "method": "usc"}):
        one = Config(**options | place)
        found = config.options_of(one)
        assert Config(**found | place) == one
        assert found.items() <= options.items() | {("min_steps", 0), ("ema", 0.0)}


def test_a_configuration_has_no_options_that_others_imply():
    assert config.options_of(Config(preset="mini", freeze_backbone=True)) == {
        "freeze_backbone": True
    }
    assert config.options_of(Config(preset="mini", steps=5)) == {"steps": 5}


def test_the_options_of_a_resumed_run(tmp_path):
    started = Config(preset="micro", steps=9, out=str(tmp_path), seed=4)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(started)))
    options = {"out": str(tmp_path), "steps": 20, "workers": 0, "device": "cpu", "compare": ["usc"]}
    resumed = config.configuration(options, resume=True)
    assert resumed == dataclasses.replace(started, **options)
    for changed in ({"seed": 5}, {"method": "usc"}, {"head_lr": 1.0}, {"preset": "mini"}):
        (name,) = changed
        with pytest.raises(ConfigError, match=f"{config.flag(name)} is .* was started with"):
            config.configuration(changed | {"out": str(tmp_path)}, resume=True)
    with pytest.raises(ConfigError, match="--resume needs --out"):
        config.configuration({}, resume=True)


def test_a_length_that_is_given_is_kept():
    lengths = [Config(preset="mini", **given) for given in ({}, {"epochs": 6.0}, {"min_steps": 9})]
    assert [one.epochs for one in lengths] == [6, 6, 6]
    assert [one.min_steps for one in lengths] == [1000, 0, 9]
    assert Config(preset="mini", epochs=6.0, min_steps=9).min_steps == 9


def test_a_number_of_steps_makes_the_schedule_of_a_preset_constant():
    assert Config(preset="mini").schedule == Config(preset="mini", epochs=2).schedule == "cosine"
    started = Config(preset="mini", steps=9)
    assert (started.schedule, started.warmup_steps, started.ema) == ("constant", 0, 0)
    assert Config(preset="mini", steps=9, schedule="cosine").schedule == "cosine"


def test_a_cosine_schedule_fixes_the_number_of_steps():
    started = Config(schedule="cosine")
    with pytest.raises(ConfigError, match="it was started without it, .*: leave it out, or .*init"):
        config.check_same(dataclasses.replace(started, steps=12), started, "it")
    started = Config(steps=9, schedule="cosine")
    with pytest.raises(ConfigError, match="--steps is 12, but it was started with 9, .* --init"):
        config.check_same(dataclasses.replace(started, steps=12), started, "it")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "rubbish", '{"seed": ', "[" * 10**5, "\xff", json.dumps({"seed": "x"})],
    ids=["empty", "list", "object", "text", "half", "nested", "latin-1", "incomplete"],
)
def test_a_damaged_config_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="config.json is not a configuration of this version"):
        config.read(tmp_path / "config.json")


def test_a_config_file_of_another_version(tmp_path):
    values = values_of()
    path = tmp_path / "config.json"
    for changed, sentence in (
        ({"beside": "usc"}, "option 'beside' is unknown"),
        ({"seed": "x"}, "--seed is x"),
    ):
        path.write_text(json.dumps(values | changed))
        with pytest.raises(ConfigError, match=sentence):
            config.read(tmp_path / "config.json")
    del values["period"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="period is missing"):
        config.read(tmp_path / "config.json")


def test_the_options_of_another_run(tmp_path):
    """Those of its file come between the overlays and the options that are given."""
    first = Config(preset="micro", method="usc", seed=4, head_lr=0.5, out="runs/first")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(first)))
    same = config.configuration({"config": str(path)}, resume=False)
    assert same == dataclasses.replace(first, out=None)
    given = {"config": str(path), "method": "udon-joint", "seed": 5}
    expected = Config(preset="micro", method="udon-joint", seed=5, head_lr=0.5)
    assert config.configuration(given, resume=False) == expected
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(first, steps=7))))
    assert config.configuration({"config": str(path)}, resume=False).steps == 7
    assert config.configuration({"config": str(path), "epochs": 2.0}, resume=False).steps is None
    with pytest.raises(ConfigError, match="--config is given with --resume"):
        config.configuration(given | {"out": "runs/first"}, resume=True)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=f"{path} is not .* give the config.json of a run"):
        config.configuration(given, resume=False)
