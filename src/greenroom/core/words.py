"""What the command of an actor may be: a template and an image's config are held to the same."""

from __future__ import annotations

#: Of one argument or one variable of the environment. Linux takes no longer ones (MAX_ARG_STRLEN).
MAX_ARGUMENT_BYTES = 128 << 10
#: Of one command.
MAX_ARGUMENTS = 1000


def is_too_long(word: str) -> bool:
    return len(word.encode(errors="surrogatepass")) > MAX_ARGUMENT_BYTES
