"""The operators, a module each, which registers it when it is imported."""
