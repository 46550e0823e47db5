"""Evaluation: evaluators that run during training, and tasks of lm-evaluation-harness with every setting recorded.

Begin with `evaluators`, functions (params, step) → numbers and texts that the training loop calls, and with
`lm_eval_model`, the adapter of a model to lm-evaluation-harness, which `lm_eval_cli` registers. `answer_metrics` judges
answers, `settings` parses settings, `presets` holds those behind each published number, `manifest` records them, `work`
makes long evaluations resumable, `code_execution` runs generated programs in a sandbox (with `code_runner` inside).

May import training, decoding, scoring and `illada_jax.api`, which meet here.
"""
