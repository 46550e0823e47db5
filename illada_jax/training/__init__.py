"""Training: one state, one step, one loop, for pre-training and fine-tuning.

Begin with `loop.train`, which takes data, evaluators and a mesh and does not depend on where they come from; then
`step`, the compiled function that it calls. `optimizer` has schedules, `plateau` reports when the loss is flat,
`checkpoints` saves so that a kill at any moment costs little, `saved_model` reads them for decoding, `faults` handles
bad steps.

May import data, model, diffusion and parallel. It does not depend on decoding: evaluators are passed to it.
"""
