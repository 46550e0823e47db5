"""Plans: programs compiled for TPUs that need not be attached, with their memory, work and traffic.

Begin with `plan.make_plan`, or with the command, `illada_jax.aot`, which also compares plans. `programs` builds the
step, decoder or scorer exactly as they run, `hlo` reads the compiled program, `checks` looks for buffers that no device
should hold, `chips` has the figures of the chips, `roofline` derives times from both, `render` makes tables.

May import training, decoding and scoring, whose programs it compiles; only the command imports it.
"""
