"""sampler.py: quotas, weights in closed form, the floor, replay from a state, independence of the call pattern, bad input."""

import ast
import copy
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sampler import STRATEGIES, DomainSampler

EXAMPLES, PERIODS = 40, 4  # of each property, and periods drawn in each
DOMAINS = ("cars", "sop", "inshop", "inat", "met", "gldv2")
LOSSES = [0.0, 1e-6, 0.5, 2.0, 1e6]  # among drawn ones: a domain done, and ones far apart
TINY = 1e-9  # rounding of sums of weights
SOURCE = Path(inspect.getsourcefile(DomainSampler))

property_test = settings(deadline=None, max_examples=EXAMPLES)
any_loss = st.one_of(st.sampled_from(LOSSES), st.floats(1e-12, 20))


@st.composite
def runs(draw, strategies=STRATEGIES, losses=any_loss, shortest=0):
    """Arguments of a DomainSampler, and a table {domain: losses its batches have in turn}."""
    domains = DOMAINS[: draw(st.integers(1, len(DOMAINS)))]
    strategy = draw(st.sampled_from(strategies))
    sizes = (
        {d: draw(st.one_of(st.integers(1, 100), st.integers(1, 10**6))) for d in domains}
        if strategy == "size"
        else None
    )
    arguments = {
        "domains": domains,
        "strategy": strategy,
        "sizes": sizes,
        "seed": draw(st.integers(0, 2**40)),
        "period": draw(st.integers(max(len(domains), shortest), max(40, shortest))),
    }
    return arguments, {d: draw(st.lists(losses, min_size=1, max_size=3)) for d in domains}


def new(arguments, **changes):
    arguments = {**arguments, **changes}
    return DomainSampler(arguments.pop("domains"), arguments.pop("strategy"), **arguments)


def run(sampler, steps, table, first=0):
    """Draws `steps` domains, each observed with its loss of that step; returns them."""
    drawn = []
    for step in range(first, first + steps):
        domain = sampler.draw()
        sampler.observe(domain, table[domain][step % len(table[domain])])
        drawn.append(domain)
    return drawn


def raised_to_floor(weights, period):
    """Independently of the module: max(1/period, factor x weight), the factor that makes the sum 1 found by bisection."""
    low, high = 0.0, 1 / max(weights)  # the largest weight times the factor is at most 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.maximum(1 / period, weights * middle).sum() < 1 else (low, middle)
        )
    return np.maximum(1 / period, weights * high)


# Quotas ---------------------------------------------------------------------------------------------------------------------


@property_test
@given(runs())
def test_quotas_of_each_period_follow_the_weights(case):
    arguments, table = case
    sampler, period = new(arguments), arguments["period"]
    for number in range(PERIODS):
        weights = sampler.weights
        decided = sampler.upcoming()
        assert len(decided) == period, (
            f"the quotas of period {number} add up to {len(decided)}, not {period}"
        )
        counts = Counter(run(sampler, period - 1, table))
        assert period == 1 or sampler.weights == weights, (
            "the weights stay in force to the end of the period"
        )
        counts.update(run(sampler, 1, table))
        assert counts == Counter(decided)
        for domain in arguments["domains"]:
            exact = weights[domain] * period
            assert abs(counts[domain] - exact) < 1, (
                f"period {number}: {counts[domain]} of {domain}, weight x period {exact}"
            )
            assert counts[domain] >= 1, (
                f"period {number}: no batch of {domain}, weight {weights[domain]}"
            )


@property_test
@given(st.lists(st.integers(1, 50), min_size=1, max_size=len(DOMAINS)), st.integers(50, 90))
def test_largest_remainders_are_rounded_up(sizes, period):
    """In exact arithmetic: whoever is rounded up has at least the remainder of whoever is not."""
    sizes = dict(zip(DOMAINS, sizes))
    exact = {d: Fraction(size, sum(sizes.values())) * period for d, size in sizes.items()}
    assume(min(exact.values()) >= 1)  # nobody at the floor
    sampler = DomainSampler(sizes, "size", period=period, sizes=sizes)
    counts = Counter(sampler.draw() for _ in range(period))
    up = [exact[d] % 1 for d in sizes if counts[d] > exact[d]]
    down = [exact[d] % 1 for d in sizes if counts[d] < exact[d]]
    assert min(up, default=1) >= max(down, default=0), f"{counts} of {exact}"
    assert all(counts[d] == exact[d] for d in sizes if exact[d].denominator == 1), (
        f"{counts} of {exact}"
    )


