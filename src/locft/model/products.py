"""Matrix products of frozen weights in bfloat16, where the processor has instructions for them.

Activations, norms, attention and the residual stream stay float32; only the factors of each product
are rounded. On such a processor that halves the time of a step, and losses differ in the third digit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locft.model.paging import page_out

Product = Callable[[Tensor], Tensor]

_USUAL_TOKENS = 256  # of a batch; which layout is best depends on it, a little


def has_fast_bfloat16() -> bool:
    """Tell whether the processor has instructions for products in bfloat16."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@contextmanager
def bfloat16_products(parts: Iterable[nn.Module], rounded: nn.Module | None = None) -> Iterator[None]:
    """Let linear layers of a float32 model compute with bfloat16 factors while the body runs.

    A frozen weight is rounded once, and laid out once for the products of both directions; one that
    has a gradient is rounded anew in each pass, and its gradient is float32. What comes out is float32,
    but within a gated MLP, where it is rounded again right away, and out of the head.

    Args:
        parts: The modules whose linear layers are meant; float32.
        rounded: The one among them, the head, whose results stay bfloat16: they are many.
    """
    with ExitStack() as undo:
        for part in parts:
            kept = {child for module in part.modules() for child in _gates(module)} | {rounded}
            for linear in part.modules():
                if type(linear) is nn.Linear:
                    dtype = torch.bfloat16 if linear in kept else torch.float32
                    replace_forward(undo, linear, _forward_of(linear, dtype))
            # From here on its copies are read.
            page_out(parameter for parameter in part.parameters() if not parameter.requires_grad)
        yield


def _gates(mlp: nn.Module) -> tuple[nn.Module, ...]:
    """Return the frozen projections of a gated MLP whose results only meet each other, and the third."""
    gate, up, down = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if type(gate) is type(up) is type(down) is nn.Linear:
        return () if gate.weight.requires_grad or up.weight.requires_grad else (gate, up)
    return ()


def replace_forward(undo: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward until a stack unwinds.

    Args:
        undo: The stack.
        module: The module. Other libraries' hooks may have given it a forward of its own before.
        forward: The other one.
    """
    undo.callback(_restore_forward, module, vars(module).get("forward"))
    module.__dict__["forward"] = forward


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own


def _forward_of(linear: nn.Linear, dtype: torch.dtype) -> Product:
    weight, bias = linear.weight, linear.bias
    if weight.requires_grad:

        def multiply(x: Tensor) -> Tensor:
            return _Tuned.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]

    else:
        rounded = weight.detach().bfloat16()
        forward, backward = _lay_out(rounded), _lay_out(rounded.t().contiguous())

        def multiply(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            result = _Frozen.apply(rows, forward, backward, dtype)  # type: ignore[no-untyped-call]
            # A view that is made here may be added to in place, as PEFT does.
            return result.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    return multiply if bias is None else lambda x: multiply(x) + bias


def _lay_out(weight: Tensor) -> Product:
    """Return the product (N, in) -> (N, out) with a bfloat16 weight (out, in)."""
    if weight.device.type == "cpu":
        try:
            # As oneDNN wants it. Otherwise it rearranges the weight in every product, which costs a
            # fifth of the time at a few hundred tokens.
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_TOKENS)
            linear = torch.ops.mkldnn._linear_pointwise
            linear(weight.new_zeros(1, weight.shape[1]), laid_out, None, "none", [], "")
        except (AttributeError, RuntimeError):
            pass  # these operators are torch's own, for its compiler, and may go
        else:
            return lambda x: linear(x, laid_out, None, "none", [], "")
    return lambda x: nn.functional.linear(x, weight)


class _Frozen(torch.autograd.Function):
    """x (N, in) to x W^T (N, out) in a dtype, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Product, backward: Product, dtype: torch.dtype) -> Tensor:
        ctx.backward_product, ctx.dtype = backward, x.dtype
        return forward(x.bfloat16()).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backward_product(gradient.bfloat16()).to(ctx.dtype), None, None, None


class _Tuned(torch.autograd.Function):
    """x (..., in) to x W^T (..., out), with gradients for both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype, factor = x.dtype, weight.bfloat16()
        ctx.save_for_backward(x.bfloat16(), factor)
        return nn.functional.linear(x.bfloat16(), factor).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        rounded = gradient.bfloat16()
        wanted = (rounded @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return wanted, (rounded.flatten(0, -2).t() @ x.flatten(0, -2)).float()
