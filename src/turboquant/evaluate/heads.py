"""From hidden states to log-probabilities, a slice of positions at a time: (windows, ctx, vocabulary) never exists."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant.evaluate.errors import EvaluateError

SLICE_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits computed at a time


@dataclass(frozen=True)
class Head:
    """The decoder of a causal language model, and what turns its output into logits."""

    decoder: Any
    linear: Any
    softcap: float | None
    factor: float

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> "Head":
        """Take a model apart and check on ids (1, n) that the parts give the logits that the model gives.

        Raises:
            EvaluateError: this model computes its logits in a way that is not known here.
        """
        config = model.config.get_text_config(decoder=True)
        factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap = getattr(config, "final_logit_softcapping", None)
        head = cls(model.get_decoder(), model.get_output_embeddings(), softcap, factor)
        if head.linear is None:
            raise EvaluateError(f"model of type {config.model_type!r} has no output embeddings: not a language model")
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = head.logits(head.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        if not torch.allclose(got, want, atol=1e-2 * float(want.std()), rtol=0):
            raise EvaluateError(
                f"model of type {config.model_type!r} changes its logits after the output embeddings in a way that is "
                "not supported here"
            )
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary) fp32."""
        x = self.linear(hidden).float() * self.factor
        return torch.tanh(x / self.softcap) * self.softcap if self.softcap else x

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary) fp32."""
        return torch.log_softmax(self.logits(hidden), -1)

    def slices(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of rows (n, hidden) whose logits fit the workspace."""
        vocabulary = self.linear.out_features
        step = max(1, SLICE_LOGITS.get(hidden.device.type, 1 << 24) // vocabulary)
        for i in range(0, hidden.shape[0], step):
            yield slice(i, min(i + step, hidden.shape[0]))

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """(n, hidden), (n,) -> (n,) negative log-likelihood of each target, fp32."""
        parts = [-self.log_probs(hidden[s]).gather(1, target[s].unsqueeze(1)).squeeze(1) for s in self.slices(hidden)]
        return torch.cat(parts)

    def compare(self, base: Tensor, hidden: Tensor, changed: "Head | None" = None) -> Tensor:
        """What a changed hidden state does to the next-token distribution.

        Args:
            base, hidden: (n, hidden) states of the unchanged and of the changed model.
            changed: the head of the changed model, by default this one.

        Returns:
            (3, n) fp32: KL(base ‖ changed) in nats, 1 where the most likely tokens agree, and 1 - total variation.
        """
        parts = []
        for s in self.slices(base):
            p, q = self.log_probs(base[s]), (changed or self).log_probs(hidden[s])
            top = (p.argmax(-1) == q.argmax(-1)).float()
            q -= p  # log of the ratio; in place, for these are the largest tensors there are
            p.exp_()
            kl = -(p * q).sum(-1)
            tvd = 0.5 * (p * q.expm1_()).abs().sum(-1)
            parts.append(torch.stack((kl, top, 1 - tvd)))
        return torch.cat(parts, 1)