@pytest.mark.parametrize(
    "loud, quiet", [(1e6, 1.0), (1.0, 1e-6), (1.0, 0.0), (1e-300, 0.0), (1e300, 1e-300)]
)
@pytest.mark.parametrize("period", [6, 7, 50, 1000])
def test_every_domain_is_served_however_far_apart_the_losses_are(period, loud, quiet):
    sampler = DomainSampler(DOMAINS, period=period)
    table = {d: [loud if d == "met" else quiet] for d in DOMAINS}
    for number in range(3):
        counts = Counter(run(sampler, period, table))
        assert set(counts) == set(DOMAINS), f"period {number} of {period}: {counts}"
    expected = {d: period - 5 if d == "met" else 1 for d in DOMAINS}
    assert counts == expected, (
        "all but one batch each for the domain that has nearly all of the loss"
    )


# Weights --------------------------------------------------------------------------------------------------------------------


@property_test
@given(runs())
def test_weights_are_a_distribution_with_a_floor(case):
    arguments, table = case
    sampler, period = new(arguments), arguments["period"]
    for step in range(2 * period + 1):
        weights = sampler.weights
        assert tuple(weights) == arguments["domains"]
        assert abs(sum(weights.values()) - 1) < TINY, weights
        assert min(weights.values()) >= (1 - TINY) / period > 0, (
            f"{weights} at step {step} of period {period}"
        )
        run(sampler, 1, table, step)


@property_test
@given(runs(["dynamic"], st.floats(1, 4), shortest=30))
def test_weights_equal_mean_loss_over_sum_of_means(case):
    """Losses in [1, 4] of up to 6 domains: the smallest share is 1/21, above the floor where the period is 30 or more."""
    arguments, table = case
    sampler, period, domains = new(arguments), arguments["period"], arguments["domains"]
    for number in range(PERIODS):
        window = {d: [] for d in domains}
        for step in range(period):
            domain = sampler.draw()
            loss = table[domain][(number + step) % len(table[domain])]
            window[domain].append(loss)
            sampler.observe(domain, loss)
        means = np.array([np.mean(window[d]) for d in domains])
        np.testing.assert_allclose(
            [sampler.weights[d] for d in domains], means / means.sum(), rtol=1e-12
        )


@property_test
@given(runs(["dynamic", "size"]))
def test_weights_below_the_floor_are_raised_to_it(case):
    arguments, table = case
    table = {d: values[:1] for d, values in table.items()}  # one loss a domain: it is the mean
    sampler, period, domains = new(arguments), arguments["period"], arguments["domains"]
    if arguments["strategy"] == "dynamic":
        shares = np.array([table[d][0] for d in domains])
        run(sampler, period, table)
    else:
        shares = np.array([arguments["sizes"][d] for d in domains])
    if not shares.any():
        shares = shares + 1  # nothing to go by: still equal
    np.testing.assert_allclose(
        [sampler.weights[d] for d in domains],
        raised_to_floor(shares / shares.sum(), period),
        rtol=1e-9,
    )


def test_weights_after_a_period_of_known_losses():
    sampler = DomainSampler("abc", period=30)
    run(sampler, 29, {"a": [3.0], "b": [2.0], "c": [1.0]})
    assert set(sampler.weights.values()) == {1 / 3}, "equal until the period is over"
    sampler.observe(sampler.draw(), 1.0)
    assert sampler.weights == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})
    counts = Counter(run(sampler, 30, {"a": [1.0], "b": [1.0], "c": [1.0]}))
    assert counts == {"a": 15, "b": 10, "c": 5}
    assert sampler.weights == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}), (
        "the window is one period"
    )


