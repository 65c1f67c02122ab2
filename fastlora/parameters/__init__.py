"""What a model's parameters, and training them, cost in memory."""

from fastlora.parameters.report import ModuleRow, ParameterReport, parameter_report

__all__ = ["ModuleRow", "ParameterReport", "parameter_report"]
