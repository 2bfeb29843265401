"""sampler.py: quotas, weights in closed form and their floor, the order within a period, long
periods, resuming from a state, independence of the call pattern, invalid input."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
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
LOSSES = [0.0, 1e-6, 0.5, 2.0, 1e6]  # from a domain that is fully learned to one far from it
ROUNDING = 1e-9  # of sums of weights
LONG = 2**16 + 1  # the shortest period that is not shuffled

property_test = settings(max_examples=EXAMPLES)
any_loss = st.one_of(st.sampled_from(LOSSES), st.floats(1e-12, 20))


@st.composite
def cases(draw, strategies=STRATEGIES, losses=any_loss, shortest=0):
    """Arguments of a DomainSampler and {domain: its losses, in turn}."""
    domains = DOMAINS[: draw(st.integers(1, len(DOMAINS)))]
    strategy, sizes = draw(st.sampled_from(strategies)), None
    if strategy in ("size", "sqrt_size"):
        size = st.one_of(st.integers(1, 100), st.integers(1, 10**6))
        sizes = {domain: draw(size) for domain in domains}
    arguments = {
        "domains": domains,
        "strategy": strategy,
        "sizes": sizes,
        "seed": draw(st.integers(0, 2**40)),
        "period": draw(st.integers(max(len(domains), shortest), max(40, shortest))),
    }
    return arguments, {d: draw(st.lists(losses, min_size=1, max_size=3)) for d in domains}


def build(arguments, **changes):
    arguments = {**arguments, **changes}
    return DomainSampler(arguments.pop("domains"), arguments.pop("strategy"), **arguments)


def run(sampler, steps, losses, first=0):
    """Draws `steps` domains, observes a loss of each and returns the domains."""
    drawn = []
    for step in range(first, first + steps):
        domain = sampler.draw()
        sampler.observe(domain, losses[domain][step % len(losses[domain])])
        drawn.append(domain)
    return drawn


def raised_to_floor(weights, period):
    """max(1 / period, factor x weight), with the factor that gives sum 1 found by bisection."""
    low, high = 0.0, 1 / max(weights)  # the largest weight times the factor is at most 1
    for _ in range(100):
        factor = (low + high) / 2
        if np.maximum(1 / period, weights * factor).sum() < 1:
            low = factor
        else:
            high = factor
    return np.maximum(1 / period, weights * high)


# ---- quotas --------------------------------------------------------------------------------------


@property_test
@given(cases())
def test_quotas_follow_the_weights(case):
    arguments, losses = case
    sampler, period = build(arguments), arguments["period"]
    for number in range(PERIODS):
        weights, decided = sampler.weights, sampler.upcoming()
        assert len(decided) == period, f"the quotas of period {number} sum to {len(decided)}"
        counts = Counter(run(sampler, period - 1, losses))
        assert period == 1 or sampler.weights == weights, "weights changed within the period"
        counts.update(run(sampler, 1, losses))
        assert counts == Counter(decided)
        for domain in arguments["domains"]:
            quota = weights[domain] * period
            assert counts[domain] >= 1, f"period {number}: no batch of {domain}"
            assert abs(counts[domain] - quota) < 1, f"{domain}: {counts[domain]}, not {quota}"


@property_test
@given(st.lists(st.integers(1, 50), min_size=1, max_size=len(DOMAINS)), st.integers(50, 90))
def test_the_largest_remainders_are_rounded_up(sizes, period):
    sizes = dict(zip(DOMAINS, sizes))
    total = sum(sizes.values())
    exact = {domain: Fraction(size, total) * period for domain, size in sizes.items()}
    assume(min(exact.values()) >= 1)  # no weight is at the floor
    sampler = DomainSampler(sizes, "size", period=period, sizes=sizes)
    counts = Counter(sampler.draw() for _ in range(period))
    raised = [exact[d] % 1 for d in sizes if counts[d] > exact[d]]
    lowered = [exact[d] % 1 for d in sizes if counts[d] < exact[d]]
    assert min(raised, default=1) >= max(lowered, default=0), f"{counts} for {exact}"
    whole = [d for d in sizes if exact[d].denominator == 1]
    assert all(counts[d] == exact[d] for d in whole), f"{counts} for {exact}"


@pytest.mark.parametrize(
    "high, low", [(1e6, 1.0), (1.0, 1e-6), (1.0, 0.0), (1e-300, 0.0), (1e300, 1e-300)]
)
@pytest.mark.parametrize("period", [6, 7, 50, 1000])
def test_every_domain_is_served_whatever_the_losses(period, high, low):
    sampler = DomainSampler(DOMAINS, period=period)
    losses = {domain: [high if domain == "met" else low] for domain in DOMAINS}
    for number in range(3):
        counts = Counter(run(sampler, period, losses))
        assert set(counts) == set(DOMAINS), f"period {number} of {period}: {counts}"
    assert counts == {domain: period - 5 if domain == "met" else 1 for domain in DOMAINS}


# ---- weights -------------------------------------------------------------------------------------


@property_test
@given(cases())
def test_weights_are_a_distribution_with_a_floor(case):
    arguments, losses = case
    sampler, period = build(arguments), arguments["period"]
    for step in range(2 * period + 1):
        weights = sampler.weights
        assert tuple(weights) == arguments["domains"]
        assert abs(sum(weights.values()) - 1) < ROUNDING, weights
        assert min(weights.values()) >= (1 - ROUNDING) / period > 0, f"{weights} at step {step}"
        run(sampler, 1, losses, step)


@property_test
@given(cases(["dynamic"], st.floats(1, 4), shortest=30))
def test_weights_are_mean_losses_over_their_sum(case):
    """With losses in [1, 4] and 6 domains no share is below 1/21, so period 30 has no floor."""
    arguments, losses = case
    sampler, period, domains = build(arguments), arguments["period"], arguments["domains"]
    for number in range(PERIODS):
        window = {domain: [] for domain in domains}
        for step in range(period):
            domain = sampler.draw()
            loss = losses[domain][(number + step) % len(losses[domain])]
            window[domain].append(loss)
            sampler.observe(domain, loss)
        means = np.array([np.mean(window[domain]) for domain in domains])
        weights = [sampler.weights[domain] for domain in domains]
        np.testing.assert_allclose(weights, means / means.sum(), rtol=1e-12)


@property_test
@given(cases(["dynamic", "size", "sqrt_size"]))
def test_weights_below_the_floor_are_raised_to_it(case):
    arguments, losses = case
    losses = {domain: values[:1] for domain, values in losses.items()}  # the mean is the loss
    sampler, period, domains = build(arguments), arguments["period"], arguments["domains"]
    if arguments["strategy"] == "dynamic":
        run(sampler, period, losses)
        shares = np.array([losses[domain][0] for domain in domains])
    else:
        power = 1 if arguments["strategy"] == "size" else 0.5
        shares = np.array([arguments["sizes"][domain] for domain in domains]) ** power
    if not shares.any():  # no loss at all: the weights stay equal
        shares = shares + 1
    expected = raised_to_floor(shares / shares.sum(), period)
    weights = [sampler.weights[domain] for domain in domains]
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


def test_weights_after_a_period_of_known_losses():
    sampler = DomainSampler("abc", period=30)
    run(sampler, 29, {"a": [3.0], "b": [2.0], "c": [1.0]})
    assert set(sampler.weights.values()) == {1 / 3}, "equal until the period is over"
    sampler.observe(sampler.draw(), 1.0)
    assert sampler.weights == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})
    counts = Counter(run(sampler, 30, {"a": [1.0], "b": [1.0], "c": [1.0]}))
    assert counts == {"a": 15, "b": 10, "c": 5}
    equal = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    assert sampler.weights == pytest.approx(equal), "the window is longer than one period"


def test_an_unobserved_domain_keeps_its_weight():
    sampler = DomainSampler("abc", period=30)
    for _ in range(30):
        if (domain := sampler.draw()) != "c":
            sampler.observe(domain, {"a": 3.0, "b": 1.0}[domain])
    # a and b share 1 as 3 : 1, c keeps 1/3; all divided by 4/3
    assert sampler.weights == pytest.approx({"a": 9 / 16, "b": 3 / 16, "c": 4 / 16})
    for _ in range(30):
        sampler.draw()
    sampler.observe("a", 5.0)
    # a has 1, b and c keep 3/16 and 4/16; all divided by 23/16
    assert sampler.weights == pytest.approx({"a": 16 / 23, "b": 3 / 23, "c": 4 / 23})


@pytest.mark.parametrize("losses", [[0.0], []])
def test_weights_stay_where_no_loss_is_observed(losses):
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
@given(cases(["round_robin", "size", "sqrt_size", "balanced"]))
def test_losses_affect_only_the_dynamic_strategy(case):
    arguments, losses = case
    steps = PERIODS * arguments["period"]
    observing, silent = build(arguments), build(arguments)
    assert run(observing, steps, losses) == [silent.draw() for _ in range(steps)]
    assert observing.weights == silent.weights


# ---- strategies ----------------------------------------------------------------------------------


@property_test
@given(cases(["dynamic", "round_robin"]))
def test_round_robin_order(case):
    """It continues from period to period; the dynamic strategy has it in the first one."""
    arguments, losses = case
    steps = arguments["period"] * (1 if arguments["strategy"] == "dynamic" else PERIODS)
    expected = (arguments["domains"] * steps)[:steps]
    assert tuple(run(build(arguments), steps, losses)) == expected


def test_dynamic_is_shuffled_after_the_first_period():
    sampler, losses = DomainSampler("ab", period=50), {"a": [1.0], "b": [1.0]}
    run(sampler, 50, losses)
    second = run(sampler, 50, losses)
    assert Counter(second) == {"a": 25, "b": 25} and second != list("ab" * 25)


@pytest.mark.parametrize(
    "strategy, sizes",
    [("size", {"c": 7, "a": 1, "b": 2}), ("sqrt_size", {"c": 49, "a": 1, "b": 4})],
)
def test_size_is_proportional(strategy, sizes):
    sampler = DomainSampler("abc", strategy, period=20, sizes=sizes)
    assert sampler.weights == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.7})
    for _ in range(PERIODS):
        assert Counter(sampler.draw() for _ in range(20)) == {"a": 2, "b": 4, "c": 14}


@property_test
@given(cases(["balanced"]))
def test_balanced_is_equal(case):
    arguments, losses = case
    sampler, share = build(arguments), 1 / len(arguments["domains"])
    assert all(abs(weight - share) < ROUNDING for weight in sampler.weights.values())
    counts = Counter(run(sampler, arguments["period"], losses))
    assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_defaults_are_dynamic_with_the_official_period():
    losses = {"a": [3.0], "b": [1.0]}
    default, explicit = DomainSampler("ab"), DomainSampler("ab", "dynamic", period=1000, seed=0)
    assert run(default, 2500, losses) == run(explicit, 2500, losses)
    assert default.weights == pytest.approx({"a": 0.75, "b": 0.25})


# ---- the order within a period -------------------------------------------------------------------


@property_test
@given(
    st.sampled_from(["dynamic", "size", "sqrt_size", "balanced"]),
    st.lists(st.integers(0, 2**40), min_size=2, max_size=2, unique=True),
)
def test_the_order_depends_on_seed_and_period(strategy, seeds):
    """With equal quotas there are 60! / 10!^6 orders: no two should coincide."""
    sizes, losses = dict.fromkeys(DOMAINS, 1), {domain: [1.0] for domain in DOMAINS}

    def draws(seed):
        sampler = DomainSampler(DOMAINS, strategy, period=60, sizes=sizes, seed=seed)
        return run(sampler, 240, losses)

    assert draws(seeds[0]) == draws(seeds[0])
    starts = (60, 120, 180)
    periods = {tuple(draws(seed)[start : start + 60]) for seed in seeds for start in starts}
    assert len(periods) == 6, f"seeds {seeds}: two periods have the same order"


@property_test
@given(cases(), st.data())
def test_upcoming_draws_come_true(case, data):
    arguments, losses = case
    sampler, period = build(arguments), arguments["period"]
    first = data.draw(st.integers(0, 3 * period), label="steps before")
    run(sampler, first, losses)
    decided = sampler.upcoming()
    assert len(decided) == period - first % period
    expected = list(decided)
    decided[:] = ["changed"] * len(decided)  # the list belongs to the caller
    other_losses = {domain: values[::-1] for domain, values in losses.items()}
    assert run(sampler, len(expected), other_losses) == expected


@pytest.mark.parametrize(
    "strategy, sizes, losses",
    [
        ("balanced", None, None),
        ("size", {"a": 10, "b": 6, "c": 4}, None),
        ("sqrt_size", {"a": 100, "b": 36, "c": 16}, None),
        ("dynamic", None, {"a": [5.0], "b": [3.0], "c": [2.0]}),
    ],
)
def test_empirical_frequencies(strategy, sizes, losses):
    """Each position of the period gets a domain as often as its weight says, independently."""
    period, periods = 20, 600
    sampler = DomainSampler("abc", strategy, period=period, sizes=sizes, seed=1)
    losses = losses or {domain: [1.0] for domain in "abc"}
    run(sampler, period, losses)  # the round-robin period of the dynamic strategy
    weights = sampler.weights
    drawn = np.array(run(sampler, period * periods, losses)).reshape(periods, period)
    for domain in "abc":
        hits = drawn == domain
        quota = hits.sum() / periods
        allowed = 1 if strategy == "balanced" else 1e-9  # 20/3 is rounded to 7, 7 and 6
        assert abs(quota - weights[domain] * period) < allowed, f"{domain}: {quota} per period"
        share = quota / period
        error = np.sqrt(share * (1 - share) / periods)
        assert np.abs(hits.mean(axis=0) - share).max() < 4.5 * error, f"{domain}: {hits.mean(0)}"
        neighbours = (hits[:, 1:] & hits[:, :-1]).mean()
        chance = share * (quota - 1) / (period - 1)  # drawn without replacement
        assert abs(neighbours - chance) < 0.02, f"{domain}: {neighbours}, by chance {chance}"
        repeated = (hits[1:] & hits[:-1]).mean()  # the same position of the next period
        assert abs(repeated - share * share) < 0.02, f"{domain}: {repeated}"


def test_the_order_does_not_depend_on_the_process():
    program = (
        "from sampler import DomainSampler\n"
        "s = DomainSampler(['cars', 'sop', 'met'], period=20, seed=5); drawn = []\n"
        "for _ in range(80): drawn.append(s.draw()); s.observe(drawn[-1], len(drawn[-1]) ** 9)\n"
        "print(' '.join(drawn))"
    )
    sampler = DomainSampler(["cars", "sop", "met"], period=20, seed=5)
    expected = run(sampler, 80, {domain: [len(domain) ** 9] for domain in sampler.domains})
    for hash_seed in "12":  # sets of strings are ordered differently
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == expected


# ---- long periods --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("period", [10**9, 10**18])
def test_memory_does_not_grow_with_the_period(strategy, period):
    sizes = dict(zip(DOMAINS, (1, 2, 3, 4, 5, 10**6)))
    tracemalloc.start()
    sampler = DomainSampler(DOMAINS, strategy, period=period, sizes=sizes)
    drawn = run(sampler, 100, {domain: [1.0] for domain in DOMAINS})
    upcoming = sampler.upcoming()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6, f"{peak / 1e6:.0f} MB"
    assert len(drawn) == 100 and set(drawn) <= set(DOMAINS)
    assert [sampler.draw() for _ in range(50)] == upcoming[:50]


@settings(max_examples=6)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=4), st.integers(LONG, LONG + 9))
def test_a_long_period_has_exact_quotas_and_an_even_order(sizes, period):
    sizes = dict(zip(DOMAINS, sizes))
    sampler = DomainSampler(sizes, "size", period=period, sizes=sizes)
    weights = sampler.weights
    drawn = np.array([sampler.draw() for _ in range(period)])
    for domain in sizes:
        hits = np.concatenate([[0], np.cumsum(drawn == domain)])
        assert abs(hits[-1] - weights[domain] * period) < 1
        for length in (100, 10_000):
            stretches = hits[length:] - hits[:-length]
            assert np.abs(stretches - weights[domain] * length).max() < 20, (domain, length)


def test_a_long_period_resumes_at_any_step():
    sizes = dict(zip(DOMAINS, range(1, 7)))
    sampler = DomainSampler(DOMAINS, "size", period=10**9, sizes=sizes, seed=3)
    first = [sampler.draw() for _ in range(70_000)]
    for step in (0, 1, 65_535, 65_536, 69_990):
        state = {**sampler.state_dict(), "step": step}
        resumed = DomainSampler(DOMAINS, "size", period=6, sizes=sizes)
        resumed.load_state_dict(state)
        assert [resumed.draw() for _ in range(10)] == first[step : step + 10]


def test_long_periods_follow_the_losses_and_the_seed():
    def second_period(seed):
        sampler = DomainSampler("ab", period=LONG, seed=seed)
        run(sampler, LONG, {"a": [3.0], "b": [1.0]})
        return [sampler.draw() for _ in range(1000)]

    drawn = second_period(0)
    assert abs(drawn.count("a") - 750) < 20
    assert drawn == second_period(0) != second_period(1)


# ---- resuming ------------------------------------------------------------------------------------


@property_test
@given(cases(), st.data(), st.booleans())
def test_a_loaded_state_continues_identically(case, data, through_json):
    """At any step, also before an observation, into a sampler with other options."""
    arguments, losses = case
    period, sampler = arguments["period"], build(arguments)
    first, rest = data.draw(st.integers(0, 3 * period), label="steps before"), 2 * period + 3
    run(sampler, first, losses)
    pending = sampler.draw() if data.draw(st.booleans(), label="drawn, not observed") else None
    state = sampler.state_dict()
    if through_json:
        state = json.loads(json.dumps(state, sort_keys=True))
    sizes = arguments["sizes"] and dict.fromkeys(arguments["sizes"], 1)
    loaded = build(arguments, seed=arguments["seed"] + 1, period=period + 1, sizes=sizes)
    run(loaded, data.draw(st.integers(0, 5), label="steps of the other"), losses)
    loaded.load_state_dict(state)

    def continued(sampler):
        before = sampler.weights, sampler.upcoming()
        if pending is not None:
            sampler.observe(pending, losses[pending][0])
        drawn = run(sampler, rest, losses, first)
        return before, drawn, sampler.weights, sampler.upcoming(), sampler.state_dict()

    assert continued(loaded) == continued(sampler)


@property_test
@given(cases(), st.data())
def test_states_and_samplers_are_independent(case, data):
    arguments, losses = case
    period, sampler, reference = arguments["period"], build(arguments), build(arguments)
    first, rest = data.draw(st.integers(0, 2 * period), label="steps before"), 2 * period
    run(sampler, first, losses)
    run(reference, first, losses)
    state = sampler.state_dict()
    original = copy.deepcopy(state)
    loaded, second = build(arguments), build(arguments)
    loaded.load_state_dict(state)
    second.load_state_dict(state)
    assert run(sampler, rest, losses, first) == run(loaded, rest, losses, first)
    assert state == original, "drawing and observing changed a state taken before"
    for modified in (state, reference.state_dict()):
        for value in modified.values():
            if isinstance(value, (dict, list)):
                value.clear()
    assert second.state_dict() == reference.state_dict() == original
    assert run(second, rest, losses, first) == run(reference, rest, losses, first)


def test_a_state_consists_of_plain_values():
    """Checkpoints are read with weights_only=True."""
    sampler = DomainSampler(DOMAINS, period=10)
    run(sampler, 25, {domain: [np.float64(1.5), torch.tensor(2.0), 1] for domain in DOMAINS})
    leaves = []
    for value in sampler.state_dict().values():
        leaves += value if isinstance(value, list) else [value]
    leaves += [leaf for value in leaves if isinstance(value, dict) for leaf in value.values()]
    assert {type(leaf) for leaf in leaves} == {str, int, float, dict}
    assert {type(domain) for domain in [sampler.draw(), *sampler.upcoming()]} == {str}


# ---- independence of the call pattern ------------------------------------------------------------


@settings(max_examples=15)  # many calls per step
@given(cases(), st.integers(0, 2**32 - 1))
def test_reading_and_global_random_state_change_nothing(case, seed):
    arguments, losses = case
    steps = PERIODS * arguments["period"] + 1
    reference, disturbed = build(arguments), build(arguments)
    expected = run(reference, steps, losses)

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
        disturbed.observe(domain, losses[domain][step % len(losses[domain])])
        drawn.append(domain)
    assert drawn == expected and disturbed.state_dict() == reference.state_dict()


@property_test
@given(cases())
def test_global_random_state_is_not_used(case):
    def global_state():
        name, keys, position, *_ = np.random.get_state()
        return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()

    arguments, losses = case
    before = global_state()
    run(build(arguments), 2 * arguments["period"], losses)
    assert global_state() == before


@property_test
@given(cases(), st.integers(1, 7))
def test_observations_may_be_delayed_within_a_period(case, delay):
    arguments, losses = case
    period, reference = arguments["period"], build(arguments)
    expected = run(reference, PERIODS * period, losses)
    for delayed, group in ((build(arguments), delay), (build(arguments), period)):
        drawn, waiting = [], []
        for step in range(PERIODS * period):
            domain = delayed.draw()
            waiting.append((domain, losses[domain][step % len(losses[domain])]))
            drawn.append(domain)
            if len(waiting) == group or (step + 1) % period == 0:
                for observation in waiting:
                    delayed.observe(*observation)
                    _ = delayed.weights, delayed.upcoming()  # reading does not end the period
                waiting.clear()
        assert drawn == expected, f"observed in groups of {group}"
        assert delayed.state_dict() == reference.state_dict()


# ---- invalid input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"domains": []}, ["[]", "at least one"]),
        ({"domains": ["cars", "met", "cars"]}, ["['cars', 'met', 'cars']"]),
        ({"strategy": "random"}, ["'random'", *STRATEGIES]),
        ({"strategy": ""}, ["''", *STRATEGIES]),
        ({"period": 2}, ["period 2", "at least 3"]),
        ({"period": 0}, ["period 0", "at least 3"]),
        ({"period": -1000}, ["period -1000", "at least 3"]),
        ({"period": 10**400}, ["period", "at most"]),
        ({"period": 7.5}, ["period 7.5", "integer"]),
        ({"period": math.nan}, ["period nan", "integer"]),
        ({"period": "100"}, ["period '100'", "integer"]),
        ({"seed": -1}, ["seed -1", "at least 0"]),
        ({"seed": None}, ["seed None", "integer"]),
        ({"strategy": "size"}, ["None", "cars", "met", "sop"]),
        ({"strategy": "size", "sizes": {}}, ["{}", "cars", "met", "sop"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2}}, ["{'cars': 1, 'met': 2}", "'sop'"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": 3, "inat": 4}}, ["'inat': 4"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 0, "sop": 3}}, ["'met': 0", "positive"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": -3}}, ["-3", "'sop'"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": math.nan}}, ["nan", "'sop'"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": math.inf}}, ["inf", "finite"]),
        ({"strategy": "size", "sizes": {"cars": 1, "met": 2, "sop": "3"}}, ["'3'", "'sop'"]),
    ],
)
def test_invalid_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as caught:
        build({"domains": ["cars", "met", "sop"], "strategy": "dynamic", **arguments})
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "domain, loss, words",
    [
        ("birds", 1.0, ["'birds'", "cars, met"]),
        ("birds", math.nan, ["'birds'"]),
        ("met", math.nan, ["'met'", "nan", "finite"]),
        ("met", math.inf, ["'met'", "inf", "finite"]),
        ("met", -math.inf, ["'met'", "-inf", "finite"]),
        ("met", -0.25, ["'met'", "-0.25", "not negative"]),
        ("met", torch.tensor(math.nan), ["'met'", "nan", "finite"]),
    ],
)
@pytest.mark.parametrize("strategy", ["dynamic", "round_robin", "balanced"])
def test_invalid_observations_are_named_and_change_nothing(strategy, domain, loss, words):
    sampler = DomainSampler(["cars", "met"], strategy, period=4)
    run(sampler, 6, {"cars": [1.0], "met": [2.0]})
    before = sampler.state_dict()
    with pytest.raises(ValueError) as caught:
        sampler.observe(domain, loss)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert sampler.state_dict() == before


def assert_state_refused(state, *words):
    sampler = DomainSampler(["cars", "met"], period=5)
    run(sampler, 7, {"cars": [1.0], "met": [2.0]})
    before, upcoming = sampler.state_dict(), sampler.upcoming()
    with pytest.raises(ValueError) as caught:
        sampler.load_state_dict(state)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert sampler.state_dict() == before and sampler.upcoming() == upcoming


@pytest.mark.parametrize(
    "domains, strategy",
    [
        (["cars", "sop"], "dynamic"),
        (["met", "cars"], "dynamic"),
        (["cars", "met", "sop"], "dynamic"),
        (["cars", "met"], "balanced"),
    ],
)
def test_a_state_of_another_sampler_is_refused(domains, strategy):
    state = DomainSampler(domains, strategy, period=5).state_dict()
    if strategy == "dynamic":
        assert_state_refused(state, "domains", str(domains), "['cars', 'met']")
    else:
        assert_state_refused(state, "strategy", "balanced", "dynamic")


@pytest.mark.parametrize(
    "name, value",
    [
        ("domains", None),
        ("domains", "cars"),
        ("strategy", 3),
        ("period", "5"),
        ("period", 1),
        ("period", 2.5),
        ("seed", -1),
        ("seed", [0]),
        ("step", -1),
        ("step", math.nan),
        ("step", True),
        ("weights", [0.5, 0.5]),
        ("weights", {"cars": 1.0}),
        ("weights", {"cars": 0.5, "met": "0.5"}),
        ("weights", {"cars": 0.5, "met": 0.7}),
        ("weights", {"cars": 1.5, "met": -0.5}),
        ("weights", {"cars": math.nan, "met": 0.5}),
        ("sums", None),
        ("sums", {"cars": 1.0, "met": math.nan}),
        ("sums", {"cars": 1.0, "met": -1.0}),
        ("counts", {"cars": 1, "met": 1.5}),
        ("counts", {"cars": 1, "met": None}),
    ],
)
def test_a_state_with_an_invalid_value_is_refused(name, value):
    state = DomainSampler(["cars", "met"], period=5).state_dict()
    assert_state_refused({**state, name: value}, name)


@pytest.mark.parametrize("name", [*DomainSampler("ab").state_dict()])
def test_a_state_with_a_missing_value_is_refused(name):
    state = DomainSampler(["cars", "met"], period=5).state_dict()
    del state[name]
    assert_state_refused(state, f"'{name}'")


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_a_state_that_is_no_dict_is_refused(state):
    assert_state_refused(state, "dict", repr(state))
