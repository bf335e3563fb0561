"""Hugging Face's GPT-2 with gradient checkpointing: the model shifts the labels, of which some are -100."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from tests.programs.program import Program, built, plain_loop

Sample = dict[str, Tensor]


class Blocks(Dataset[Sample]):
    """96 blocks of 10 tokens; of every third block the prompt, 4 tokens, is not learned."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        tokens = (torch.arange(10) * (1 + index % 3) + index) % 17
        labels = tokens.clone()
        if index % 3 == 0:
            labels[:4] = -100
        return {"input_ids": tokens, "labels": labels}


def model() -> nn.Module:
    config = GPT2Config(
        vocab_size=17,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    network = GPT2LMHeadModel(config)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network


def by_hand() -> list[float]:
    return plain_loop(built(model), Blocks(), lambda m, batch: m(**batch).loss)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.causal_language_model.model",
        "data=custom",
        "data.train._target_=tests.programs.causal_language_model.Blocks",
        "task=auto",
    ],
    by_hand,
)
