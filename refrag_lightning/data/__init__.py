"""LightningDataModules, and the sources of text that they read."""

from refrag_lightning.data.alignment import AlignmentDataModule
from refrag_lightning.data.sources import HubSource, JsonLinesSource, PydocSource, TextSource

__all__ = ["AlignmentDataModule", "HubSource", "JsonLinesSource", "PydocSource", "TextSource"]