def test_an_unseen_domain_keeps_its_weight():
    sampler = DomainSampler("abc", period=30)
    for _ in range(30):
        if (domain := sampler.draw()) != "c":
            sampler.observe(domain, {"a": 3.0, "b": 1.0}[domain])
    # a and b share 1 as 3 : 1, c keeps 1/3; all divided by 4/3
    assert sampler.weights == pytest.approx({"a": 9 / 16, "b": 3 / 16, "c": 4 / 16})
    for _ in range(30):
        sampler.draw()
    sampler.observe("a", 5.0)
    assert sampler.weights == pytest.approx({"a": 16 / 23, "b": 3 / 23, "c": 4 / 23}), (
        "1 + 3/16 + 4/16 = 23/16"
    )


@pytest.mark.parametrize("losses", [[0.0], []])
def test_weights_stay_without_any_loss(losses):
    sampler = DomainSampler("ab", period=10)
    run(sampler, 10, {"a": [3.0], "b": [1.0]})
    before = sampler.weights
    assert before == pytest.approx({"a": 0.75, "b": 0.25})
    for _ in range(10):
        domain = sampler.draw()
        for loss in losses:
            sampler.observe(domain, loss)
    assert sampler.weights == before


@property_test
@given(runs(["round_robin", "size", "balanced"]))
def test_losses_move_the_dynamic_strategy_alone(case):
    arguments, table = case
    sampler, silent, steps = new(arguments), new(arguments), PERIODS * arguments["period"]
    assert run(sampler, steps, table) == [silent.draw() for _ in range(steps)]
    assert sampler.weights == silent.weights


# Strategies -----------------------------------------------------------------------------------------------------------------


@property_test
@given(runs(["dynamic", "round_robin"]))
def test_round_robin_order(case):
    """Across the ends of periods too, where the number of domains does not divide the period; dynamic in its first period."""
    arguments, table = case
    domains = arguments["domains"]
    steps = arguments["period"] * (1 if arguments["strategy"] == "dynamic" else PERIODS)
    turns = (domains * steps)[:steps]
    assert tuple(run(new(arguments), steps, table)) == turns


def test_dynamic_is_shuffled_after_its_first_period():
    sampler, table = DomainSampler("ab", period=50), {"a": [1.0], "b": [1.0]}
    run(sampler, 50, table)
    second = run(sampler, 50, table)
    assert Counter(second) == {"a": 25, "b": 25} and second != list("ab" * 25)


def test_size_is_proportional():
    sampler = DomainSampler("abc", "size", period=20, sizes={"c": 7, "a": 1, "b": 2})
    assert sampler.weights == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.7})
    for _ in range(PERIODS):
        assert Counter(sampler.draw() for _ in range(20)) == {"a": 2, "b": 4, "c": 14}


@property_test
@given(runs(["balanced"]))
def test_balanced_is_equal(case):
    arguments, table = case
    sampler, share = new(arguments), 1 / len(arguments["domains"])
    assert all(abs(weight - share) < TINY for weight in sampler.weights.values()), sampler.weights
    counts = Counter(run(sampler, arguments["period"], table))
    assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_defaults_are_dynamic_with_the_official_period():
    table = {"a": [3.0], "b": [1.0]}
    plain, explicit = DomainSampler("ab"), DomainSampler("ab", "dynamic", period=1000, seed=0)
    assert run(plain, 2500, table) == run(explicit, 2500, table)
    assert plain.weights == pytest.approx({"a": 0.75, "b": 0.25})


# The order within a period --------------------------------------------------------------------------------------------------


@property_test
@given(
    st.sampled_from(["dynamic", "size", "balanced"]),
    st.lists(st.integers(0, 2**40), min_size=2, max_size=2, unique=True),
)
def test_seed_and_period_decide_the_order(strategy, seeds):
    sizes = dict.fromkeys(DOMAINS, 1) if strategy == "size" else None
    table = {d: [1.0] for d in DOMAINS}
    first, same, other = (
        run(DomainSampler(DOMAINS, strategy, period=60, sizes=sizes, seed=s), 240, table)
        for s in (seeds[0], seeds[0], seeds[1])
    )
    assert first == same
    periods = [
        tuple(order[i : i + 60]) for order in (first, other) for i in (60, 120, 180)
    ]  # equal quotas: 60! / 10!^6 orders
    assert len(set(periods)) == 6, f"seeds {seeds}: two of the periods are in the same order"


