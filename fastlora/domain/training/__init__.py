"""Adapt a pretrained model to a second domain: the trainer, checkpoints and report of a run."""
