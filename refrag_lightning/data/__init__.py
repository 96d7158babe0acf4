"""LightningDataModules, and the sources of text, questions and conversations that they read."""

from refrag_lightning.data.alignment import AlignmentDataModule
from refrag_lightning.data.biography_sources import (
    BiographyConversations,
    BiographyQuestions,
    BiographyTexts,
    BiographyWorld,
)
from refrag_lightning.data.chat_sources import HubConversations, JsonLinesConversations
from refrag_lightning.data.cloze import ClozeQuestions
from refrag_lightning.data.conversations import (
    ConversationSource,
    QuestionConversations,
    RetellConversations,
)
from refrag_lightning.data.mixture import WeightedSource
from refrag_lightning.data.perplexity import PerplexityDataModule
from refrag_lightning.data.pretrain import PretrainDataModule
from refrag_lightning.data.question_batches import QuestionDataModule
from refrag_lightning.data.questions import HubQuestions, JsonLinesQuestions, QuestionSource
from refrag_lightning.data.sft import SFTDataModule
from refrag_lightning.data.sources import HubSource, JsonLinesSource, PydocSource, TextSource
from refrag_lightning.data.teacher_answers import TeacherAnswers

__all__ = [
    "AlignmentDataModule",
    "BiographyConversations",
    "BiographyQuestions",
    "BiographyTexts",
    "BiographyWorld",
    "ClozeQuestions",
    "ConversationSource",
    "HubConversations",
    "HubQuestions",
    "HubSource",
    "JsonLinesConversations",
    "JsonLinesQuestions",
    "JsonLinesSource",
    "PerplexityDataModule",
    "PretrainDataModule",
    "PydocSource",
    "QuestionConversations",
    "QuestionDataModule",
    "QuestionSource",
    "RetellConversations",
    "SFTDataModule",
    "TeacherAnswers",
    "TextSource",
    "WeightedSource",
]
