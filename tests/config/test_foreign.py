"""What a server's overrides may say at a node: values of the configuration, of files that are there; nothing is composed before that."""

from __future__ import annotations

import sys

import pytest

from fedsb.app.asked import config_of
from fedsb.config.foreign import MOST, check_foreign
from fedsb.core.errors import UserError

REFUSED = [
    "hydra.searchpath=[pkg://this]", "+hydra.searchpath=[file:///tmp]", "hydra/launcher=basic", "++defaults=[x]", "~hydra",
    "experiment=../outside", "+experiment=/tmp/x", "'experiment=../outside'".strip("'"), "method=\"../x\"", "model@hydra=minilm/../x",
    "method=[fed_sb,../x]", "seed=${oc.env:HOME}", "seed=${ oc.env:HOME}", "data.path=${oc.decode:x}", "rank=${${seed}.env:HOME}",
    "data.path='${oc.create:x}'", "output=${hydra:runtime.cwd}", f"data.path={'x' * MOST}",
]  # fmt: skip
ALLOWED = [
    "method=fed_sb", "+experiment=quick", "train={lr:0.1}", "rank=${seed}", "data.path='/a b/../c.csv'", "model.name=some/id",
    "federation.num_rounds=${fedsb_rounds:${method.adapter},4}", "data.template='{question} $5'", "~train.schedule", "privacy=example",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_what_is_not_a_value_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^[\w.:/@ ]"):
        check_foreign(["rank=3", text])


@pytest.mark.parametrize("text", ALLOWED)
def test_values_and_files_that_are_there_are_taken(text: str) -> None:
    check_foreign([text])


def test_nothing_is_imported_for_a_message_of_a_real_federation() -> None:
    sys.modules.pop("this", None)
    with pytest.raises(UserError, match=r"^hydra\.searchpath: a server may set nothing of Hydra's own at a node"):
        config_of("hydra.searchpath=[pkg://this]", real=True)
    assert "this" not in sys.modules
