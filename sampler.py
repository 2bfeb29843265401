"""Which domain the next batch comes from (paper section 3, "dynamic sampling").

    DomainSampler(domains, strategy="dynamic", *, period=1000, sizes=None, seed=0)
        .draw() -> str                domain of the next batch
        .observe(domain, loss)        records its teacher classification loss
        .upcoming() -> list[str]      the next draws, as far as they are decided
        .weights -> dict[str, float]  probability of each domain
        .state_dict(), .load_state_dict(state)

Steps are grouped into periods. Within a period every domain gets an exact quota of batches, weight
x period rounded by largest remainder, in an order set by the seed and the index of the period.
With round_robin, and in the first period of the dynamic strategy, the domains take turns. From then
on, a domain's weight is its mean teacher classification loss over the previous period divided by
the sum over all domains, so that domains that are learned more slowly get more batches.
Copy with: numpy.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import numpy as np

STRATEGIES = ("dynamic", "round_robin", "size", "sqrt_size", "balanced")
LONGEST_PERIOD = 10**18
LONGEST_PLAN = 2**16  # draws decided, and held in memory, at a time


class DomainSampler:
    """Draws one domain per step.

    domains   names, in round-robin order
    strategy  "dynamic"      weights follow the losses given to `observe` (UDON)
              "round_robin"  the domains in turn
              "size"         weights proportional to `sizes`
              "sqrt_size"    weights proportional to the square roots of `sizes`: a larger domain
                             gets more batches, but each of its images is seen less often
                             (square-root sampling, arXiv:1910.09217)
              "balanced"     equal weights
    period    steps between two updates of the weights, from the number of domains to 10**18
    sizes     {domain: number of training images}; read by "size" and "sqrt_size" only
    seed      sets the order within each period

    A weight is at least 1 / period, so that every domain gets a batch in every period. A domain
    without an observation in a period keeps its weight, and all weights are renormalised. The draws
    depend only on the arguments, the number of draws and the observed losses.
    Periods of up to 65,536 steps are shuffled. In a longer one the domains are interleaved evenly,
    which takes no more memory: any stretch of steps holds close to its share of each domain.
    Raises ValueError for invalid arguments.
    Source: paper section 3; period 1000 is the official setting. The official window of the mean
    losses is the time since the log was last flushed; here it is the period.
    """

    def __init__(
        self,
        domains: Iterable[str],
        strategy: str = "dynamic",
        *,
        period: int = 1000,
        sizes: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.domains = tuple(domains)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(
                f"sampler domains are {list(self.domains)}: give at least one, each of them once"
            )
        if strategy not in STRATEGIES:
            raise ValueError(
                f"sampler strategy {strategy!r} is unknown: use one of {', '.join(STRATEGIES)}"
            )
        self.strategy = strategy
        self.period = _integer("period", period, len(self.domains), LONGEST_PERIOD)
        self.seed = _integer("seed", seed)
        weights = dict.fromkeys(self.domains, 1.0)
        if strategy in ("size", "sqrt_size"):
            weights = _numbers("sizes", sizes, self.domains)
            if not min(weights.values()) > 0 or not math.isfinite(sum(weights.values())):
                raise ValueError(f"sampler sizes are {sizes}: they must be positive and finite")
        if strategy == "sqrt_size":
            weights = {domain: math.sqrt(size) for domain, size in weights.items()}
        self._step = 0  # draws so far
        self._weights = self._with_floor(weights)  # of the current period
        self._plan: list[str] = []  # the draws that are decided, the next one last
        self._clear_window()

    def draw(self) -> str:
        """Returns the domain of the next batch."""
        if self._step % self.period == 0:
            self._weights = self.weights
            if self._step:
                self._clear_window()
        if not self._plan:
            self._plan = self._next_draws(self._weights)[::-1]
        self._step += 1
        return self._plan.pop()

    def observe(self, domain: str, loss: float) -> None:
        """Records the teacher classification loss of a batch of `domain`.

        Raises ValueError for an unknown domain, and for a loss that is negative or not finite.
        """
        loss = float(loss)
        if domain not in self._sums:
            raise ValueError(
                f"domain {domain!r} is unknown to the sampler: use one of {', '.join(self.domains)}"
            )
        if not (math.isfinite(loss) and loss >= 0):
            raise ValueError(
                f"the loss of domain {domain!r} is {loss}: it must be finite and not negative"
            )
        self._sums[domain] += loss
        self._counts[domain] += 1

    def upcoming(self) -> list[str]:
        """Returns the next draws as far as they are decided: 1 to 65,536, all of one period.

        Between two periods they follow from the losses observed so far.
        """
        return self._plan[::-1] or self._next_draws(self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """{domain: probability of the next draw}; positive, with sum 1."""
        means = {d: self._sums[d] / self._counts[d] for d in self.domains if self._counts[d]}
        total = sum(means.values())
        period_is_over = self._step > 0 and self._step % self.period == 0
        if self.strategy != "dynamic" or not period_is_over or not 0 < total < math.inf:
            return dict(self._weights)
        return self._with_floor(
            {d: means[d] / total if d in means else self._weights[d] for d in self.domains}
        )

    def state_dict(self) -> dict:
        """Returns all that the next draws depend on, as plain Python values."""
        return {
            "domains": list(self.domains),
            "strategy": self.strategy,
            "period": self.period,
            "seed": self.seed,
            "step": self._step,
            "weights": dict(self._weights),
            "sums": dict(self._sums),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where `state` was taken, with the period and seed of `state`.

        Raises ValueError, and changes nothing, if the state belongs to other domains or another
        strategy, or if a value is missing or invalid.
        """
        current = self.state_dict()
        if not isinstance(state, Mapping) or not current.keys() <= state.keys():
            raise ValueError(f"a sampler state must be a dict of {sorted(current)}, not {state!r}")
        for name in ("domains", "strategy"):
            if state[name] != current[name]:
                raise ValueError(
                    f"the sampler state has {name} {state[name]!r}, this sampler has "
                    f"{current[name]!r}: they must be the same"
                )
        period = _integer("period", state["period"], len(self.domains), LONGEST_PERIOD)
        seed, step = _integer("seed", state["seed"]), _integer("step", state["step"])
        weights = _numbers("weights", state["weights"], self.domains)
        if not abs(sum(weights.values()) - 1) < 1e-6:
            raise ValueError(f"the sampler state has weights {weights}: their sum must be 1")
        sums = _numbers("sums", state["sums"], self.domains)
        counts = _numbers("counts", state["counts"], self.domains)
        counts = {domain: _integer("counts", count) for domain, count in counts.items()}
        self.period, self.seed, self._step = period, seed, step
        self._weights, self._sums, self._counts, self._plan = weights, sums, counts, []

    def _clear_window(self) -> None:
        self._sums = dict.fromkeys(self.domains, 0.0)
        self._counts = dict.fromkeys(self.domains, 0)

    def _with_floor(self, weights: dict[str, float]) -> dict[str, float]:
        """Scales weights to sum 1, those below 1 / period raised to it at the others' expense."""
        floor, raised = 1 / self.period, set()
        while True:
            total = sum(w for d, w in weights.items() if d not in raised)
            scale = (1 - floor * len(raised)) / (total or 1.0)
            low = {d for d, w in weights.items() if d not in raised and w * scale < floor}
            # all of them low: the period has one step per domain, and only rounding is below it
            if not low or len(raised | low) == len(weights):
                return {d: floor if d in raised else w * scale for d, w in weights.items()}
            raised |= low

    def _next_draws(self, weights: dict[str, float]) -> list[str]:
        """The draws from the current step on, up to the end of its period or LONGEST_PLAN."""
        index, start = divmod(self._step, self.period)
        count = min(self.period - start, LONGEST_PLAN)
        if self.strategy == "round_robin" or (self.strategy == "dynamic" and index == 0):
            turns = (self._step % len(self.domains) + np.arange(count)) % len(self.domains)
            return [self.domains[turn] for turn in turns]
        # Places 0..period-1 are handed out in blocks, one per domain; a permutation orders them.
        last_places = np.cumsum(self._quotas(weights))[:-1] - 1  # of all blocks but the last
        rng = np.random.default_rng((self.seed, index))
        if self.period <= LONGEST_PLAN:
            places = rng.permutation(self.period)[start:]
        else:
            places = _golden_places(self.period, int(rng.integers(self.period)), start, count)
        return [self.domains[block] for block in np.searchsorted(last_places, places)]

    def _quotas(self, weights: dict[str, float]) -> np.ndarray:
        """Batches of each domain in a period: weight x period, rounded by largest remainder."""
        exact = np.array([weights[domain] for domain in self.domains]) * self.period
        quotas = np.floor(exact).astype(np.int64)
        largest_remainder = np.argsort(quotas - exact, kind="stable")
        quotas[largest_remainder[: max(self.period - quotas.sum(), 0)]] += 1
        return quotas


