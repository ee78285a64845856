"""A run of consecutive transformer layers, named by their index in the whole tower, and what they recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from lcl_megatron.config import LanguageConfig, VisionConfig
from lcl_megatron.model.recompute import recompute_selectively


class LayerStack(MegatronModule):
    """The layers of one tower that one pipeline stage holds.

    Children carry their index in the whole tower (``layers.7``), so that names in a checkpoint do not depend on where
    the pipeline is cut.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: ModuleSpec,
        layers: range,
        collection: ProcessGroupCollection,
        tower: VisionConfig | LanguageConfig,
    ) -> None:
        super().__init__(config=config)
        for index in layers:
            layer = build_module(spec, config=config, layer_number=index + 1, pg_collection=collection)
            if tower.recompute_granularity == "selective":
                recompute_selectively(layer)
            self.add_module(str(index), layer)
        full = tower.recompute_granularity == "full"
        self._num_checkpointed = (tower.recompute_num_layers or len(layers)) if full else 0

    def items(self) -> Iterator[tuple[int, Callable[..., Any]]]:
        """Yield each layer with its index in the tower; to be called as megatron-core's layers are."""
        for place, (name, layer) in enumerate(self.named_children()):
            checkpointed = place < self._num_checkpointed and torch.is_grad_enabled()
            yield int(name), partial(_call_checkpointed, layer) if checkpointed else layer


def _call_checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a layer of which only the inputs are kept.

    torch's function and not megatron-core's: layers draw no random numbers whose state would have to be set back, and
    it stops recomputing at the last activation that is needed.
    """
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
