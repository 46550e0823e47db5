"""Pictures of how a text was written: every state that it went through, and what else the network thought of.

Begin with `compare`, which decodes a prompt with several strategies, and `write_page`, which shows traces side by side
on one page of HTML. `trace` has the record itself and how it is rebuilt from a result of the decoder, `strategies` what
differs between two of them, `page` (with `page.html`, `page.css`, `page.js`), `picture` and `terminal` the ways to show
them. The room stands beside the commands, at the top: it may import everything, and is imported by commands only.
"""

from illada_jax.tracing.page import write_page
from illada_jax.tracing.picture import SUFFIXES, write_picture
from illada_jax.tracing.strategies import NEEDS, describe, differences
from illada_jax.tracing.terminal import Watcher
from illada_jax.tracing.trace import Trace, compare, make_trace

__all__ = ["NEEDS", "SUFFIXES", "Trace", "Watcher", "compare", "describe", "differences", "make_trace", "write_page",
           "write_picture"]
