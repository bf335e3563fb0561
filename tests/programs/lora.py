"""LoRA by peft on GPT-2: the base is frozen, and the adapters alone are trained and saved."""

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.programs.causal_language_model import Blocks
from tests.programs.program import Program, built, plain_loop


def model() -> nn.Module:
    config = GPT2Config(
        vocab_size=17,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    adapters = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True)
    network: nn.Module = get_peft_model(GPT2LMHeadModel(config), adapters)
    return network


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.lora.model",
        "data=custom",
        "data.train._target_=tests.programs.causal_language_model.Blocks",
        "task=auto",
    ],
    lambda: plain_loop(built(model), Blocks(), lambda m, batch: m(**batch).loss),
)
