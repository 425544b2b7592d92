"""What the model side says when a user's model or machine cannot do what was asked."""


class OutOfMemory(Exception):
    """A step needed more memory than the machine has left; a smaller one may still fit."""


class ModelError(Exception):
    """A model that cannot be served; its text is one sentence: what, where and what would help."""