@property_test
@given(runs(), st.data())
def test_upcoming_is_what_comes(case, data):
    arguments, table = case
    sampler, period = new(arguments), arguments["period"]
    first = data.draw(st.integers(0, 3 * period), label="steps before")
    run(sampler, first, table)
    decided = sampler.upcoming()
    assert len(decided) == period - first % period
    copied = list(decided)
    decided[:] = ["changed"] * len(decided)  # the list is the caller's
    assert run(sampler, len(copied), {d: values[::-1] for d, values in table.items()}) == copied, (
        "no loss changes what is decided"
    )


@pytest.mark.parametrize(
    "strategy, sizes, losses",
    [
        ("balanced", None, None),
        ("size", {"a": 10, "b": 6, "c": 4}, None),
        ("dynamic", None, {"a": [5.0], "b": [3.0], "c": [2.0]}),
    ],
)
def test_empirical_frequency(strategy, sizes, losses):
    """At each place of the period a domain comes as often as its weight says, and next to itself as often as by chance."""
    period, periods = 20, 600
    drawer = DomainSampler("abc", strategy, period=period, sizes=sizes, seed=1)
    table = losses or {d: [1.0] for d in "abc"}
    run(drawer, period, table)  # the round-robin period of dynamic
    weights = drawer.weights
    drawn = np.array(run(drawer, period * periods, table)).reshape(periods, period)
    for domain in "abc":
        quota = (drawn == domain).sum() / periods
        off = abs(
            quota - weights[domain] * period
        )  # whole quotas exactly; the 20/3 of balanced are 7, 7 and 6
        assert off < (1 if strategy == "balanced" else 1e-9), (
            f"{quota} of {domain} a period, weight {weights[domain]}"
        )
        p = quota / period
        at_each_place = (drawn == domain).mean(axis=0)
        error = np.sqrt(p * (1 - p) / periods)
        assert np.abs(at_each_place - p).max() < 4.5 * error, (
            f"{domain}: {at_each_place}, not {p} +- {error}"
        )
        pairs = ((drawn[:, 1:] == domain) & (drawn[:, :-1] == domain)).mean()
        chance = p * (quota - 1) / (period - 1)  # drawn without replacement
        assert abs(pairs - chance) < 0.02, (
            f"{domain} follows itself in {pairs} of the places, by chance in {chance}"
        )
        again = ((drawn[1:] == domain) & (drawn[:-1] == domain)).mean()  # same place, next period
        assert abs(again - p * p) < 0.02, (
            f"{domain} comes again at its place in {again}, by chance in {p * p}"
        )


def test_the_order_does_not_depend_on_the_process(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sampler import DomainSampler\n"
        "s = DomainSampler(['cars', 'sop', 'met'], period=20, seed=5); drawn = []\n"
        "for _ in range(80): drawn.append(s.draw()); s.observe(drawn[-1], len(drawn[-1]) ** 9)\n"
        "print(' '.join(drawn))"
    )
    shutil.copy(SOURCE, tmp_path)  # alone: also shows that it needs no other file
    outputs = []
    for hash_seed in "12":  # the order of sets of str differs
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout.split())
    here = DomainSampler(["cars", "sop", "met"], period=20, seed=5)
    assert outputs[0] == outputs[1] == run(here, 80, {d: [len(d) ** 9] for d in here.domains})


