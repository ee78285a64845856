"""Texts of retrieval. Oracles: open_clip's own tokenizer call, a transformers tokenizer, the text without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.retrieval.text_encoder import TextEncoder, open_tokenizer, tokenize
from tests.stock import stock_or_skip

TEXTS = ["A red Square", "it's 3 pm &amp; all is well", "", "word " * 50]


def test_clip_tokens_are_open_clip_s() -> None:
    open_clip = stock_or_skip("open_clip")
    tokenizer = open_tokenizer(None)
    expected = open_clip.get_tokenizer("ViT-B-32")(["a red square", "so what", "word " * 50], context_length=12)
    found = tokenize(tokenizer, ["A red Square", "so what", "word " * 50], 12)
    assert torch.equal(found.ids, expected)
    assert found.lengths.tolist() == [5, 4, 12]
    assert tokenizer.vocab_size == 49408
    assert int(found.ids.max()) < tokenizer.vocab_size


def tokenizer_folder(folder: Path, eos: str | None) -> Path:
    transformers = stock_or_skip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "red": 3}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, unk_token="?").save_pretrained(folder)
    return folder


def test_a_folder_s_tokens_end_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_folder(tmp_path / "t", "</s>"))
    found = tokenize(tokenizer, ["red car", "red red red red red"], 4)
    assert found.ids.tolist() == [[3, 2, 1, 0], [3, 3, 3, 1]]
    assert found.lengths.tolist() == [3, 4]
    assert tokenizer.vocab_size == 4


def test_bad_tokenizer_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no tokenizer folder"):
        open_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers reads"):
        open_tokenizer(tmp_path / "empty")
    with pytest.raises(ConfigError, match="has no eos_token"):
        open_tokenizer(tokenizer_folder(tmp_path / "t", None))


@pytest.mark.parametrize("training", [True, False])
def test_feature_depends_on_all_tokens_up_to_the_last_and_on_nothing_behind(training: bool) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(vocab_size=20, context_length=9, width=32, layers=2, output_width=6).train(training)
    ids = torch.randint(1, 20, (3, 7))
    lengths = torch.tensor([7, 4, 1])
    with torch.no_grad():
        together = encoder(ids, lengths)
        alone = torch.cat([encoder(row[None, :length], length[None]) for row, length in zip(ids, lengths, strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        for place in range(4):
            changed = ids.clone()
            changed[1, place] = ids[1, place] % 19 + 1
            assert not torch.allclose(encoder(changed, lengths)[1], together[1], atol=1e-4)
        changed = ids.clone()
        changed[1, 4:] = 5
        torch.testing.assert_close(encoder(changed, lengths), together, rtol=1e-5, atol=1e-6)


def test_layers_begin_with_different_weights_and_bf16_runs() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(vocab_size=20, context_length=9, width=32, layers=2, output_width=6)
    first, second = (layer.linear1.weight for layer in encoder.layers)
    assert not torch.equal(first, second)
    ids, lengths = torch.randint(1, 20, (3, 7)), torch.tensor([7, 4, 1])
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(ids, lengths)
    # bfloat16 has 8 bits; features are near 1.
    torch.testing.assert_close(rough.float(), encoder(ids, lengths), rtol=0.1, atol=0.1)
    rough.float().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
