"""Chinchilla's scaling laws say which model, on how many tokens, makes the most of a budget.

N parameters, D tokens, C = 6 N D FLOPs of training. Source: Hoffmann et al. 2022,
arXiv:2203.15556. The laws were fitted to one family of models on one text (MassiveText): compare
sizes by them, and do not expect their losses on other text or with another vocabulary.
"""

import math
from dataclasses import dataclass
from statistics import linear_regression


@dataclass(frozen=True)
class Law:
    """A law gives the loss in nats a token as E + A / N^alpha + B / D^beta (approach 3, eq. 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return (N, D) of the least loss with 6 N D = flops (eq. 4)."""
        power = self.beta / (self.alpha + self.beta)
        parameters = self._ratio() ** (1 / (self.alpha + self.beta)) * (flops / 6) ** power
        return parameters, flops / 6 / parameters

    def tokens_for(self, parameters: float) -> float:
        """Return D of the budget whose optimum is this N: there, dL/dlogN = dL/dlogD."""
        return (parameters**self.alpha / self._ratio()) ** (1 / self.beta)

    def _ratio(self) -> float:
        return self.alpha * self.A / (self.beta * self.B)


LAWS = {
    # Hoffmann et al., appendix D.3, eq. 10. Its optimum for 2.21e19 FLOPs is 326M and 11.3B;
    # nanoGPT's notebook says 316M and 11.65B, the nearest on its grid of models 15 % apart.
    "Chinchilla": Law(1.69, 406.4, 410.7, 0.34, 0.28),
    # Besiroglu et al. 2024, arXiv:2404.10102: the same data, fitted by an optimiser that converged.
    "Epoch": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}

# Approach 2, table A3: parameters and tokens of compute-optimal models.
OPTIMAL_MODELS = (
    (400e6, 7.7e9),
    (1e9, 20.0e9),
    (10e9, 219.5e9),
    (67e9, 1.7e12),
    (175e9, 4.3e12),
    (280e9, 7.1e12),
    (520e9, 13.4e12),
    (1e12, 26.5e12),
    (10e12, 292.0e12),
)


def _line() -> tuple[float, float]:
    """Fit (m, c) of log D = m log N + c to the table, as nanoGPT's scaling_laws.ipynb does."""
    logs = [(math.log(n), math.log(d)) for n, d in OPTIMAL_MODELS]
    return tuple(linear_regression(*zip(*logs, strict=True)))


def table_tokens_for(parameters: float) -> float:
    """Return D for which N is optimal by approach 2; 2.29e9 for 124e6 parameters."""
    slope, intercept = _line()
    return math.exp(slope * math.log(parameters) + intercept)


def table_optimum(flops: float) -> tuple[float, float]:
    """Return the optimal (N, D) with 6 N D = flops by approach 2."""
    slope, intercept = _line()
    parameters = math.exp((math.log(flops / 6) - intercept) / (slope + 1))
    return parameters, flops / 6 / parameters
