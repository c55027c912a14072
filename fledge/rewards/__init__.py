"""Rewards: a model learns from its own scored answers, and is watched while it does."""
