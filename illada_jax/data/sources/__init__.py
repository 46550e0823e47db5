"""Sources of text (`KIND:ARGUMENT`) and of examples for fine-tuning.

Begin with `registry`: a kind of source is a function from its argument to a list of `Part`s, registered by name.
"""

from illada_jax.data.sources import builtin, files  # noqa: F401  imported to register their kinds
