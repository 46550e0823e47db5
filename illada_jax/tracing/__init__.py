"""Pictures of how a text was written: every state that it went through, and what else the network thought of."""

from illada_jax.tracing.page import write_page
from illada_jax.tracing.picture import SUFFIXES, write_picture
from illada_jax.tracing.terminal import Watcher
from illada_jax.tracing.trace import Trace, make_trace

__all__ = ["SUFFIXES", "Trace", "Watcher", "make_trace", "write_page", "write_picture"]
