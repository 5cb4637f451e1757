"""Activations that are computed again for the gradient instead of kept.

Three degrees, each with the gradient of the plain network:

- `convolved`: a concatenation that a convolution takes; its parts are kept anyway, and copying them again costs next to nothing.
- `recomputed(..., keep_convolutions=True)`: all but the results of convolutions, which are most of the work and little of the memory.
- `recomputed`: all of a module but its inputs.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn


def convolved(block: nn.Module, join: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """`block(join(*parts))`, which keeps the parts and joins them again for the gradient, to the same bits.

    Args:
        block: Its children are called in a row, a convolution first.
        join: Cheap, and a function of its arguments alone: concatenates, upsamples.
        parts: Kept; best what other operations keep for the gradient anyway. Nobody may change them in place.
    """
    joined = join(*parts)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # the compiler chooses itself what it keeps
        return block(joined)
    joined_id = id(joined)  # not the tensor: the hooks live as long as the graph
    sources = [part.detach() for part in parts]

    def pack(tensor: Tensor) -> Tensor | None:
        return None if id(tensor) == joined_id else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        return join(*sources) if kept is None else kept

    first, *others = block.children()
    with saved_tensors_hooks(pack, unpack):
        x = first(joined)
    del joined
    for layer in others:
        x = layer(x)
    return x


def recomputed(
    function: Callable[..., Tensor], module: nn.Module, *inputs: Tensor, keep_convolutions: bool = False
) -> Tensor:
    """`function(module, *inputs)`, of which only the inputs are kept; batch statistics count once.

    Args:
        function: Called again for the gradient.
        module: What `function` uses, batch norms among it.
        inputs: Kept.
        keep_convolutions: Keep the results of convolutions too, and compute only the rest again.
    """
    options: dict[str, Any] = {}
    if keep_convolutions:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
    if not torch.compiler.is_compiling():  # it moves statistics once by itself, and refuses other contexts (torch 2.14)
        options["context_fn"] = partial(_with_statistics_held, module, **options)
    return checkpoint(function, module, *inputs, use_reentrant=False, **options)


def _kept(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Convolutions, but for those of one pixel (squeeze and excitation): cheap, and changed in place by the ReLU after them."""
    if operator is torch.ops.aten.convolution.default and args[0].shape[2:].numel() > 1:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _with_statistics_held(module: nn.Module, context_fn: Callable[[], Any] = noop_context_fn) -> tuple[Any, Any]:
    first_pass, second_pass = context_fn()
    return first_pass, _both(_statistics_held(module), second_pass)


@contextlib.contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


@contextlib.contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """The second forward pass must not move the running statistics again."""
    norms: list[Any] = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)
