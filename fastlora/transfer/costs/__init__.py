"""What each way to fine-tune a model trains, and what that costs in memory and time."""
