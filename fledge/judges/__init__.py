"""Judges of stories: how they end, whether they tell their topic, and whether they hold together. One file a judge."""
