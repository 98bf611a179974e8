"""Whole runs on the built-in data: ProbVLM from embedding to calibration, and few-shot prompts on shifted digits."""
