"""The wire: one adapter a dialect, from body to Prompt and from TextOutput to event."""
