"""megatron-core's view of the two towers: ``TransformerConfig`` and layer specs, made here and nowhere else.

Two backends. ``torch``: megatron-core's own linear layers, torch LayerNorm and ``scaled_dot_product_attention``; runs
everywhere. ``transformer_engine``: fused LayerNorm-linear and cuDNN attention; needs an NVIDIA GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from lcl_megatron.config import ConfigError, LanguageConfig, VisionConfig
from lcl_megatron.model.attention import TorchCoreAttention
from lcl_megatron.model.parts import mark
from lcl_megatron.model.residual import ResidualBranch, VisionLayer
from lcl_megatron.model.row_edge import RowEdge, WholeRows
from lcl_megatron.model.sequence_edge import SequenceEdge, WholeSequence


@dataclass(frozen=True)
class Runtime:
    """What the model needs to know of where it runs."""

    collection: ProcessGroupCollection
    """Process groups that megatron-core's layers use (tp, cp, pp)."""
    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    sequence_parallel: bool = False
    """Whether activations are split over those ranks."""
    edge: SequenceEdge = field(default_factory=WholeSequence)
    """How sequences are split over tensor-parallel ranks, and read."""
    rows: RowEdge = field(default_factory=WholeRows)
    """How positions and images of a micro-batch are shared by context-parallel ranks."""
    params_dtype: torch.dtype = torch.float32
    """dtype of parameters and activations."""
    transformer_impl: str = "torch"
    """``torch`` or ``transformer_engine``."""


class SequenceParallelLayerNorm(nn.LayerNorm):
    """torch's LayerNorm for a part of the sequence: marks its parameters so that their gradients are summed over tp.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            mark(parameter, sequence_parallel=config.sequence_parallel)


def resolve_transformer_impl(requested: str) -> str:
    """Return the backend to use: ``auto`` takes TransformerEngine where it and a GPU are present.

    Raises:
        ConfigError: TransformerEngine was asked for and cannot run here; megatron-core would otherwise fail later,
            with a message about an unrelated class.
    """
    usable = torch.cuda.is_available() and _transformer_engine_is_importable()
    if requested == "auto":
        return "transformer_engine" if usable else "torch"
    if requested == "transformer_engine" and not usable:
        raise ConfigError(
            "training.transformer_impl = transformer_engine needs an NVIDIA GPU and TransformerEngine >= 2.9,<2.12 "
            "(pip extra `gpu`); use --transformer-impl torch"
        )
    return requested


def _transformer_engine_is_importable() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(1.702 x), entry by entry; megatron-core's own is compiled, which needs a C++ compiler."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"relu": torch.nn.functional.relu, "gelu": torch.nn.functional.gelu, "quick_gelu": quick_gelu}


def vision_transformer_config(vision: VisionConfig, runtime: Runtime) -> TransformerConfig:
    """Return megatron-core's configuration of the vision layers."""
    return _transformer_config(
        runtime,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=_ACTIVATIONS[vision.activation],
    )


def language_transformer_config(language: LanguageConfig, runtime: Runtime) -> TransformerConfig:
    """Return megatron-core's configuration of the language layers."""
    return _transformer_config(
        runtime,
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        layernorm_epsilon=language.layernorm_epsilon,
        activation_func=_ACTIVATIONS[language.activation],
    )


def _transformer_config(runtime: Runtime, **shape: Any) -> TransformerConfig:
    return TransformerConfig(
        **shape,
        params_dtype=runtime.params_dtype,
        pipeline_dtype=runtime.params_dtype,
        bf16=runtime.params_dtype == torch.bfloat16,
        tensor_model_parallel_size=runtime.tensor_parallel_size,
        sequence_parallel=runtime.sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # bias_activation_fusion would replace erf-GELU by its tanh approximation.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Needs apex.
        gradient_accumulation_fusion=False,
        # Weights come from ``initialization.py``: the same values for every layout.
        perform_initialization=False,
        use_cpu_initialization=True,
        # Gradients are summed, not averaged, over data-parallel ranks: losses are already divided by global counts.
        calculate_per_token_loss=True,
    )


def vision_layer_spec(vision: VisionConfig, runtime: Runtime) -> ModuleSpec:
    """Return the spec of a vision layer: full attention, LayerScale and drop-path.

    megatron-core's own ViT spec is causal.
    """
    branch = ModuleSpec(
        module=ResidualBranch,
        params={"config": vision_transformer_config(vision, runtime), "layer_scale_init": vision.layer_scale_init},
    )
    selective = vision.recompute_granularity == "selective"
    submodules = _layer_submodules(runtime, AttnMaskType.no_mask, branch, selective)
    return ModuleSpec(module=VisionLayer, submodules=submodules)


def language_layer_spec(language: LanguageConfig, runtime: Runtime) -> ModuleSpec:
    """Return the spec of a language layer: causal attention, plain residuals."""
    branch = ModuleSpec(
        module=ResidualBranch,
        params={"config": language_transformer_config(language, runtime), "layer_scale_init": None},
    )
    selective = language.recompute_granularity == "selective"
    submodules = _layer_submodules(runtime, AttnMaskType.causal, branch, selective)
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _layer_submodules(
    runtime: Runtime, mask: AttnMaskType, branch: ModuleSpec, selective: bool
) -> TransformerLayerSubmodules:
    if runtime.transformer_impl == "transformer_engine":
        from megatron.core.extensions import transformer_engine as te

        from lcl_megatron.model.te_attention import FetchingTEAttention

        # A fused LayerNorm keeps its output; what ``recompute_selectively`` shall drop must be a module of its own.
        column, norm = (
            (te.TEColumnParallelLinear, SequenceParallelLayerNorm)
            if selective
            else (te.TELayerNormColumnParallelLinear, IdentityOp)
        )
        row, core = te.TERowParallelLinear, FetchingTEAttention
    else:
        column, row, norm, core = (
            ColumnParallelLinear,
            RowParallelLinear,
            SequenceParallelLayerNorm,
            TorchCoreAttention,
        )
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=core, linear_proj=row),
        ),
        self_attn_bda=branch,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        mlp_bda=branch,
        # Checkpoints carry the fused names, so that either backend reads the other's.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def mark_split_weights(module: nn.Module) -> None:
    """Mark which weights tensor parallelism splits, and along which dimension.

    megatron-core marks them only while it initialises them, which is switched off here. Without the marks, gradient
    norms would count one rank's slice and leave the others out.
    """
    for child in module.modules():
        if isinstance(child, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(child, RowParallelLinear):
            dim = 1
        else:
            continue
        if not hasattr(child.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(child.weight, is_parallel=True, dim=dim, stride=1)
