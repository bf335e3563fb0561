"""A language model of Hugging Face with adapters of peft, as people write it."""

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def base(seed: int = 0) -> Any:
    import torch

    torch.manual_seed(seed)
    sizes = {"vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0, use_cache=False))


def lora(folder: str) -> Any:
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="gaussian")
    return get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config)
