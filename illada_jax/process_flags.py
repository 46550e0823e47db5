"""The flag of commands that run on several hosts: a command adopts it, so that its --help shows it."""

from absl import flags

PROCESSES = flags.DEFINE_string(
    "processes", "", "several processes: auto (TPU pods, GKE, SLURM), or ADDRESS:PORT,PROCESSES,NUMBER_OF_THIS_ONE")
