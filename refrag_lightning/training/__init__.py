"""LightningModules, their optimiser, and the callbacks of a run."""

from refrag_lightning.training.alignment import AlignmentModule
from refrag_lightning.training.base import RefragLightningModule

__all__ = ["AlignmentModule", "RefragLightningModule"]
