"""Whole runs on the built-in data: ProbVLM from embedding to calibration, few-shot prompts on shifted digits, what
matches rest on, by every method of attribution, and ALBEF, BLIP and CapFilt on captions of which some are false."""
