"""Supervised fine-tuning on top of TRL's `SFTTrainer`, and the parts that all of Fledge's trainings share."""
