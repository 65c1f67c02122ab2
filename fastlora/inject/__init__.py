"""Changes a model: LoRA, bottleneck adapters and prompts, several by name, and out again."""
