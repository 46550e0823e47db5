"""Programs compiled for TPUs that are not there: memory, work and traffic, read from what the compiler made.

Begin with `plan.make_plan` if there is one machine in mind, and with `illada_jax.aot`, the command, for a search over
meshes. `programs` builds the very step, decoder or scorer that would run, `hlo` reads the compiled program, `chips` has
the peaks of the chips, `roofline` makes times of both, `render` tables.

Stands at the top, beside the commands: it may import everything.
"""
