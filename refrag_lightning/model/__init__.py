"""The model: plain torch and transformers; importing it registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel

from refrag_lightning.model.config import RefragConfig
from refrag_lightning.model.folder import BaseMismatchError
from refrag_lightning.model.plain import PlainModel
from refrag_lightning.model.refrag import RefragModel

AutoConfig.register("refrag", RefragConfig, exist_ok=True)
AutoModel.register(RefragConfig, RefragModel, exist_ok=True)

__all__ = ["BaseMismatchError", "PlainModel", "RefragConfig", "RefragModel"]
