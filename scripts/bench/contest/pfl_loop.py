"""Opponent: pfl's SimulatedBackend and FederatedAveraging over the same PEFT model and batches. Needs pfl 0.6.0, torch, transformers, peft.

Says ``ready``, then does a round for each line that it reads and says ``done``.
"""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional as F

from contest.peft_loop import collate, peft_model


class Commanded(TrainingProcessCallback):  # type: ignore[misc]
    """Lets each central iteration begin when a line comes in."""

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Wait for the first word."""
        self._wait("ready")
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
        """Wait for the next."""
        return not self._wait("done"), Metrics()

    def _wait(self, word: str) -> bool:
        print(word, flush=True)
        return bool(sys.stdin.readline())


def main() -> None:
    """Run the workload."""
    torch.set_num_threads(1)
    work = json.loads(Path(sys.argv[1]).read_text())
    settings, clients, asked = work["settings"], list(work["clients"]), Counter[str]()
    network = peft_model(work)

    def loss(self: Any, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor, eval: bool = False) -> torch.Tensor:
        self.train(not eval)
        return F.cross_entropy(self(input_ids=ids, attention_mask=mask).logits, targets)

    network.loss = types.MethodType(loss, network)
    network.metrics = lambda *_, **__: {}
    trained = [p for p in network.parameters() if p.requires_grad]
    model = PyTorchModel(network, lambda _, lr: torch.optim.AdamW(trained, lr=lr), torch.optim.SGD(trained, lr=1.0))

    def shard(client: str) -> Dataset:
        """Return the examples of a client's next round, batch after batch."""
        plan = work["rounds"][asked[client]][client]
        asked[client] += 1
        batch, targets = collate([work["clients"][client][i] for indices in plan for i in indices])
        return Dataset([batch["input_ids"], batch["attention_mask"], targets], user_id=client)

    federation = FederatedDataset(shard, get_user_sampler("minimize_reuse", clients))
    rounds = NNAlgorithmParams(
        central_num_iterations=len(work["rounds"]), evaluation_frequency=10**6, train_cohort_size=len(clients), val_cohort_size=0
    )
    local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=settings["lr"], local_batch_size=settings["batch"])
    FederatedAveraging().run(rounds, SimulatedBackend(federation, None), model, local, callbacks=[Commanded()])


if __name__ == "__main__":
    main()