def test_the_file_imports_numpy_only():
    nodes = list(ast.walk(ast.parse(SOURCE.read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}, (
        imported
    )


# Replay ---------------------------------------------------------------------------------------------------------------------


@property_test
@given(runs(), st.data(), st.booleans())
def test_a_loaded_state_continues_identically(case, data, through_json):
    """At any step, between drawing and observing too, into a sampler made with another seed, period and sizes."""
    arguments, table = case
    period, sampler = arguments["period"], new(arguments)
    first, rest = data.draw(st.integers(0, 3 * period), label="steps before"), 2 * period + 3
    run(sampler, first, table)
    pending = sampler.draw() if data.draw(st.booleans(), label="drawn, not yet observed") else None
    state = sampler.state_dict()
    state = json.loads(json.dumps(state, sort_keys=True)) if through_json else state
    sizes = arguments["sizes"] and dict.fromkeys(arguments["sizes"], 1)
    loaded = new(arguments, seed=arguments["seed"] + 1, period=period + 1, sizes=sizes)
    run(loaded, data.draw(st.integers(0, 5), label="steps of the other"), table)
    loaded.load_state_dict(state)
    continued = []
    for one in (sampler, loaded):
        before = one.weights, one.upcoming()
        if pending is not None:
            one.observe(pending, table[pending][0])
        continued.append(
            (before, run(one, rest, table, first), one.weights, one.upcoming(), one.state_dict())
        )
    assert continued[0] == continued[1]


@property_test
@given(runs(), st.data())
def test_a_state_is_independent(case, data):
    """Of the sampler it was taken from, and of the one it was loaded into; and these of it."""
    arguments, table = case
    period, sampler, untouched = arguments["period"], new(arguments), new(arguments)
    first, rest = data.draw(st.integers(0, 2 * period), label="steps before"), 2 * period
    run(sampler, first, table)
    run(untouched, first, table)
    state = sampler.state_dict()
    kept = copy.deepcopy(state)
    loaded = new(arguments)
    loaded.load_state_dict(state)
    assert run(sampler, rest, table, first) == run(loaded, rest, table, first)
    assert state == kept, "drawing and observing changed a state taken before"

    again = new(arguments)
    again.load_state_dict(state)
    for scribbled in (state, untouched.state_dict()):
        for name, value in scribbled.items():
            if isinstance(value, dict):
                value.update(dict.fromkeys(value, 7))
            elif isinstance(value, list):
                value.clear()
            else:
                scribbled[name] = None
    assert again.state_dict() == untouched.state_dict() == kept, (
        "changing a state changed a sampler"
    )
    assert run(again, rest, table, first) == run(untouched, rest, table, first)


def test_a_state_is_plain_values():
    sampler = DomainSampler(DOMAINS, period=10)
    run(sampler, 25, {d: [np.float64(1.5), torch.tensor(2.0), 1] for d in DOMAINS})
    state = sampler.state_dict()
    kinds = {
        type(x)
        for value in state.values()
        for x in (
            [*value, *value.values()]
            if isinstance(value, dict)
            else value
            if isinstance(value, list)
            else [value]
        )
    }
    assert kinds <= {str, int, float}, f"{kinds}: a checkpoint is read with weights_only"
    assert {type(d) for d in sampler.upcoming()} == {type(sampler.draw())} == {str}


# Independence of the call pattern -------------------------------------------------------------------------------------------


@property_test
@given(runs(), st.integers(0, 2**32 - 1))
def test_reading_and_global_random_state_change_nothing(case, seed):
    arguments, table = case
    steps = PERIODS * arguments["period"] + 1
    plain, disturbed = new(arguments), new(arguments)
    expected = run(plain, steps, table)

    def read():
        disturbed.weights.update(dict.fromkeys(disturbed.weights, 0.5))
        disturbed.upcoming().reverse()
        disturbed.state_dict().clear()

    drawn = []
    for step in range(steps):
        read()
        random.seed(seed + step)
        np.random.seed((seed + step) % 2**32)
        torch.manual_seed(seed + step)
        domain = disturbed.draw()
        read()
        disturbed.observe(domain, table[domain][step % len(table[domain])])
        drawn.append(domain)
    assert drawn == expected and disturbed.state_dict() == plain.state_dict()


@property_test
@given(runs())
def test_global_random_state_is_left_alone(case):
    arguments, table = case
    before = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )
    sampler = new(arguments)
    run(sampler, 2 * arguments["period"], table)
    after = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )
    assert before == after


