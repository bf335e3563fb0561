"""Optimizers, parameter groups, learning-rate schedules and averaged weights."""
