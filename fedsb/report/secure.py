"""What a report says of secure sums: from whom they protect, and what fixed point did to them."""

from __future__ import annotations

from collections.abc import Sequence

from fedsb.core.cohort import cohort_size
from fedsb.report.table import gap_text, plural
from fedsb.run.folder import Run
from fedsb.run.records import RoundRecord
from fedsb.secure.threshold import threshold_of

PROTECTS = (
    "**Secure sums**: the server got the sum of a round's uploads and no upload; of {cohort} clients {stay} had to stay. It protects "
    "from a server that is curious and keeps to the protocol, as long as fewer than {stay} clients hand it what they hold, and from one "
    "that tells clients different things, as long as fewer than {lie} do. From one that serves clients of its own making it protects where "
    "nodes sign the keys of each sum and hold the others' to a list (`secure.key` and `secure.peers` of `node.yaml`), which is theirs to "
    "know. But for the first of the three a worker must answer for each node; else the program that it runs is the server's. Not covered: "
    "what the sum itself tells, or the difference of two runs' sums "
    "over other clients; and what stands beside an upload: the number of examples and, without privacy of examples, the loss. A simulation "
    "keeps the secrets of all clients on one machine, and protects nobody."
)
ROUNDING = (
    "The exactness gap was not measured, for nobody sees the uploads. What the sums' fixed point does to the mean change, relative to its "
    "norm over all uploaded values, is at most {most} in any round, and expected to be {expected}; where B and A are orthonormal that is "
    "the relative distance of the weights. {cut}"
)
CUT = "{values} beyond the bound of a round's change (`federation.secure_bound`) were cut before they were summed: raise it."
UNCUT = "No value was beyond the bound of a round's change."


def secured_text(run: Run) -> str:
    """Return from whom a run's secure sums protect; nothing of a run without."""
    if not run.setting("federation.secure_sum"):
        return ""
    cohort = cohort_size(int(run.setting("federation.num_clients")), float(run.setting("federation.fraction")))
    stay = threshold_of(cohort, float(run.setting("federation.secure_dropout")))
    return PROTECTS.format(cohort=cohort, stay=stay, lie=2 * stay - cohort)


def rounding_text(records: Sequence[RoundRecord]) -> str:
    """Return what fixed point did to the sums of a run; nothing of a run without."""
    extras = [record.extras for record in records if "secure_gap" in record.extras]
    if not extras:
        return ""
    cut = int(sum(each["secure_cut"] for each in extras))
    return ROUNDING.format(
        most=gap_text(max(each["secure_gap_most"] for each in extras)),
        expected=gap_text(max(each["secure_gap"] for each in extras)),
        cut=CUT.format(values=plural(cut, "value")) if cut else UNCUT,
    )
