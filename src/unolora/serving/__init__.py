"""All tasks from one adapter: an engine that any Python program can use, and an HTTP server around it."""

from unolora.serving.engine import ClosedError, DeadlineError, Engine, EngineError, FailedError, QueueFullError

__all__ = ["ClosedError", "DeadlineError", "Engine", "EngineError", "FailedError", "QueueFullError"]
