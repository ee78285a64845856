"""Tokenizers and language models of a few kilobytes, made by the stock libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT: A cat.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "a dog on the grass\na red bus in the street\nyes no A B C D",
]


def byte_tokenizer(bos: bool = True) -> Any:
    """Byte-level BPE as in GPT-2 and OPT; with ``bos``, texts begin with the end-of-text token, as in OPT."""
    tokenizers = stock_library("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    return stock_library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", bos_token="</s>", pad_token="</s>"
    )


def sentencepiece_tokenizer() -> Any:
    """BPE with a space before every text, as Llama's, with <s> before it."""
    tokenizers = stock_library("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))],
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return stock_library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def opt(vocab_size: int = 400, seed: int = 0) -> Any:
    """OPT of two layers, width 32, without dropout."""
    transformers = stock_library("transformers")
    torch.manual_seed(seed)
    config = transformers.OPTConfig(
        vocab_size=vocab_size, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return randomized(transformers.OPTForCausalLM(config))


def llama(vocab_size: int = 400, seed: int = 0) -> Any:
    """Llama of two layers, width 32."""
    transformers = stock_library("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    return randomized(transformers.LlamaForCausalLM(config))


def gpt2(vocab_size: int = 400, seed: int = 0) -> Any:
    """GPT-2 of two layers, width 32, without dropout."""
    transformers = stock_library("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128, embd_pdrop=0.0, resid_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return randomized(transformers.GPT2LMHeadModel(config))


def randomized(model: Any) -> Any:
    """Make every parameter random, so that a wrong bias or norm cannot pass; sizes keep the outputs near 1."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model.eval()


class PatchEncoder(nn.Module):
    """The mean colour of each of four quarters, times a matrix: features that differ from image to image."""

    preprocessing = Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    num_patches, width, name, image_size = 4, 16, "quarters", 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(3, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        quarters = nn.functional.adaptive_avg_pool2d(self.preprocessing.normalize(pixels), 2)
        return self.linear(quarters.flatten(2).transpose(1, 2))

    def fingerprint(self) -> str:
        return "quarters"

    def describe(self) -> dict[str, object]:
        return {"name": self.name}
