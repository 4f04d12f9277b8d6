"""Whatever the method, what a run leaves is the run's own model for PEFT and for transformers; or there is none, and that is told."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedsb.adapters import SPECS
from fedsb.app.exports.on_request import export
from fedsb.app.finished import left_of
from fedsb.app.own_factors import made_again
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.models.build import build_model
from fedsb.tasks.task import TASKS
from strategies import STRATEGIES
from tests.app.runs import federated
from tests.conftest import FILLERS
from tests.strategies.federations import in_rounds

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TOKENS = torch.arange(14).view(2, 7) + 5
SHORT = [
    "device=cpu", "rank=3", "plots=false", "federation.num_clients=2", in_rounds(2), "federation.partition.kind=iid",
    "train.lr=0.02", "train.local_steps=2", "train.batch_size=4", "train.max_length=12",
]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "t.csv"
    with path.open("w", newline="") as file:
        rows = [(f"{a} {b}", ("film", "sport")[i % 2]) for i, a in enumerate(FILLERS[:6]) for b in FILLERS[:4]]
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return found


def kind_of_model(method: str) -> tuple[object, ...]:
    """Return what an export depends on: the family, whether rounds add to W0, and whether there is a federation."""
    said = load([f"method={method}"]).method
    return said.adapter, STRATEGIES[method].adds_to_weights(), said.setting


MODELS = {kind_of_model(method): method for method in reversed(STRATEGIES)}


@pytest.mark.parametrize("method", MODELS.values())
def test_peft_and_transformers_load_what_the_run_has_learnt(method: str, table: Path, tiny_bert: Path, tmp_path: Path) -> None:
    data = ["data=files", f"data.path='{table}'", "data.task=classification"]
    own = ["data.client_test_fraction=0.2"] if SPECS[load([f"method={method}"]).method.adapter].own else []
    federated(tmp_path / "run", [*SHORT, *data, *own, f"method={method}", "model=pretrained", f"model.name='{tiny_bert}'"])
    if own:
        with pytest.raises(UserError, match="each client keeps its own"):
            export(tmp_path / "run")
        assert not (tmp_path / "run" / "adapter").exists()
        return
    left = left_of(tmp_path / "run", "export")
    c = left.config
    run = build_model(c.model, c.adapter, family=c.method.adapter, task=TASKS["classification"], labels=("film", "sport"), seed=0)
    start = logits(run.model)
    run.install(left.snapshot.state, left.snapshot.frozen.view().beside(made_again(c, run, left.snapshot)))
    wanted = logits(run.model)
    assert not c.federation.num_rounds or not torch.allclose(start, wanted, atol=1e-3)
    merged = AutoModelForSequenceClassification.from_pretrained(export(tmp_path / "run")[0])
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    if not run.spec.factors:
        with pytest.raises(UserError, match="trains no adapter"):
            export(tmp_path / "run", form="peft")
        return
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))), wanted, atol=1e-5)