@property_test
@given(runs(), st.integers(1, 7))
def test_observing_at_once_or_late_is_the_same(case, together):
    """After each draw, after each few, or after all of a period: the losses count for the period their batches came from."""
    arguments, table = case
    period = arguments["period"]
    prompt, late, last = new(arguments), new(arguments), new(arguments)
    expected = run(prompt, PERIODS * period, table)
    for one, group in ((late, together), (last, period)):
        drawn, waiting = [], []
        for step in range(PERIODS * period):
            domain = one.draw()
            waiting.append((domain, table[domain][step % len(table[domain])]))
            drawn.append(domain)
            if len(waiting) == group or (step + 1) % period == 0:
                for observation in waiting:
                    one.observe(*observation)
                    one.weights, one.upcoming()  # looking at the end of a period does not end it
                waiting.clear()
        assert drawn == expected and one.state_dict() == prompt.state_dict(), (
            f"observed in groups of {group}"
        )


# What a user can get wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"domains": []}, ["[]", "at least one"]),
        ({"domains": ["cars", "met", "cars"]}, ["['cars', 'met', 'cars']", "each once"]),
        ({"strategy": "random"}, ["'random'", *STRATEGIES]),
        ({"strategy": ""}, ["''", *STRATEGIES]),
        ({"period": 2}, ["period 2", "3 domains", "at least 3"]),
        ({"period": 0}, ["period 0", "at least 3"]),
        ({"period": -1000}, ["period -1000", "at least 3"]),
        ({"strategy": "size"}, ["None", "positive", "cars", "met", "sop"]),
        ({"strategy": "size", "sizes": {}}, ["{}", "positive", "cars", "met", "sop"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2}}, ["{'cars': 1, 'met': 2}", "'sop'"]),
        (
            {"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": 3, "inat": 4}},
            ["'inat': 4", "['cars', 'met', 'sop']"],
        ),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 0, "sop": 3}}, ["'met': 0", "positive"]),
        (
            {"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": -3}},
            ["'sop': -3", "positive"],
        ),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(arguments, words):
    with pytest.raises(ValueError) as error:
        new({"domains": ["cars", "met", "sop"], "strategy": "dynamic", **arguments})
    missing = [word for word in words if word not in str(error.value)]
    assert not missing and "\n" not in str(error.value), f"{missing} not in: {error.value}"


@pytest.mark.parametrize(
    "domain, loss, words",
    [
        ("birds", 1.0, ["'birds'", "cars, met"]),
        ("birds", float("nan"), ["'birds'"]),
        ("met", float("nan"), ["'met'", "nan", "finite"]),
        ("met", float("inf"), ["'met'", "inf", "finite"]),
        ("met", -float("inf"), ["'met'", "-inf", "finite"]),
        ("met", -0.25, ["'met'", "-0.25", "not negative"]),
        ("met", torch.tensor(float("nan")), ["'met'", "nan", "finite"]),
    ],
)
@pytest.mark.parametrize("strategy", ["dynamic", "round_robin", "balanced"])
def test_bad_observations_are_named_and_leave_no_trace(strategy, domain, loss, words):
    sampler = DomainSampler(["cars", "met"], strategy, period=4)
    run(sampler, 6, {"cars": [1.0], "met": [2.0]})
    before = sampler.state_dict()
    with pytest.raises(ValueError) as error:
        sampler.observe(domain, loss)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    "domains, strategy, words",
    [
        (["cars", "sop"], "dynamic", ["domains", "['cars', 'sop']", "['cars', 'met']"]),
        (["met", "cars"], "dynamic", ["domains", "['met', 'cars']", "['cars', 'met']"]),
        (
            ["cars", "met", "sop"],
            "dynamic",
            ["domains", "['cars', 'met', 'sop']", "['cars', 'met']"],
        ),
        (["cars", "met"], "balanced", ["strategy", "balanced", "dynamic"]),
    ],
)
def test_a_state_of_another_sampler_is_refused(domains, strategy, words):
    table = {d: [1.0] for d in domains}
    other, mine = (
        DomainSampler(domains, strategy, period=5),
        DomainSampler(["cars", "met"], period=5),
    )
    run(other, 3, table)
    before = mine.state_dict()
    with pytest.raises(ValueError) as error:
        mine.load_state_dict(other.state_dict())
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert mine.state_dict() == before, "a refused state changes nothing"
