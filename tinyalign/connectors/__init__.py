"""Connectors: features and latents become tokens in the language model's embedding space."""

from tinyalign.connectors.mlp import MLPConnector
from tinyalign.connectors.rag import RAGConnector, RAGTokens

__all__ = ["MLPConnector", "RAGConnector", "RAGTokens"]
