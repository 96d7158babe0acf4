"""Passages of documents, their row states, and search over them."""
