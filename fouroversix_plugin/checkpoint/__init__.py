"""Checkpoints on disk: opened and checked (files), read (read), quantized (sources, plan, write)."""

from fouroversix_plugin.checkpoint.files import Checkpoint, CheckpointError
from fouroversix_plugin.checkpoint.plan import MAX_SHARD_SIZE, OUTPUT_FORMATS, Plan
from fouroversix_plugin.checkpoint.read import LoadedCheckpoint, load_checkpoint
from fouroversix_plugin.checkpoint.target import partial_folder
from fouroversix_plugin.checkpoint.write import plan_conversion, quantize_checkpoint

__all__ = [
    "MAX_SHARD_SIZE",
    "OUTPUT_FORMATS",
    "Checkpoint",
    "CheckpointError",
    "LoadedCheckpoint",
    "Plan",
    "load_checkpoint",
    "partial_folder",
    "plan_conversion",
    "quantize_checkpoint",
]
