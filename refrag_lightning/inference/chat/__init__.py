"""Asking a model in a terminal or a pipe: the session, what it looks like, and how it is typed."""
