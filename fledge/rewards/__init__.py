"""Training by rewards (GRPO, DPO): a model learns from its own answers, and is evaluated while it does."""
