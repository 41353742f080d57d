"""Which modules of a model are quantized, and putting quantized ones in their place."""

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.kernels.fused import NormRule
from turboquant.kernels.linear import Shared
from turboquant.layers.embedding import QuantEmbedding
from turboquant.layers.formulas import norm_rule
from turboquant.layers.fuse import fuse, norm_before, unfuse
from turboquant.layers.linear import QuantExperts, QuantLinear
from turboquant.recipe import Recipe, RecipeError, parse_recipe

Quantized = QuantLinear | QuantExperts | QuantEmbedding
PRODUCTS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))  # of stacks of experts, as transformers names them


def check_overrides(argument: str, overrides: Mapping[str, str], part: str, words: str) -> None:
    """Raises:
    RecipeError: a pattern is no regular expression, or a recipe lacks the part ("linear", "kv") it is there for.
    """
    for pattern, recipe in overrides.items():
        try:
            re.compile(pattern)
        except re.error as e:
            raise RecipeError(f"{argument}: {pattern!r} is no regular expression ({e})") from e
        if recipe != "none" and getattr(parse_recipe(recipe), part) is None:
            raise RecipeError(f"{argument}: {recipe!r} for {pattern!r} has no {words}")
        if recipe != "none" and getattr(parse_recipe(recipe), "kv" if part == "linear" else "linear") is not None:
            raise RecipeError(
                f"{argument}: {recipe!r} for {pattern!r} has more than {words}, which is all that counts there"
            )


def _within(name: str, skip: str) -> bool:
    """Whether a module's name is this one or ends in it, or whether it is a part of a module of which this holds."""
    return f".{skip}." in f".{name}."


@dataclass(frozen=True)
class Plan:
    """What to quantize how.

    Attributes:
        recipe: of every linear layer and stack of experts.
        skip: names of modules that stay as they are, with all that is in them: a whole name, or its last parts.
        overrides: pattern -> recipe; the first pattern that `re.search` finds in a module's name decides, "none" skips.
    """

    recipe: Recipe
    skip: Sequence[str] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_overrides("overrides", self.overrides, "linear", "weights or activations")

    def skips(self, name: str) -> bool:
        """Whether a module is among those named to stay as they are."""
        return any(_within(name, s) for s in self.skip)

    def of(self, name: str) -> Recipe | None:
        """The linear recipe of a module, None if it stays as it is."""
        if self.skips(name):
            return None
        for pattern, recipe in self.overrides.items():
            if re.search(pattern, name):
                return None if recipe == "none" else parse_recipe(recipe).linear
        return self.recipe.linear


def check_names(model: nn.Module, plan: Plan, asked: Sequence[str] = (), head: nn.Module | None = None) -> None:
    """Refuse names to leave alone, and patterns, that fit no module; warn of patterns that decide nothing.

    Args:
        asked: of `plan.skip`, those that the user gave.
        head: the output embeddings, which an override decides only by head=8 or against it (as it does input embeddings
            only by embed=8).

    Raises:
        RecipeError: one that fits none.
    """
    names, inputs = [n for n, _ in model.named_modules()], _inputs(model)
    if plan.recipe.weights and plan.recipe.weights.embed and not isinstance(inputs, nn.Embedding | QuantEmbedding):
        raise RecipeError(f"{plan.recipe.name!r}: this model has no input embeddings for embed=8")
    if plan.recipe.weights and plan.recipe.weights.head and head is None:
        raise RecipeError(f"{plan.recipe.name!r}: this model has no output embeddings for head=8")
    ends: dict[nn.Module | None, str] = {inputs: "embed", head: "head"}
    for skip in asked:
        if not any(_within(n, skip) for n in names):
            raise RecipeError(f"{skip!r}, to be left as it is, names no module of this model{_such_as(model, skip)}")
    for pattern, recipe in plan.overrides.items():
        if not any(re.search(pattern, n) for n in names):
            raise RecipeError(f"the override {pattern!r} fits no module of this model{_such_as(model, pattern)}")
        if not any(_decides(plan, pattern, recipe, n, ends.get(m)) for n, m in model.named_modules() if _layer(m)):
            named = {end for n, m in model.named_modules() if re.search(pattern, n) and (end := ends.get(m))}
            why = "fits no linear layer that another override or modules_to_not_convert leaves to it"
            if named:
                words = {"head": "output embeddings", "embed": "input embeddings"}
                each = [f"names the {words[e]} alone, which stay as they are without {e}=8" for e in sorted(named)]
                why = " and ".join(each)
            warnings.warn(f"the override {pattern!r} decides nothing: it {why}", stacklevel=3)


def _such_as(model: nn.Module, asked: str) -> str:
    """Names of layers that may have been meant, for a message."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Quantized)]
    last = sorted({n.rpartition(".")[2] for n in names})
    near = difflib.get_close_matches(asked.rpartition(".")[2], last, n=1, cutoff=0.5)
    shown = [next(n for n in names if n.endswith(near[0]))] if near else names[:1]
    return f"; its layers have names such as {shown[0]!r}" if shown else ""


def _layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Quantized) or experts_products(module) is not None


def _inputs(model: nn.Module) -> nn.Module | None:
    """The input embeddings of a model of transformers, None if it has none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if get else None
    except NotImplementedError:  # how transformers says so
        return None


