"""Traces: every state of a text while it was written, and the candidates of the network at each step.

Begin with `compare`, which decodes a prompt with several strategies, and `write_page`, which shows traces side by side
on one HTML page. `trace` rebuilds a trace from a result of the decoder, `strategies` describes settings in words, and
`page` (with `page.html`, `page.css`, `page.js`), `picture` and `terminal` render traces. May import
decoding and all packages below it; only commands import it.
"""

from illada_jax.tracing.page import write_page
from illada_jax.tracing.picture import SUFFIXES, check_picture, write_picture
from illada_jax.tracing.strategies import NEEDS, describe, differences
from illada_jax.tracing.terminal import Watcher
from illada_jax.tracing.trace import Trace, compare, make_trace

__all__ = ["NEEDS", "SUFFIXES", "Trace", "Watcher", "check_picture", "compare", "describe", "differences", "make_trace",
           "write_page", "write_picture"]
