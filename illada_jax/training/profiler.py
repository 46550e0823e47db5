"""Profiles of chosen steps, for TensorBoard's profiler or Perfetto."""

import pathlib
import shutil
import tempfile
from typing import Any

import jax
from etils import epath

from illada_jax.errors import InputError


def parse_steps(text: str) -> range:
    """The steps of a flag such as `100:105`, which excludes 105; an empty range for an empty text.

    Raises:
      InputError: the text is not of that form.
    """
    if not text:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise InputError(f"--profile_steps={text}: must be FIRST:END, for example 100:105 for five steps")
    return range(int(first), int(end))


class Profiler:
    """Records `steps` into `workdir/profile`, in every process."""

    def __init__(self, workdir: epath.Path, steps: range):
        self._target = workdir / "profile"
        self._steps = steps
        self._local: str | None = None

    def before(self, step: int, state: Any) -> None:
        """Starts or ends recording; call it before each step with the state that the step starts from."""
        if self._local is None and step in self._steps:
            jax.block_until_ready(state)
            self._local = tempfile.mkdtemp()  # the profiler writes to local paths only
            jax.profiler.start_trace(self._local)
        elif step >= self._steps.stop:
            self.close(state)

    def close(self, state: Any) -> None:
        """Ends recording, if it is active, after the steps that lead to `state`."""
        if self._local is None:
            return
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        for path in pathlib.Path(self._local).rglob("*"):
            if path.is_file():
                target = self._target / str(path.relative_to(self._local))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        shutil.rmtree(self._local)
        self._local, self._steps = None, range(0)
