"""HTTP, text and scheduling: everything of Rivulet that makes no tensor."""
