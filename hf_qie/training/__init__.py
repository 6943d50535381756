"""The Trainer subclass, its loss, checkpoints, metrics and evaluation."""