def _decides(plan: Plan, pattern: str, recipe: str, name: str, end: str | None) -> bool:
    """Whether of all overrides it is this one that says what becomes of a layer."""
    if plan.skips(name) or next((p for p in plan.overrides if re.search(p, name)), None) != pattern:
        return False
    if end is None:
        return True
    asked = plan.recipe if recipe == "none" else parse_recipe(recipe)
    return asked.weights is not None and getattr(asked.weights, end) > 0


def experts_products(module: nn.Module) -> tuple[str, str] | None:
    """Names of the two stacked products of a module that holds experts, None if it holds none."""
    for names in PRODUCTS:
        stacks = [getattr(module, n, None) for n in names]
        if all(isinstance(s, Tensor) and s.dim() == 3 and s.is_floating_point() for s in stacks):
            return names
    return None


def targets(model: nn.Module, plan: Plan, head: nn.Module | None = None) -> Iterator[tuple[str, nn.Module, Recipe]]:
    """Modules to quantize: (name, module, recipe); of embeddings only the model's input ones, and those with embed=8.

    Args:
        head: the output embeddings, which stay as they are unless the recipe has head=8.

    Raises:
        RecipeError: a stack of weights that this library does not know (it would be skipped silently otherwise), or a
            layer that cannot be packed.
    """
    inputs = _inputs(model)
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            continue
        if isinstance(module, nn.Embedding):
            recipe = plan.of(name)
            if module is inputs and recipe is not None and recipe.weights and recipe.weights.embed:
                _packs(name, recipe, module.embedding_dim)
                yield name, module, eight_bit(recipe)
        elif module is head:
            recipe = plan.of(name)
            if isinstance(module, nn.Linear) and recipe is not None and recipe.weights and recipe.weights.head:
                _packs(name, recipe, module.in_features)
                yield name, module, head_recipe(recipe)
        elif isinstance(module, nn.Linear):
            recipe = plan.of(name)
            if recipe is not None:
                _packs(name, recipe, module.in_features)
                yield name, module, recipe
        elif experts_products(module) and hasattr(module, "is_transposed"):
            recipe = plan.of(name)
            if recipe is not None:
                yield name, module, recipe
        else:
            stacks = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
            stacks = [n for n in stacks if "conv" not in name and plan.of(f"{name}.{n}") is not None]
            if stacks and plan.of(name) is not None and "expert" in f"{name}.{type(module).__name__}".lower():
                raise RecipeError(
                    f"{name}.{stacks[0]} is a stack of weights of a kind that is not known ({type(module).__name__}): "
                    "it would stay unquantized; name it in modules_to_not_convert if that is meant"
                )


def _packs(name: str, recipe: Recipe, width: int) -> None:
    """Raises:
    RecipeError: a weight of this width cannot be packed.
    """
    if recipe.weights is not None:
        try:
            recipe.weights.group_of(width)
        except RecipeError as e:
            raise RecipeError(f"{name}: {e}; name it in modules_to_not_convert") from e


def head_recipe(recipe: Recipe) -> Recipe:
    """Output embeddings asked for with head=8: two stages, their input in 8 bit if that of the layers is."""
    a = recipe.activations
    return replace(eight_bit(recipe), activations=a if a and a.bits == 8 else None)


def eight_bit(recipe: Recipe) -> Recipe:
    """Two stages, and nothing but weights."""
    assert recipe.weights is not None
    return Recipe(weights=replace(recipe.weights, bits=8, head=0, embed=0))


def shell(
    module: nn.Module, recipe: Recipe, shared: Shared | None = None, device: Any = None, like: torch.dtype | None = None
) -> Quantized:
    """An empty quantized module for a linear layer, embeddings or a stack of experts; biases are taken over.

    Args:
        device: of its buffers; by default where the module is.
        like: see `Slot`.
    """
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(module, recipe, device, like).eval()
    if isinstance(module, nn.Linear):
        w = module.weight
        out = QuantLinear(
            module.in_features, module.out_features, False, recipe, device or w.device, w.dtype, shared, like
        )
        out.bias = module.bias
        return out.eval()
    names = experts_products(module)
    assert names is not None
    stacks = [getattr(module, n) for n in names]
    turn = bool(getattr(module, "is_transposed", False))
    shapes = {n: tuple(s.mT.shape if turn else s.shape) for n, s in zip(names, stacks, strict=True)}
    biases = {n: b for n in names if (b := getattr(module, f"{n}_bias", None)) is not None}
    gated = getattr(module, "has_gate", names[0].startswith("gate"))
    if getattr(module, "has_post_expert_norm", False):
        raise RecipeError(f"experts with a norm behind them ({type(module).__name__}) are not supported")
    light = copy.copy(module)  # without its stacks, which a bound method would keep alive
    light._parameters = {n: p for n, p in module._parameters.items() if n not in names}
    gate = light._apply_gate if gated else module.act_fn
    experts = QuantExperts(
        shapes, gate, biases, recipe, device or stacks[0].device, stacks[0].dtype, like  # type: ignore[arg-type]
    )  # fmt: skip
    experts.turned = turn
    return experts.eval()


