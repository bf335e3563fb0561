"""A small language model in the form that nanoGPT has: forward(tokens, targets) gives (logits, loss)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop

VOCABULARY, LENGTH = 13, 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits = self.head(self.blocks(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


class Text(Dataset[tuple[Tensor, Tensor]]):
    """96 windows of a periodic text; of some the last labels are not counted."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        period = 3 + index % 7
        text = (torch.arange(LENGTH + 1) + index) % period
        targets = text[1:].clone()
        if index % 3 == 0:
            targets[LENGTH // 2 :] = -100
        return text[:-1], targets


def by_hand() -> list[float]:
    return plain_loop(built(GPT), Text(), lambda model, batch: model(*batch)[1])


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.language_model.GPT",
        "data=custom",
        "data.train._target_=tests.programs.language_model.Text",
        "task=auto",
    ],
    by_hand,
)
