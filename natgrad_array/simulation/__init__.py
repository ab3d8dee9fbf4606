"""Ensembles over time: run, recorded, checkpointed, on disk where they are large."""

from natgrad_array.simulation.checkpoint import CheckpointError
from natgrad_array.simulation.groups import Groups, simulate_groups
from natgrad_array.simulation.history import History
from natgrad_array.simulation.schedule import log_steps
from natgrad_array.simulation.simulate import simulate
from natgrad_array.simulation.simulate_training import simulate_training

__all__ = ["CheckpointError", "Groups", "History", "log_steps", "simulate", "simulate_groups", "simulate_training"]
