"""Imported once by the fork server: torch must not start threads that a fork would lose."""

from tests.gpu import stand_in

if stand_in.is_wanted():
    stand_in.stand_in()

import torch

torch.set_num_threads(1)
