"""The whole model in transformers: importing this makes ``AutoModel`` know the folder ``lcl`` of an export.

import lcl_megatron.hf
model = transformers.AutoModelForCausalLM.from_pretrained("EXPORT/lcl")
"""

from lcl_megatron.checkpoint.stock_libraries import stock_library

stock_library("timm")
stock_library("transformers")

from lcl_megatron.hf.modeling_lcl import LCLConfig, LCLForConditionalGeneration, register  # noqa: E402

__all__ = ["LCLConfig", "LCLForConditionalGeneration"]

register()
