"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fedsb.tasks.logits import logits_at
from fedsb.tasks.protocol import IGNORED, Batch

PIECE = 2**22  # outputs that are widened at a time


class CausalLM:
    """Next-token prediction, over the whole text or over the tokens that a batch says are ``learnt``: mean cross-entropy a token."""

    name: ClassVar[str] = "causal_lm"
    no_target: ClassVar[float] = IGNORED  # not looked at: a single token predicts nothing
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    peft_type: ClassVar[str] = "CAUSAL_LM"
    has_head: ClassVar[bool] = False

    def model_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """Turn the key-value cache off: nothing is generated here."""
        return {"use_cache": False}

    def target_tensor(self, targets: Sequence[float]) -> Tensor:
        """Return an empty tensor; the targets are the tokens themselves."""
        return torch.empty(0)

    def places(self, batch: Batch) -> Tensor:
        """Return where a learnt token follows: elsewhere the projection onto the vocabulary, a language model's largest, is for nothing."""
        return (self._next_tokens(batch).flatten() != IGNORED).nonzero().squeeze(-1)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, (batch, tokens, vocabulary), or (places, vocabulary)."""
        read = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        if "places" in batch:
            return logits_at(batch["places"], model, read)
        logits: Tensor = model(**read).logits
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood in nats a predicted token; padding does not count. 0 where nothing is predicted."""
        rows, wanted = self._read(outputs, batch)
        total = F.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="sum")
        return total / (wanted != IGNORED).sum().clamp(min=1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood a predicted token of each example: not of the batch, whose others it must not know."""
        tokens = self._next_tokens(batch)
        nll = F.cross_entropy(outputs.flatten(0, 1).float(), tokens.flatten(), ignore_index=IGNORED, reduction="none").view_as(tokens)
        return nll.sum(-1) / (tokens != IGNORED).sum(-1).clamp(min=1)

    def terms(self, batch: Batch) -> int:
        """Return the number of predicted tokens."""
        return int((self._wanted(batch) != 0).sum())

    def record(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return (summed negative log-likelihood, number of predicted tokens) of each example.

        What is computed from the outputs is computed in pieces, none of which is large beside them.
        """
        tokens = self._next_tokens(batch)
        rows, wanted = self._read(outputs.detach(), batch)
        step = max(1, PIECE // rows.shape[-1])
        # In one place from the start: small results between the pieces would keep their memory from being used again.
        nll = rows.new_empty(len(rows), dtype=torch.float32)
        for i in range(0, len(rows), step):
            piece = slice(i, i + step)
            nll[piece] = F.cross_entropy(rows[piece].float(), wanted[piece], ignore_index=IGNORED, reduction="none")
        if "places" in batch:
            nll = nll.new_zeros(tokens.numel()).index_copy_(0, batch["places"], nll)
        return torch.stack([nll.view_as(tokens).double().sum(-1), (tokens != IGNORED).sum(-1).double()], dim=-1).cpu()

    def metrics(self, records: Tensor, targets: Tensor | None) -> dict[str, float]:
        """Return the loss and the perplexity over all predicted tokens, however they were batched."""
        loss = records[:, 0].sum() / records[:, 1].sum()
        return {"loss": float(loss), "perplexity": float(loss.exp())}

    def items(self, records: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """Return each example's mean negative log-likelihood a predicted token, and how many tokens those are; 0 where there are none."""
        nll, tokens = records[:, 0], records[:, 1]
        return {"loss": (nll / tokens.clamp(min=1)).float(), "loss_weight": tokens.int()}

    def _read(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits, (places, vocabulary), and the tokens that follow there."""
        tokens = self._next_tokens(batch).flatten()
        return (outputs, tokens[batch["places"]]) if "places" in batch else (outputs.flatten(0, 1), tokens)

    @staticmethod
    def _next_tokens(batch: Batch) -> Tensor:
        """Return what follows at each place, (batch, tokens); nothing does at the last one, or before padding and what is not learnt."""
        # Not the outputs are shifted, but these: without their last place outputs would be copied to be flattened.
        wanted = CausalLM._wanted(batch)
        return F.pad(batch["input_ids"][:, 1:].masked_fill(wanted == 0, IGNORED), (0, 1), value=IGNORED)

    @staticmethod
    def _wanted(batch: Batch) -> Tensor:
        return batch["learnt" if "learnt" in batch else "attention_mask"][:, 1:]
