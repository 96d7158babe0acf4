"""SFTModule: supervised fine-tuning on chats, and on questions with documents.

With an encoder, documents are read as the data module says: as rows, as text, or not at all. With
`encoder: null` there is a causal language model alone (plain SFT); what comes out is an ordinary
Hugging Face folder, which can be the `decoder` of another run.
"""

from typing import ClassVar

from refrag_lightning.training.language import LanguageModule


class SFTModule(LanguageModule):
    """Trains answers, from what the data module has the model read."""

    takes_plain: ClassVar[bool] = True
    usually_trains: ClassVar[tuple[str, ...]] = ("projector", "encoder", "decoder")
