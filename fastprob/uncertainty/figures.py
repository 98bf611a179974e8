from fastprob.evaluation.plots import axes_of_figure, save_figure  # noqa: F401
