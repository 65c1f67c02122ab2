"""What the benchmarks measured, read and shown: ``fastlora bench report``."""
