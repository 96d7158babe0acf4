"""LightningModules, their optimiser, and the callbacks of a run."""

from refrag_lightning.training.alignment import AlignmentModule
from refrag_lightning.training.base import RefragLightningModule
from refrag_lightning.training.evaluate_answers import AnswerEvaluation
from refrag_lightning.training.evaluate_perplexity import PerplexityEvaluation
from refrag_lightning.training.hello import HelloDataModule, HelloModule
from refrag_lightning.training.pretrain import PretrainModule
from refrag_lightning.training.sft import SFTModule
from refrag_lightning.training.sharded import ShardedStrategy

__all__ = [
    "AlignmentModule",
    "AnswerEvaluation",
    "HelloDataModule",
    "HelloModule",
    "PerplexityEvaluation",
    "PretrainModule",
    "RefragLightningModule",
    "SFTModule",
    "ShardedStrategy",
]
