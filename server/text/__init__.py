"""Text: tokens, stop strings and chat templates."""
