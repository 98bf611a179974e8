"""Whole runs on the built-in data: ProbVLM from embedding to calibration, few-shot prompts on shifted digits, and what
matches rest on, by every method of attribution."""
