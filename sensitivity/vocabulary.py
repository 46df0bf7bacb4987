"""How many tokens a model knows. May import: transformers."""

from typing import Any

from transformers import PreTrainedModel


def vocabulary_size(model: PreTrainedModel) -> int:
    """The config's, or the rows of the embedding: a config of a model's own code need not have the field."""
    stated = getattr(model.config.get_text_config(), "vocab_size", None)
    embedding: Any = model.get_input_embeddings()
    return int(stated or getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])
