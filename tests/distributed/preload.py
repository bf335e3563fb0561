"""Imported once by the fork server: torch must not start threads that a fork would lose."""

import torch

torch.set_num_threads(1)