def norm_prior(model: nn.Module, name: str) -> Tensor | None:
    """Scale of the input channels of a layer by the weight of the norm before it, None if there is none known."""
    found = norm_before(model, name)
    weight = getattr(found[1], "weight", None) if found else None
    if found is None or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    rule = norm_rule(found[1])
    return (weight.detach().float() + (rule.shift if isinstance(rule, NormRule) else 0.0)).abs()


def start_trackers(model: nn.Module) -> None:
    """Let every tracker of a model start from the norms, which stand only once all weights are loaded."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            for slot in module.slots.values():
                if slot.tracked:
                    slot.start(norm_prior(model, name))


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    plan: Plan,
    head: nn.Module | None = None,
    moments: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Quantize a loaded model in place, layer by layer.

    Args:
        head: the output embeddings.
        moments: name -> (K, K) second moments of a linear layer's input, for error feedback.
        progress: called with (name, done, of).

    Returns:
        one row a weight: {"name", "recipe", "shape", "bits", "bytes", "bytes_before", "error", "feedback"}; bits are
        those stored for each weight (None where it is not packed), bytes_before is 0 where a row above has counted that
        very weight (tied embeddings), error is relative to the weight's norm, feedback says whether it was rounded with
        error feedback. With moments a warning names the packed weights that were not.
    """
    shared, rows = Shared(), []
    found, counted = list(targets(model, plan, head)), set[int]()
    for i, (name, module, recipe) in enumerate(found):
        new = shell(module, recipe, shared)
        turn = bool(getattr(module, "is_transposed", False))
        for key, slot in new.slots.items():
            own = getattr(module, key)  # alive as long as `found` is, so its id is its own
            w = own.detach().mT.contiguous() if turn else own.detach()
            moment = (moments or {}).get(name) if recipe.weights is not None and w.dim() == 2 else None
            slot.load(w, moment)
            if recipe.weights is None:
                getattr(new, key).data = w
            if slot.tracked:
                slot.start(norm_prior(model, name))
            called = name if len(new.slots) == 1 else f"{name}.{key}"
            before = 0 if id(own) in counted else own.nbytes
            counted.add(id(own))
            rows.append(row(called, slot, w) | {"bytes_before": before, "feedback": moment is not None})
        _put(model, name, new)
        if progress:
            progress("layers", i + 1, len(found))
    packed = [r for r in rows if r["bits"] is not None]
    without = [r["name"] for r in packed if not r["feedback"]]
    if moments is not None and without:
        names = ", ".join(without[:4]) + (", ..." if len(without) > 4 else "")
        warnings.warn(
            f"{len(without)} of {len(packed)} weights were rounded without error feedback, for there are no second "
            f"moments of their inputs: {names}",
            stacklevel=2,
        )
    fuse(model, head)
    return rows


@contextmanager
def quantized(
    model: nn.Module, plan: Plan, head: nn.Module | None = None, moments: Mapping[str, Tensor] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Within the context a model is quantized; afterwards its own modules are back, untouched."""
    kept = {name: module for name, module, _ in targets(model, plan, head)}
    try:
        yield quantize_model(model, plan, head, moments)
    finally:
        unfuse(model)
        for name, module in kept.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def row(name: str, slot: Any, w: Tensor) -> dict[str, Any]:
    """What `quantize_model` says about one weight."""
    out = {"name": name, "recipe": slot.recipe.name, "shape": list(slot.shape), "bytes_before": w.nbytes}
    if slot.recipe.weights is None:
        return out | {"bits": None, "bytes": w.nbytes, "error": 0.0}
    size = slot.packed().nbytes
    norm, lost = w.float().norm(), 0.0
    if w.dim() == 2:
        lost = float((slot.dequantized() - w.float()).norm() / norm.clamp_min(1e-30))
    else:  # one expert at a time
        square = sum(float((slot.dequantized(e) - x.float()).square().sum()) for e, x in enumerate(w))
        lost = square**0.5 / float(norm.clamp_min(1e-30))
    return out | {"bits": 8 * size / w.numel(), "bytes": size, "error": lost}


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put ordinary linear layers back in place, with the weights as they decode. Experts become modules that compute
    with dequantized stacks of the same names."""
    unfuse(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            w = module.slot.dequantized().to(dtype or torch.float32)
            new = nn.Linear(module.in_features, module.out_features, module.bias is not None, w.device, w.dtype)
            new.weight.data = w
            if module.bias is not None:
                new.bias.data = module.bias.data.to(w.dtype)
            _put(model, name, new.eval())
        elif isinstance(module, QuantExperts | QuantEmbedding):
            _put(model, name, module.dequantized(dtype or torch.float32))
