"""What enters the linear layers of a model on a text, and what recipes make of it there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.evaluate.fidelity import scheme, scheme_name
from turboquant.evaluate.texts import read_texts, windows
from turboquant.layers.convert import Plan, norm_prior, shell, targets
from turboquant.recipe import Recipe


@torch.no_grad()
def linear_inputs(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    recipes: Sequence[str | Recipe],
    tokens: int = 1024,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a text through the model and quantize each linear layer by itself, its input exact.

    Returns:
        rows {"layer", "recipe", "spread" (largest over median RMS of the input's channels), "peak" (largest |x| over
        the RMS of all), "weight_error", "output_error" (relative), "hot" (channels, at 4-bit activations)}, for every
        recipe with a linear part; none if no recipe has one.

    Raises:
        EvaluateError, RecipeError: before any work.
    """
    plan = [s for s in map(scheme, recipes) if isinstance(s, Recipe) and s.linear is not None]
    if not plan:
        return []
    ids = windows(tokenizer, read_texts(text), tokens, tokens).to(model.device)
    head, rows, handles = model.get_output_embeddings(), [], []
    found = {n: m for n, m, _ in targets(model, Plan(plan[0]), head) if isinstance(m, nn.Linear)}

    def visit(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach()
            for s in plan:
                rows.append({"layer": name, "recipe": scheme_name(s)} | _one(model, name, module, x, y, s))
            if progress:
                progress("linear layers", len(rows) // len(plan), len(found))

        return hook

    for name, module in found.items():
        handles.append(module.register_forward_hook(visit(name)))
    try:
        model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _one(model: Any, name: str, module: nn.Linear, x: Tensor, y: Tensor, s: Recipe) -> dict[str, Any]:
    linear = s.linear
    assert linear is not None
    layer = shell(module, linear)
    slot = layer.slots["weight"]
    if linear.weights is None:
        layer.weight.data = module.weight.data
    slot.load(module.weight)
    if slot.tracked:
        slot.start(norm_prior(model, name))
    got = layer(x)
    rms = x.float().flatten(0, -2).square().mean(0).sqrt()
    return {
        "spread": float(rms.max() / rms.median().clamp_min(1e-20)),
        "peak": float(x.abs().max() / x.float().square().mean().sqrt().clamp_min(1e-20)),
        "weight_error": _relative(slot.dequantized(), module.weight.float()),
        "output_error": _relative(got.float(), y.float()),
        "hot": getattr(layer, "weight_x_hot").tolist() if slot.tracked else None,  # noqa: B009
    }


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
