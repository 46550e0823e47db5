"""Training: one state, one step, one loop, for pre-training and fine-tuning.

Begin with `loop.train`, which is given data, evaluators and a mesh and knows nothing of where they come from; then
`step`, the compiled function that it calls. `optimizer` has schedules, `plateau` tells when to decay, `checkpoints`
saves so that a kill at any moment costs little, `saved_model` reads for decoding what they hold, `faults` keeps bad
numbers out.

May import data, model, diffusion and parallel. It does not know decoding: evaluators are functions that it is given.
"""
