"""Training: one state, one step, one loop, for pre-training and fine-tuning.

Begin with `loop.train`, which takes a `RunSetup` (data, evaluators, mesh), then `step`, the compiled function that it
calls, with the loss over a mesh in `sharded_loss`. `run` sets a run up from its config. `optimizer` has the schedules,
`plateau` reports when to decay, `checkpoints` saves states, `saved_model` reads them for decoding, `faults` keeps bad
numbers out. A run's surroundings: `workdir` and its `lock`, `metrics`, `clock` (time by phase, watchdog),
`stop_signals`, `profiler`.

May import everything below it, but not decoding: evaluators are functions that it receives.
"""
