"""Muon and AdamW in one optimizer, its parameter groups and its schedule."""

from nanofed.optim.groups import parameter_groups
from nanofed.optim.optimizer import MuonAdamW
from nanofed.optim.schedule import Clock, Schedule
from nanofed.optim.sharded import DistMuonAdamW

__all__ = ["Clock", "DistMuonAdamW", "MuonAdamW", "Schedule", "parameter_groups"]
