"""A run of consecutive transformer layers, named by their index in the whole tower."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class LayerStack(MegatronModule):
    """The layers of one tower that one pipeline stage holds.

    Children carry their index in the whole tower (``layers.7``), so that names in a checkpoint do not depend on where
    the pipeline is cut.
    """

    def __init__(
        self, config: TransformerConfig, spec: ModuleSpec, layers: range, collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        for index in layers:
            layer = build_module(spec, config=config, layer_number=index + 1, pg_collection=collection)
            self.add_module(str(index), layer)

    def items(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield each layer with its index in the tower."""
        for name, layer in self.named_children():
            yield int(name), layer
