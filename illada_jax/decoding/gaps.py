"""Text with gaps: `The cat [[mask:3]] the mat.` asks for three tokens between the two pieces."""

import itertools
import re
from typing import Any, NamedTuple

from illada_jax.errors import InputError

GAP = re.compile(r"\[\[mask:([0-9]{1,9})\]\]")


class GappedText(NamedTuple):
    """A text split at its gaps.

    Attributes:
      pieces: given text around the gaps, one more than there are gaps.
      lengths: the length of each gap, in tokens.
    """

    pieces: list[str]
    lengths: list[int]

    def tokens(self, tokenizer: Any) -> list[int]:
        """Ids with MASK repeated in the gaps. Each piece is tokenised separately: no token spans a gap."""
        ids = tokenizer.encode(self.pieces[0])
        for length, piece in zip(self.lengths, self.pieces[1:], strict=True):
            ids += [tokenizer.mask_id] * length + tokenizer.encode_behind(piece)
        return ids

    def fill(self, tokenizer: Any, masked: list[int], filled: list[int]) -> str:
        """The text with its gaps filled; given pieces are kept character for character.

        `masked` is the result of `tokens`, `filled` the same ids with tokens in place of MASK.
        """
        written = (new for old, new in zip(masked, filled, strict=True) if old == tokenizer.mask_id)
        # As bytes: a character may begin in one gap and end in the next.
        text, is_start = self.pieces[0].encode(), not self.pieces[0]
        for length, piece in zip(self.lengths, self.pieces[1:], strict=True):
            gap = tokenizer.to_bytes(itertools.islice(written, length))
            text += gap.removeprefix(b" ") if is_start and tokenizer.opens_with_blank else gap
            text += piece.encode()
            is_start = is_start and not (gap or piece)
        return text.decode(errors="replace")


def parse_gaps(text: str) -> GappedText:
    """Splits a text at `[[mask:N]]`.

    Raises:
      InputError: the text has no gap, or a malformed one.

    >>> parse_gaps("The cat [[mask:3]] the mat.")
    GappedText(pieces=['The cat ', ' the mat.'], lengths=[3])
    """
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    parts = GAP.split(text)
    pieces, lengths = parts[0::2], [int(n) for n in parts[1::2]]
    if any("[[mask" in piece for piece in pieces) or 0 in lengths:
        raise InputError(f"{shown}: malformed gap; write [[mask:N]] for a gap of N tokens, N at least 1")
    if not lengths:
        raise InputError(f"{shown}: no gap to fill; write [[mask:N]] for a gap of N tokens")
    return GappedText(pieces, lengths)
