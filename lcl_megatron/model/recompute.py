"""Selective recomputation: outputs that are cheap to make again are not kept for the backward pass.

What one layer of width C with an MLP of width 4 C keeps per token, in units of C (measured by
``benchmarks/activations.py``):

| kept | GELU, LayerScale | ReLU | to make it again |
|---|---:|---:|---|
| inputs of both LayerNorms | 2 | 2 | the branch before |
| **outputs of both LayerNorms** | 2 | 2 | one pass over memory |
| query, key, value | 3 | 3 | a matrix product |
| output of core attention | 1 | 1 | attention |
| outputs of both branches, before LayerScale | 2 | 0 | a matrix product |
| input of the MLP activation | 4 | 0 | a matrix product |
| **output of the MLP activation** | 4 | 4 | one pass over memory; for ReLU there is nothing to make it from |

``selective`` drops what one pass over memory brings back, in bold: 6 of 18 for a ViT, 2 of 12 for an OPT (13 on a
CPU, where documents attend one by one and their outputs are kept alone and side by side). The outputs of products
are worth less per byte: to make one again takes 2 C operations for every value.
megatron-core's usual choice, core attention, would gain nothing: no attention used here keeps its scores, its inputs
are kept in either case, and its output is the next product's input.

The mechanism is megatron-core's ``CheckpointWithoutOutput``, called here because its own ``recompute_modules =
["layernorm"]`` needs TransformerEngine (0.16.1: ``tensor_parallel/random.py:589``) and it has none for a dense MLP's
activation. It recomputes in a backward pass only, not under ``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F


class RecomputedOutput:
    """A function whose output lives until its reader has run, and is made again for the reader's backward pass.

    Parallel: none; every rank recomputes its own part.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], reader: nn.Module) -> None:
        """Attach to a reader.

        Args:
            function: cheap, deterministic, of one tensor that is kept anyway.
            reader: the only module that reads the output; it returns a tuple of which the first entry is a tensor.
        """
        self._function = function
        self._pending: CheckpointWithoutOutput | None = None
        reader.register_forward_hook(self._drop_output)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function's output."""
        if not is_grad_enabled():
            return self._function(x)
        # None, and not the default False, is what megatron-core takes for "no FP8".
        self._pending = CheckpointWithoutOutput(fp8=None)
        output: Tensor = self._pending.checkpoint(self._function, x)
        return output

    def _drop_output(self, reader: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if self._pending is not None:
            self._pending.discard_output_and_register_recompute(output[0])
            self._pending = None


def recompute_selectively(layer: TransformerLayer) -> None:
    """Let a layer forget the outputs of its LayerNorms and, unless it is ReLU, of its MLP activation.

    Its LayerNorms must be modules of their own, not fused with the products that read them.
    """
    for norm, reader in (
        (layer.input_layernorm, layer.self_attention.linear_qkv),
        (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
    ):
        norm.forward = RecomputedOutput(norm.forward, reader)
    # ReLU keeps its output only, which the next product needs too.
    if layer.mlp.activation_func is not F.relu:
        layer.mlp.activation_func = RecomputedOutput(layer.mlp.activation_func, layer.mlp.linear_fc2)
