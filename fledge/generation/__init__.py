"""Answers from a model: one, a conversation, or a file of them."""
