"""LoRA layers, one file per kind of layer, and what they share."""
