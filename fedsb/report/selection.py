"""Which round of a run is the best one, and when none better is waited for: by a metric on the server's validation part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsb.report.series import LOWER_IS_BETTER
from fedsb.run.records import RoundRecord

AUTO, HIGHER, LOWER = "auto", "higher", "lower"
DIRECTIONS = (AUTO, HIGHER, LOWER)


@dataclass(frozen=True)
class Selection:
    """By what a round is chosen.

    Attributes:
        metric: on the validation part.
        lower: whether less of it is better.
        patience: measured rounds without gain after which a run stops; None: it runs to its end.
    """

    metric: str
    lower: bool
    patience: int | None = None

    @classmethod
    def of(cls, metric: str | None, direction: str, patience: int | None) -> Selection | None:
        """Return the selection that a configuration asks for; None where it asks for none."""
        return None if metric is None else cls(metric, metric in LOWER_IS_BETTER if direction == AUTO else direction == LOWER, patience)

    def best(self, records: Sequence[RoundRecord]) -> RoundRecord | None:
        """Return the best round that was measured: of equals the first; one whose value is no finite number is none."""
        measured = [record for record in records if math.isfinite(self._value(record))]
        return min(measured, key=lambda record: (self._value(record) * (1 if self.lower else -1), record.round), default=None)

    def over(self, records: Sequence[RoundRecord]) -> bool:
        """Tell whether as many measured rounds as one waits for have come behind the best without a gain."""
        best = self.best(records)
        since = [record for record in records if record.validation and record.round > (best.round if best else -1)]
        return self.patience is not None and len(since) >= self.patience

    def told(self, records: Sequence[RoundRecord]) -> dict[str, Any] | None:
        """Return the choice as ``summary.json`` has it; None where nothing was measured."""
        best = self.best(records)
        if best is None:
            return None
        direction = LOWER if self.lower else HIGHER
        return {"round": best.round, "metric": self.metric, "direction": direction, "value": self._value(best)}

    def _value(self, record: RoundRecord) -> float:
        return record.validation.get(self.metric, math.nan)
