"""Keeps Unsloth's fused LoRA kernels from computing gradients of LoRA pairs that are frozen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FAST_LORA = "unsloth.kernels.fast_lora"


def skip_frozen_pairs(model: nn.Module) -> int:
    """
    Makes Unsloth's fused LoRA layers compute gradients only for pairs that still train.

    The fused attention and MLP of a model from `FastLanguageModel.get_peft_model` calculate the `lora_A` and `lora_B`
    gradients of all their projections at once, frozen or not. After this call, `requires_grad` decides in each forward
    pass. A frozen pair costs 3 matmuls less (4 on `down_proj`), and an input that needs no gradient (above a frozen
    prefix) gets none. As long as everything trains, Unsloth's own backward runs, bit for bit. Layers with LoRA biases
    or FP8 weights, and layers that Unsloth leaves to PEFT, stay as they are (PEFT's autograd skips frozen pairs
    anyway).

    The three autograd Functions are replaced in Unsloth's module, hence for all models of the process. Calling this
    again, for the same model or another one, does no harm. It never imports Unsloth.

    Unsloth compiles each decoder layer (on a GPU with torch >= 2.11; `UNSLOTH_BLOCK_COMPILE=0` turns that off). Its
    graphs have no frozen gradients, with or without this. A layer is compiled again when its set of frozen pairs is
    one that no layer had before. A pair freezes once, so one layer changes at most 7 times, and n layers cause at most
    `min(7 * n, 127)` compilations (twice that if layers with and without an input gradient share patterns). From torch
    2.13 on, Unsloth allows 32 graphs for all layers of a model together, those of the first step included, and more if
    `UNSLOTH_BLOCK_COMPILE_RECOMPILE_LIMIT` says so; with older versions it allows 1024. Past the limit, new patterns
    run uncompiled, and then these Functions skip the frozen pairs. Pairs of a layer that freeze in the same step share
    a compilation, so measuring less often means fewer of them.

    Args:
        model (`nn.Module`): any model, PEFT-wrapped or not.

    Returns:
        `int`: the attention and MLP modules of `model` that run through the fused kernels; 0 without Unsloth, with
        its CPU backend, and for models that it does not fuse (vision, full fine-tuning, float32).
    """
    kernels: Any = sys.modules.get(FAST_LORA)
    fused = 0 if kernels is None else sum(map(_is_fused, model.modules()))
    if fused and kernels.LoRA_W.__module__ != __name__:
        kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W = _skipping_functions(kernels)
    return fused


def _is_fused(module: nn.Module) -> bool:
    """Whether Unsloth gave this very module a kernel; `_unsloth_forward` is where its tiled MLP keeps it."""
    for name in ("apply_qkv", "apply_o", "forward", "_unsloth_forward"):
        function = vars(module).get(name)
        function = getattr(function, "__func__", function)  # a bound method
        function = getattr(function, "func", function)  # a partial: Cohere's MLP
        if getattr(function, "__module__", None) == FAST_LORA:
            return True
    return False


def _skipping_functions(kernels: Any) -> tuple[type, type, type]:
    """Subclasses of `LoRA_MLP`, `LoRA_QKV` and `LoRA_W` with a backward that asks `ctx.needs_input_grad`.

    A projection is `Y = X W' + S drop(X) A' B'`, with `A (r, in)` and `B (out, r)`. From `dY (tokens, out)`:

        dX = dY W + S undrop((dY B) A)        dA = S (dY B)' drop(X)        dB = S dY' (drop(X) A')

    Forward arguments are `X` and then five per projection, `W, W_quant, A, B, S`: see `wanted`.
    """
    base_mlp, base_qkv, base_w = kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W
    # As functions: Dynamo does not follow a call of another autograd Function's `.backward`.
    mlp_backward, qkv_backward, w_backward = base_mlp.backward, base_qkv.backward, base_w.backward

    def wanted(ctx: Any, projection: int) -> Sequence[bool]:
        return ctx.needs_input_grad[3 + 5 * projection : 5 + 5 * projection]

    def is_ours(ctx: Any, projections: int, has_bias: bool) -> bool:
        all_wanted = ctx.needs_input_grad[0] and all(all(wanted(ctx, i)) for i in range(projections))
        weights = (t for t in ctx.custom_saved_tensors if isinstance(t, Tensor))
        return not (all_wanted or has_bias or any(w.dtype == torch.float8_e4m3fn for w in weights))

    def flat(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])

    def pair_gradients(
        wants: Sequence[bool], X: Tensor, dY: Tensor, dYB: Any, A: Tensor, B: Tensor, S: float, drop: tuple
    ) -> tuple[Tensor | None, Tensor | None]:
        dA = dB = None
        if any(wants) and drop[0] is not None:
            X = kernels._dropout_replay(X, *drop)
        if wants[0]:
            dA = torch.empty_like(A).addmm_(dYB.t(), X, beta=0, alpha=S)
        if wants[1]:
            dB = torch.empty_like(B).addmm_(dY.t(), X @ A.t(), beta=0, alpha=S)
        return dA, dB

    def input_gradient(
        dX: Tensor | None, out: Tensor | None, dY: Tensor, dYB: Tensor, W: Any, A: Tensor, S: float, drop: tuple
    ) -> Any:
        """Adds to `dX`, or starts it, in the memory of `out` if given."""
        W = kernels.fast_dequantize(W[0].t(), W[1]).t()  # freed on return: one dense weight at a time
        dX = torch.matmul(dY, W, out=out) if dX is None else kernels.addmm_(dX, dY, W)
        if drop[0] is None:
            return kernels.addmm_(dX, dYB, A, alpha=S)
        return dX.add_(kernels._dropout_replay(dYB @ A, *drop, S))

    def backward_of_sum(
        ctx: Any, X: Tensor, projections: dict[int, tuple], gradients: list[Any], overwrite: bool
    ) -> None:
        """Of projections that read the same `X`. Fills in `gradients`, one per forward argument."""
        shape, X = X.shape, flat(X)
        dX_wanted = ctx.needs_input_grad[0]
        dYBs: dict[int, Any] = {
            i: dY @ B if dX_wanted or wanted(ctx, i)[0] else None for i, (dY, _, _, B, _, _) in projections.items()
        }
        for i, (dY, _, A, B, S, drop) in projections.items():
            gradients[3 + 5 * i : 5 + 5 * i] = pair_gradients(wanted(ctx, i), X, dY, dYBs[i], A, B, S, drop)
        if dX_wanted:
            # All pairs have read X now, so dX may take its place; but compiled graphs must not write to an input.
            dX: Any = None
            out = X if overwrite and not torch.compiler.is_compiling() else None
            for i, (dY, W, A, _, S, drop) in projections.items():
                dX = input_gradient(dX, out, dY, dYBs[i], W, A, S, drop)
            gradients[0] = dX.view(shape)

    class LoRA_MLP(base_mlp):  # type: ignore[misc, valid-type]
        @staticmethod
        @kernels.torch_amp_custom_bwd
        def backward(ctx: Any, dY: Tensor) -> Any:
            if not is_ours(ctx, 3, any(ctx.biases)):
                return mlp_backward(ctx, dY)
            gate_W, gate_quant, gate_S, up_W, up_quant, up_S, down_W, down_quant, down_S, derive = (
                ctx.custom_saved_tensors
            )
            *pairs, X, e, g, gate_mask, up_mask, down_mask = ctx.saved_tensors
            gate_A, gate_B, up_A, up_B, down_A, down_B = (t.to(X.dtype) for t in pairs)
            gate_drop, up_drop, down_drop = zip(map(flat, (gate_mask, up_mask, down_mask)), ctx.dropout_p, strict=True)
            gradients: list[Any] = [None] * len(ctx.needs_input_grad)
            dY = flat(dY)
            dYB = dY @ down_B
            dh = input_gradient(None, None, dY, dYB, (down_W, down_quant), down_A, down_S, down_drop)
            h, d_up, d_gate = derive(dh, flat(e), flat(g))  # in place
            gradients[13:15] = pair_gradients(wanted(ctx, 2), h, dY, dYB, down_A, down_B, down_S, down_drop)
            projections = {
                1: (d_up, (up_W, up_quant), up_A, up_B, up_S, up_drop),
                0: (d_gate, (gate_W, gate_quant), gate_A, gate_B, gate_S, gate_drop),
            }
            backward_of_sum(ctx, X, projections, gradients, ctx.inplace)
            return tuple(gradients)

    class LoRA_QKV(base_qkv):  # type: ignore[misc, valid-type]
        @staticmethod
        @kernels.torch_amp_custom_bwd
        def backward(ctx: Any, *dYs: Tensor) -> Any:
            if not is_ours(ctx, 3, any(ctx.biases)):
                return qkv_backward(ctx, *dYs)
            X, *rest = ctx.saved_tensors
            gradients: list[Any] = [None] * len(ctx.needs_input_grad)
            projections = {}
            for i in range(3):
                W, W_quant, S = ctx.custom_saved_tensors[3 * i : 3 * i + 3]
                A, B, mask = rest[2 * i].to(X.dtype), rest[2 * i + 1].to(X.dtype), rest[6 + i]
                projections[i] = (flat(dYs[i]), (W, W_quant), A, B, S, (flat(mask), ctx.dropout_p[i]))
            backward_of_sum(ctx, X, projections, gradients, ctx.inplace)
            return tuple(gradients)

    class LoRA_W(base_w):  # type: ignore[misc, valid-type]
        @staticmethod
        @kernels.torch_amp_custom_bwd
        def backward(ctx: Any, dY: Tensor) -> Any:
            if not is_ours(ctx, 1, ctx.has_bias):
                return w_backward(ctx, dY)
            W, W_quant, S = ctx.custom_saved_tensors
            A, B, X, mask = ctx.saved_tensors
            gradients: list[Any] = [None] * len(ctx.needs_input_grad)
            projection = (flat(dY), (W, W_quant), A.to(X.dtype), B.to(X.dtype), S, (flat(mask), ctx.dropout_p))
            backward_of_sum(ctx, X, {0: projection}, gradients, overwrite=False)
            return tuple(gradients)

    return LoRA_MLP, LoRA_QKV, LoRA_W
