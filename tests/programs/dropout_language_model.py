"""GPT-2 with its dropout: the meaning of its loss is found out although the forward in training draws."""

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.programs.causal_language_model import Blocks
from tests.programs.program import Program, built, plain_loop


def model() -> nn.Module:
    config = GPT2Config(
        vocab_size=17, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2LMHeadModel(config)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.dropout_language_model.model",
        "data=custom",
        "data.train._target_=tests.programs.causal_language_model.Blocks",
        "task=auto",
    ],
    lambda: plain_loop(built(model), Blocks(), lambda m, batch: m(**batch).loss),
    slots=(1,),  # each slot draws its own dropout
)
