"""Which domain the next batch comes from (paper section 3, "dynamic sampling").    Copy with: numpy only.

    DomainSampler(domains, strategy, period=1000, sizes=None, seed=0)
        .draw() -> str   .observe(domain, loss)   .upcoming() -> list[str]   .weights   .state_dict() / .load_state_dict()

Steps are cut into periods. Within a period every domain has an exact quota of batches, weight x period rounded by largest
remainder, in an order shuffled by f(seed, period index): no run of bad luck, and nothing to replay but the step. The dynamic
strategy begins with a round-robin period; from then on a domain's weight is its mean teacher classification loss over the
period before, divided by the sum over domains, so that domains learned slower get more batches.
"""

import math

import numpy as np

STRATEGIES = ("dynamic", "round_robin", "size", "balanced")


class DomainSampler:
    """Draws one domain a step.

    domains   names, in round-robin order
    strategy  "dynamic"      weights follow the losses given to `observe` (UDON)
              "round_robin"  the domains in turn
              "size"         weights proportional to `sizes`
              "balanced"     equal weights, shuffled
    period    steps between two updates of the weights; at least the number of domains, so that each can be served in each
    sizes     {domain: number of training images}, for "size" alone
    seed      shuffles the order within each period

    A weight never falls below 1 / period: every domain gets at least one batch a period. A domain without an observation in
    a period keeps its weight, and all are renormalised. What comes next depends on the arguments, the number of draws and
    the losses observed, on nothing else: no global random state, no order of other calls.
    Source: paper section 3; period 1000 is the official setting (its window, "since the log was last flushed", is not kept).
    """

    def __init__(self, domains, strategy="dynamic", *, period=1000, sizes=None, seed=0):
        self.domains = tuple(domains)
        self.strategy, self.period, self.seed = strategy, int(period), int(seed)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains are {list(self.domains)}: give at least one, each once")
        if strategy not in STRATEGIES:
            raise ValueError(
                f"sampler strategy {strategy!r} is unknown: use one of {', '.join(STRATEGIES)}"
            )
        if self.period < len(self.domains):
            raise ValueError(
                f"sampler period {period} is shorter than the {len(self.domains)} domains: use at least "
                f"{len(self.domains)}, so that each domain can be served in each period"
            )
        if self.period != period or self.seed != seed or self.seed < 0:
            raise ValueError(
                f"sampler period is {period} and seed {seed}: both must be integers, the seed 0 or more"
            )
        weights = dict.fromkeys(self.domains, 1.0)
        if strategy == "size":
            if (
                sizes is None
                or set(sizes) != set(self.domains)
                or not all(0 < size < math.inf for size in sizes.values())
            ):
                raise ValueError(
                    f"sampler strategy 'size' got sizes {sizes}: give a positive number for each of the domains "
                    f"{list(self.domains)}"
                )
            weights = {domain: float(sizes[domain]) for domain in self.domains}
        self._step = 0  # draws so far
        self._weights = self._with_floor(weights)  # of the period in progress
        self._forget_window()

    def draw(self):
        """The domain of the next batch."""
        position = self._step % self.period
        if position == 0:
            self._weights = self.weights
            if self._step:
                self._forget_window()
            self._order = self._order_of_period(self._weights)
        self._step += 1
        return self._order[position]

    def observe(self, domain, loss):
        """Records the teacher classification loss (finite, >= 0) of a batch of `domain`. Raises ValueError otherwise."""
        loss = float(loss)
        if domain not in self._sums:
            raise ValueError(
                f"domain {domain!r} is not one of the sampler's: {', '.join(self.domains)}"
            )
        if not (math.isfinite(loss) and loss >= 0):
            raise ValueError(
                f"the loss observed for domain {domain!r} is {loss}: it must be finite and not negative"
            )
        self._sums[domain] += loss
        self._counts[domain] += 1

    def upcoming(self):
        """The draws that are decided: the rest of the period, or between two periods, as far as observed, the next one."""
        position = self._step % self.period
        return self._order_of_period(self.weights) if position == 0 else self._order[position:]

    @property
    def weights(self):
        """{domain: probability} that the next draw follows; positive, sum 1."""
        means = {d: self._sums[d] / self._counts[d] for d in self.domains if self._counts[d]}
        total = sum(means.values())
        between_periods = self._step and self._step % self.period == 0
        if self.strategy != "dynamic" or not between_periods or not 0 < total < math.inf:
            return dict(self._weights)
        return self._with_floor(
            {d: means[d] / total if d in means else self._weights[d] for d in self.domains}
        )

    def state_dict(self):
        """All that decides what comes next, as plain Python values; independent of the sampler's further life."""
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

    def load_state_dict(self, state):
        """Continues where `state` was taken. Raises ValueError if it belongs to other domains or another strategy."""
        for name in ("domains", "strategy"):
            mine = self.state_dict()[name]
            if state[name] != mine:
                raise ValueError(
                    f"the sampler state has {name} {state[name]}, this sampler has {mine}: they must be the same"
                )
        self.period, self.seed, self._step = state["period"], state["seed"], state["step"]
        self._weights, self._sums, self._counts = (
            dict(state["weights"]),
            dict(state["sums"]),
            dict(state["counts"]),
        )
        if self._step % self.period:
            self._order = self._order_of_period(self._weights)

    def _forget_window(self):
        self._sums, self._counts = dict.fromkeys(self.domains, 0.0), dict.fromkeys(self.domains, 0)

    def _with_floor(self, weights):
        """Weights scaled to sum 1, those below 1 / period raised to it at the expense of the others."""
        floor, low = 1 / self.period, set()
        while True:
            scale = (1 - floor * len(low)) / (
                sum(w for d, w in weights.items() if d not in low) or 1.0
            )
            lower = {d for d, w in weights.items() if d not in low and w * scale < floor}
            if not lower or len(low | lower) == len(
                weights
            ):  # all at the floor: the period is as long as the domains
                return {d: floor if d in low else w * scale for d, w in weights.items()}
            low |= lower

    def _order_of_period(self, weights):
        """The period's domains, one a step, for the period that the next draw belongs to."""
        index = self._step // self.period
        if self.strategy == "round_robin" or (self.strategy == "dynamic" and index == 0):
            return [
                self.domains[step % len(self.domains)]
                for step in range(index * self.period, (index + 1) * self.period)
            ]
        exact = np.array([weights[d] for d in self.domains]) * self.period
        quotas = np.floor(exact).astype(int)
        largest_remainder = np.argsort(quotas - exact, kind="stable")
        quotas[largest_remainder[: self.period - quotas.sum()]] += 1
        shuffle = np.random.default_rng((self.seed, index)).permutation(self.period)
        return np.repeat(np.array(self.domains, dtype=object), quotas)[shuffle].tolist()