def _golden_places(period: int, first: int, start: int, count: int) -> np.ndarray:
    """Entries start..start+count-1 of a permutation of 0..period-1 that starts with `first`.

    Its stride is the golden ratio of the period, or the next number coprime to it: any stretch of
    it is spread evenly over 0..period-1.
    """
    stride = period * 618_033_988_749_894_848 // 10**18
    while math.gcd(stride, period) > 1:
        stride += 1
    return np.array([(first + stride * i) % period for i in range(start, start + count)])


def _integer(name: str, value: object, least: int = 0, most: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
        limit = "" if most == math.inf else f" and at most {most:,}"
        raise ValueError(f"sampler {name} {value!r} must be an integer, at least {least}{limit}")
    return int(value)


def _numbers(name: str, values: object, domains: tuple[str, ...]) -> dict[str, float]:
    """`values` as {domain: number} in the order of `domains`; refuses all but numbers >= 0."""
    if not isinstance(values, Mapping) or set(values) != set(domains):
        raise ValueError(
            f"sampler {name} are {values}: give a number for each of the domains {list(domains)}"
        )
    for domain, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
            raise ValueError(
                f"sampler {name} have {value!r} for domain {domain!r}: it must be a number >= 0"
            )
    return {domain: values[domain] for domain in domains}
