"""Evaluation: what runs during training, and tasks of lm-evaluation-harness with every setting recorded.

Begin with `evaluators`, functions (params, step) → numbers and texts that the training loop calls, and with
`lm_eval_model`, a model as lm-eval wants it. `presets` holds the settings behind each published number, `settings` parses
them, `manifest` records them, `work` makes long evaluations resumable, `sandbox` runs generated programs.

May import everything below the commands: training, decoding and scoring meet here.
"""
