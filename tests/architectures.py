"""A dozen architectures made small: random weights of a base model and a tokeniser that fits, saved as a hub would hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.conftest import decoder_tokenizer, encoder_tokenizer, save

ENCODER, DECODER = len(encoder_tokenizer()), len(decoder_tokenizer())
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
BERT = {**SIZES, "vocab_size": ENCODER, "pad_token_id": 0}
LLAMA = {**SIZES, "vocab_size": DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
DISTILBERT = {"vocab_size": ENCODER, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
T5 = {"vocab_size": ENCODER, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "eos_token_id": 3}
BART = {"vocab_size": ENCODER, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3} | {
    f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
}
GPT2 = {"vocab_size": DECODER, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {"vocab_size": DECODER, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"vocab_size": DECODER, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
MODERN = {**BERT, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}

Make = Callable[[], PreTrainedModel]
# Encoders, and what has an encoder, read [CLS] … [SEP]; decoders have a tokeniser without a padding token.
ENCODERS: Mapping[str, Make] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    # Without the pooler, as every checkpoint of masked language modelling.
    "bert without its pooler": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**BERT, type_vocab_size=1)),
    "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTILBERT)),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=16)),
    "albert without its pooler": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**BERT, embedding_size=16)),
    "deberta": lambda: hf.DebertaModel(hf.DebertaConfig(**DEBERTA)),
    "deberta-v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**DEBERTA)),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**BERT, embedding_size=16)),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**BERT)),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**MODERN)),
    "t5": lambda: hf.T5Model(hf.T5Config(**T5, pad_token_id=0, decoder_start_token_id=0)),
    "bart": lambda: hf.BartModel(hf.BartConfig(**BART, decoder_start_token_id=3, forced_eos_token_id=3)),
}
DECODERS: Mapping[str, Make] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "llama that pads with another id": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, pad_token_id=0)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON)),
}
LANGUAGE_MODELS: Mapping[str, Make] = {
    **{name: DECODERS[name] for name in ("gpt2", "llama", "falcon")},
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)),
}


def checkpoint(name: str, folder: Path, **edits: Any) -> Path:
    """Write a model's folder; ``edits`` are set in its configuration."""
    tokenizer = encoder_tokenizer() if name in ENCODERS else decoder_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = {**ENCODERS, **DECODERS, **LANGUAGE_MODELS}[name]()
    for key, value in edits.items():
        setattr(model.config, key, value)
    model.tie_weights()
    return save(model, tokenizer, folder)
