"""Muon and AdamW in one optimizer, its parameter groups and its schedule."""

from nanofed.optim.groups import parameter_groups
from nanofed.optim.movement import Movement, movements
from nanofed.optim.optimizer import MuonAdamW
from nanofed.optim.schedule import Clock, Schedule
from nanofed.optim.sharded import DistMuonAdamW

__all__ = ["Clock", "DistMuonAdamW", "Movement", "MuonAdamW", "Schedule", "movements", "parameter_groups"]
