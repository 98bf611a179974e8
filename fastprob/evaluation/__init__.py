"""How good predictions are, whatever predicts: retrieval, calibration, statistics, tables and figures."""
