"""ids -> more ids: continuous batching over a paged cache, on the trainer's own compute weights.

Owns requests, cache blocks and the order in which they are served. Knows no text, no rewards and no server.
"""

from abyssal.engine.engine import Engine, Finished, QueueFull

__all__ = ["Engine", "Finished", "QueueFull"]
