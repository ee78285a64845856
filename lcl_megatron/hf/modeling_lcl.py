"""The LCL model for transformers: a timm vision tower, the attention pool, an OPT language model.

This file needs only torch, timm and transformers (written for 4.57 and 5.x), and is shipped with exports, so that
``AutoModelForCausalLM.from_pretrained("EXPORT/lcl", trust_remote_code=True)`` works where lcl_megatron is not
installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class LCLConfig(PretrainedConfig):
    """What the three parts look like, and the ids that stand for an image.

    Args:
        vision_config: a ``timm_wrapper`` configuration, or its dictionary.
        text_config: an ``opt`` configuration, or its dictionary; not tied.
        pool_num_attention_heads: heads of the pool.
        pool_layernorm_epsilon: of its LayerNorms.
        context_bias: whether the contrastive projection of the text has a bias.
        boi_token_id: id of ``<BoI>``, at which the text before an image is encoded.
        image_token_id: id of ``<image>``, one for each patch of an image.
    """

    model_type = "lcl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        pool_num_attention_heads: int = 12,
        pool_layernorm_epsilon: float = 1e-5,
        context_bias: bool = True,
        boi_token_id: int | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config, self.text_config = _config(vision_config), _config(text_config)
        self.pool_num_attention_heads = pool_num_attention_heads
        self.pool_layernorm_epsilon = pool_layernorm_epsilon
        self.context_bias = context_bias
        self.boi_token_id = boi_token_id
        self.image_token_id = image_token_id
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


def _config(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


class LCLAttentionPool(nn.Module):
    """Attention of one learned query over the patches; value and output projection also make the image's latents."""

    def __init__(self, config: LCLConfig, width: int) -> None:
        super().__init__()
        hidden, epsilon = config.text_config.hidden_size, config.pool_layernorm_epsilon
        self.num_heads = config.pool_num_attention_heads
        self.query = nn.Parameter(torch.zeros(width))
        self.query_layernorm = nn.LayerNorm(width, eps=epsilon)
        self.key_layernorm = nn.LayerNorm(width, eps=epsilon)
        self.value_layernorm = nn.LayerNorm(width, eps=epsilon)
        self.query_projection = nn.Linear(width, hidden)
        self.key_projection = nn.Linear(width, hidden)
        self.value_projection = nn.Linear(width, hidden)
        self.output_projection = nn.Linear(hidden, hidden, bias=False)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents (images, patches, hidden) and pooled features (images, hidden) of patches (images, P, C)."""
        value = self.value_projection(self.value_layernorm(patches))
        key = self.key_projection(self.key_layernorm(patches))
        query = self.query_projection(self.query_layernorm(self.query)).expand(len(patches), 1, -1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads).flatten(1)
        return self.output_projection(value), self.output_projection(attended)


class LCLForConditionalGeneration(PreTrainedModel):
    """Text and images in one sequence: logits, generation, and the two features of the contrastive loss."""

    config_class = LCLConfig
    base_model_prefix = "lcl"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: LCLConfig) -> None:
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.vision_model = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.pool = LCLAttentionPool(config, self.vision_model.timm_model.num_features)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.context_layernorm = nn.LayerNorm(hidden)
        self.context_projection = nn.Linear(hidden, hidden, bias=config.context_bias)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def get_image_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents (images, patches, hidden) and pooled features (images, hidden) of normalised pixels."""
        tokens = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.pool(tokens[:, self.vision_model.timm_model.num_prefix_tokens :])

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Return input embeddings (rows, positions, hidden), the latents of the images in place of ``<image>``.

        Args:
            input_ids: (rows, positions) int64, with one ``<image>`` for each patch of each image.
            pixel_values: (images, 3, size, size) normalised pixels, in the order of their places.

        Raises:
            ValueError: the images do not fill exactly the places that the ids leave for them.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_id
        latents = embeddings.new_zeros(0, embeddings.shape[-1])
        if pixel_values is not None:
            latents = self.get_image_features(pixel_values.to(embeddings.dtype))[0].flatten(0, 1)
        if len(latents) != int(places.sum()):
            raise ValueError(
                f"{int(places.sum())} ids are the image token {self.config.image_token_id}, the images have "
                f"{len(latents)} latents; give every image one such id for each of its patches"
            )
        return embeddings.masked_scatter(places[..., None], latents.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return OPT's output (``logits``, and ``loss`` if there are labels); see ``embed`` for the inputs."""
        embeddings = self.embed(input_ids, pixel_values)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return ids (rows, longer) of prompt and continuation; ``kwargs`` go to OPT's ``generate``."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings = self.embed(input_ids, pixel_values)
        return self.language_model.generate(
            input_ids, inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs
        )

    def encode_image(self, pixel_values: Tensor, normalize: bool = True) -> Tensor:
        """Return pooled features (images, hidden), by default of length 1."""
        pooled = self.get_image_features(pixel_values)[1]
        return F.normalize(pooled, dim=-1) if normalize else pooled

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Return features (rows, hidden) of the texts before each row's first ``<BoI>``, by default of length 1.

        Raises:
            ValueError: a row has no ``<BoI>``; the feature of any other token was trained for nothing.
        """
        places = input_ids == self.config.boi_token_id
        if not bool(places.any(dim=-1).all()):
            raise ValueError(
                f"{int((~places.any(dim=-1)).sum())} of {len(places)} rows have no <BoI> (id "
                f"{self.config.boi_token_id}), at which a text is encoded; put it behind every text"
            )
        states: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        # Before OPT's last LayerNorm: the two majors of transformers disagree on what hidden_states[-1] is.
        handle = self.language_model.model.decoder.layers[-1].register_forward_hook(keep)
        try:
            self.language_model.model(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            handle.remove()
        first = places.int().argmax(dim=-1)
        state = states[0][torch.arange(len(first), device=first.device), first]
        features = self.context_projection(self.context_layernorm(state))
        return F.normalize(features, dim=-1) if normalize else features


def register() -> None:
    """Make transformers' Auto classes know the model."""
    AutoConfig.register("lcl", LCLConfig, exist_ok=True)
    AutoModel.register(LCLConfig, LCLForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(LCLConfig, LCLForConditionalGeneration, exist_ok=True)
