from fastprob._files import write_atomically  # noqa: F401
from fastprob.training import *  # noqa: F403
