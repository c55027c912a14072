"""What Fledge adds to TRL's `SFTTrainer`, and what it shares with pre-training."""
