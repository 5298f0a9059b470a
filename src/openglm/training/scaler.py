"""Dynamic loss scaling for float16, with hysteresis (SPEC 9.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class LossScaler:
    """The factor on the loss that keeps float16 gradients above 0, and when it changes.

    An overflow takes one of ``hysteresis`` chances; with the last one left the scale halves, never below ``least``. The
    step is skipped in both cases. Every ``window`` good steps since the last overflow the scale doubles and all chances
    are given back.
    """

    scale: float = 65_536.0
    window: int = 2_000
    hysteresis: int = 2
    least: float = 1.0
    chances: int | None = None
    """Left before the scale halves; None = all."""
    good_steps: int = 0
    """Since the last overflow."""

    def __post_init__(self) -> None:
        if self.chances is None:
            self.chances = self.hysteresis

    def update(self, overflow: bool) -> None:
        """Tell it whether the gradients of a step overflowed, on any rank of any stage."""
        assert self.chances is not None
        if overflow:
            if self.chances <= 1:
                self.scale = max(self.scale / 2, self.least)
            else:
                self.chances -= 1
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.chances = self.hysteresis
            self.scale *= 2

    def state(self) -> dict[str, float | int | None]:
        """Plain numbers for a snapshot."""
        return asdict(self)
