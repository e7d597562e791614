"""The state of a network that validation cases like best, and when to stop looking for a better one."""

from __future__ import annotations

import copy

from torch import Tensor, nn


class BestState:
    """Keeps the state with the highest merit.

    Args:
        patience: Validations without a better one after which training stops; None keeps nothing, and the last state is scored.
        frozen: First steps in which the encoder does not learn. Validations there do not count towards patience: what follows them is
            another training. The best state may be of them.
    """

    def __init__(self, patience: int | None, frozen: int = 0) -> None:
        self.patience, self.frozen, self.waited = patience, frozen, 0
        self._best: tuple[float, int, dict[str, Tensor]] | None = None

    def seen(self, merit: float | None, step: int, network: nn.Module) -> bool:
        """Look at a validation and return whether to stop.

        Args:
            merit: Higher is better; None without validation cases.
            step: Steps done.
            network: What was validated.
        """
        if self.patience is None or merit is None:
            return False
        if self._best is None or merit > self._best[0]:
            self._best, self.waited = (merit, step, copy.deepcopy(network.state_dict())), 0
        elif step > self.frozen:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self, network: nn.Module, cases: int) -> str:
        """Put the best state back, where one was kept, and say which state is scored and how many validation cases chose it."""
        if self._best is None:
            return "last state; validation labels chose nothing"
        network.load_state_dict(self._best[2])
        early = ", before the encoder learnt" if self._best[1] <= self.frozen else ""
        return f"step {self._best[1]}, the best of {cases} validation cases{early}"
