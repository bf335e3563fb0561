"""Speech recognition with CTC: sounds and texts of unequal length, four tensors a batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop

Sample = tuple[Tensor, Tensor]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Speech(Dataset[Sample]):
    """96 sounds of 12 to 19 frames, with texts of 2 to 4 letters."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        frames = torch.sin(torch.arange(12 + index % 8)[:, None] * (1 + torch.arange(5)) * (0.1 + index / 96))
        return frames, 1 + (torch.arange(2 + index % 3) * 3 + index) % 6


def collate(samples: list[Sample]) -> Batch:
    sounds, texts = zip(*samples, strict=True)
    return (
        nn.utils.rnn.pad_sequence(list(sounds), batch_first=True),
        torch.tensor([len(sound) for sound in sounds]),
        nn.utils.rnn.pad_sequence(list(texts), batch_first=True),
        torch.tensor([len(text) for text in texts]),
    )


class Recognizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 12, batch_first=True), nn.Linear(12, 7)

    def forward(self, sounds: Tensor) -> Tensor:
        return self.head(self.rnn(sounds)[0]).log_softmax(-1)


class CTC:
    """A task with a collate function of its own."""

    def collate(self, samples: list[Sample]) -> Batch:
        return collate(samples)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        sounds, frames, texts, letters = batch
        return F.ctc_loss(model(sounds).transpose(0, 1), texts, frames, letters)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.speech.Recognizer",
        "data=custom",
        "data.train._target_=tests.programs.speech.Speech",
        "task=custom",
        "task._target_=tests.programs.speech.CTC",
    ],
    lambda: plain_loop(built(Recognizer), Speech(), CTC().loss, collate=collate),
)
